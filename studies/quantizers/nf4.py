"""docs/studies/nf4.md: NF4 against linear scales in levels, in error by block size and bits, and in perplexity."""

from __future__ import annotations

import io
import itertools
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from harness.core.text import NOTHING
from harness.report import markup
from harness.report.plots import STYLE, WIDTH_INCHES
from studies import pages
from studies.quantizers.nf4_figures import BITS, BLOCKS, NAMES, measure

PLOT = "nf4.svg"
FOUR_BITS = ("symmetric", "affine", "nf4", "nf4-dq", "fp4")
STYLES = {  # colour of Okabe and Ito's palette, marker
    "symmetric": ("#8A8A8A", "o"),
    "affine": ("#0072B2", "s"),
    "nf4": ("#D55E00", "D"),
    "nf4-dq": ("#222222", "x"),
    "fp4": ("#009E73", "^"),
}
PLOTTED = ("Gaussian", "Student t3", "tiny-olmo")


def name(kind: str, code: int) -> str:
    """'int4 affine', 'NF4'."""
    return NAMES[kind].format(code)


def percent(value: float) -> str:
    """A share of the weights' RMS."""
    return f"{100 * value:.2f}"


def listed(words: Iterable[str]) -> str:
    """'a, b and c'."""
    found = list(words)
    return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found) or "none"


def at(rows: Sequence[Mapping[str, Any]], kind: str, block: int, code: int = 4) -> Mapping[str, Any] | None:
    """The row of a kind at a block size; None where it was not measured."""
    return next((row for row in rows if (row["kind"], row["block"], row["code"]) == (kind, block, code)), None)


def levels(results: Mapping[str, Any]) -> str:
    """The table of levels and what it refutes."""
    nf4, fp4, defined = results["nf4"], results["fp4"], results["quantiles"]
    used, linear = results["use"]["nf4"], results["use"]["symmetric"]
    gaps = [high - low for low, high in itertools.pairwise(nf4)]
    rows = [
        [
            str(index),
            f"{level:.6f}",
            f"{defined[index]:.6f}",
            f"{gaps[index]:.4f}" if index < len(gaps) else "",
            f"{100 * used[index]:.2f}",
            f"{fp4[index] + 0.0:.4f}",
            f"{(index - 7) / 7:.4f}" if index < 15 else "",
        ]
        for index, level in enumerate(nf4)
    ]
    headers = ["", "NF4", "by definition", "to the next", "used, %", "FP4", "int4 symmetric"]
    positive = [level for level in nf4 if level > 0]
    ratios = [high / low for low, high in itertools.pairwise(positive)]
    entropy = [-sum(share * math.log2(share) for share in shares if share) for shares in (used, linear)]
    off = max(abs(made - level) for made, level in zip(defined, nf4, strict=True))
    said = f"""\
All levels times a block's largest magnitude. *By definition*: quantiles of the normal distribution at equal steps of
probability, 8 above 0 and 7 below, over the largest (QLoRA, arXiv 2305.14314). *Used*: by normal weights in blocks
of 64. FP4 spells 0 twice.

- **Fixed.** The definition gives NF4's sixteen figures within {off:.0e}: no weight of any model enters. What adapts
  is the scale of a block, as in every other format here.
- **Not logarithmic.** On a logarithmic scale neighbours stand in one ratio; here the ratio is {ratios[0]:.2f} next
  to 0, falls to {min(ratios):.2f} and ends at {ratios[-1]:.2f}. The gaps grow from {min(gaps):.3f} at the centre to
  {max(gaps):.3f} at the ends.
- **Not a floating-point format.** FP4 is one: sign, exponent, mantissa. NF4's code is an index into a table.
- **Not equally used either**, though that is its idea: blocks are scaled by their own largest magnitude, and not by a
  fixed quantile, so a level is taken by {100 * min(used):.1f}% to {100 * max(used):.1f}% of normal weights. The
  codes carry {entropy[0]:.2f} of 4 bits, those of symmetric int4 {entropy[1]:.2f}."""
    return markup.table(headers, rows, words=()) + "\n\n" + said


def by_block(results: Mapping[str, Any]) -> list[str]:
    """RMS errors of the 4-bit formats by block size, source by source."""
    parts = []
    for source, rows in results["errors"].items():
        body = []
        for block in BLOCKS:
            found = [at(rows, kind, block) for kind in FOUR_BITS]
            best = min(row["rms"] for row in found if row)
            shown = [percent(row["rms"]) if row else NOTHING for row in found]
            marked = [
                f"**{text}**" if row and row["rms"] == best else text for row, text in zip(found, shown, strict=True)
            ]
            body.append([str(block), *marked])
        headers = [f"{source}, block", *(name(kind, 4) for kind in FOUR_BITS)]
        parts.append(markup.table(headers, body, words=()))
    return parts


def affine_wins(results: Mapping[str, Any]) -> str:
    """Where affine int4 beats NF4: at equal blocks, and at equal bits."""
    lines, dearer = [], []
    for source, rows in results["errors"].items():
        pairs = [(block, at(rows, "affine", block), at(rows, "nf4", block)) for block in BLOCKS]
        wins = [str(block) for block, ours, theirs in pairs if ours and theirs and ours["rms"] < theirs["rms"]]
        lines.append(f"- {source}: at blocks of {listed(wins)}.")
        for block, _, theirs in pairs:
            equal = at(rows, "affine", 2 * block)
            if equal and theirs and equal["rms"] < theirs["rms"]:
                dearer.append(f"{source} at {theirs['bits']:.3g} bits")
    verdict = f"it wins for {listed(dearer)} and nowhere else" if dearer else "NF4 wins everywhere"
    return (
        "Affine int4 beats NF4 in RMS error at the same block size where blocks are small, since a small block seldom "
        "fills both ends of a symmetric scale:\n\n" + "\n".join(lines) + "\n\n"
        "It pays with a second fp32 figure a block. At equal bits (affine at twice NF4's block size) "
        f"{verdict}. And it wins wherever the weights already lie on an affine grid, as the last table shows."
    )


def by_bits(results: Mapping[str, Any]) -> str:
    """Errors by the bits of a linear code at block 64, beside NF4 and FP4."""
    chosen = list(results["errors"])
    first = results["errors"][chosen[0]]
    kinds = [(kind, bits) for bits in BITS for kind in ("symmetric", "affine")]
    kinds = [*kinds[:6], ("nf4", 4), ("nf4-dq", 4), ("fp4", 4), *kinds[6:]]
    body = []
    for kind, code in kinds:
        row = at(first, kind, 64, code)
        assert row is not None
        cells = [at(results["errors"][source], kind, 64, code) for source in chosen]
        errors = [f"{percent(cell['rms'])} ({percent(cell['mean'])})" for cell in cells if cell]
        body.append([name(kind, code), f"{row['bits']:.3f}", *errors])
    return markup.table(["", "bits a weight", *chosen], body, words=(0,))


def losses(model: str, found: Mapping[str, Any]) -> str:
    """One model's changes of perplexity."""
    rows = [
        [
            markup.code(row["method"]),
            f"{row['bits']:.3f}",
            f"{row['delta']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]",
            f"{100 * math.expm1(row['delta']):+.2f}",
        ]
        for row in found["rows"]
    ]
    head = (
        f"### `{model}`\n\n`{found['text']}`, {found['tokens']:,} tokens in {found['windows']} windows of "
        f"{found['width']}; fp32 perplexity {found['reference']:.3f}."
    )
    caveat = f"\n\n> {found['note']}" if found["note"] else ""
    table = markup.table(["method", "bits a weight", "change of NLL, nat", "perplexity, %"], rows, words=(0,))
    return f"{head}{caveat}\n\n{table}\n\n{judged(found)}"


def judged(found: Mapping[str, Any]) -> str:
    """Which methods cannot be told from fp32 on this text, and NF4 against affine int4 at the same block."""
    alike = [markup.code(row["method"]) for row in found["rows"] if row["low"] <= 0 <= row["high"]]
    said = []
    for pair in found["nf4_over_affine"]:
        sure = pair["high"] < 0 or pair["low"] > 0
        word = ("NF4 loses less" if pair["delta"] < 0 else "affine int4 loses less") if sure else "undecided"
        said.append(f"block {pair['block']} {pair['delta']:+.4f} [{pair['low']:+.4f}, {pair['high']:+.4f}], {word}")
    return (
        f"The interval holds 0 for {listed(alike)}. NLL under NF4 less NLL under affine int4 at equal blocks, nat: "
        f"{'; '.join(said)}."
    )


ERRORS = """\
RMS of (weight as stored - weight) in percent of the weights' RMS; the least of a line in bold. Drawn weights: 2^20 of
each distribution. The tiny models were trained in fp32 here and never quantized. NF4 with double quantization (8-bit
scales in blocks of 256) is bitsandbytes' own code, the rest is ours; symmetric int4 uses 15 of 16 codes."""
BIT_COUNT = """\
RMS error (in brackets the mean absolute error), percent of the weights' RMS, at blocks of 64. Bits count codes and
fp32 scales: one a block, for affine codes two."""
PERPLEXITY = """\
Paired change of NLL against fp32 on the same tokens, with a 95% interval over windows (Student t): *text like this*.
Bits count every scale and code table that the method stores; on small matrices bitsandbytes' tables, one set for each,
weigh more than on large ones."""


def render(results: Mapping[str, Any]) -> str:
    """The page."""
    blocks = "\n\n".join(by_block(results))
    models = "\n\n".join(losses(model, found) for model, found in results["losses"].items())
    return "\n\n".join(
        [
            f"## The levels\n\n{levels(results)}",
            f"## Error by block size, 4 bits\n\n{ERRORS}\n\n{blocks}\n\n{affine_wins(results)}",
            f"## Error by bits\n\n{BIT_COUNT}\n\n{by_bits(results)}",
            f"![RMS error of 4-bit formats against the bits of their scales]({PLOT})",
            f"## Perplexity\n\n{PERPLEXITY}\n\n{models}",
        ]
    )


def drawn(results: Mapping[str, Any]) -> dict[str, str]:
    """Error of the 4-bit formats against the bits that their scales add: a line a format, a mark a block size."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        canvas = Figure(figsize=(WIDTH_INCHES, 4.2), layout="constrained")
        axes = canvas.subplots(1, len(PLOTTED), sharex=True)
        for panel, source in zip(axes, PLOTTED, strict=True):
            for kind, (colour, marker) in STYLES.items():
                line = [row for row in results["errors"][source] if row["kind"] == kind and row["code"] == 4]
                x, y = [row["bits"] - 4 for row in line], [100 * row["rms"] for row in line]
                panel.plot(x, y, color=colour, marker=marker, ms=4, lw=1.2, label=name(kind, 4))
            panel.set_xscale("log")  # from 0.008 bits at blocks of 4096 to 2 at affine blocks of 32
            panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            panel.set_ylim(bottom=0)
            panel.set_title(source, fontsize=9)
            panel.set_xlabel("bits of scales a weight, beside 4 of code")
        axes[0].set_ylabel("RMS error, % of the weights' RMS (lower is better)")
        handles, texts = axes[0].get_legend_handles_labels()
        canvas.legend(handles, texts, loc="outside lower center", ncols=len(STYLES), frameon=False, fontsize=8.5)
        canvas.suptitle("4-bit formats: error against the bits of their scales", fontsize=10.5, fontweight="bold")
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return {PLOT: buffer.getvalue()}


DOCUMENT = pages.Document("nf4", "NF4 against linear scales", measure, render, drawn, script="quantizers.nf4")

if __name__ == "__main__":
    sys.exit(pages.run(DOCUMENT))
