"""docs/studies/sensitivity.md: which layers and which parts of a model tolerate int8 and 4 bits."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.report import markup
from studies import pages

METHODS = ("absmax-int8", "linear-int4", "nf4")
GROUPS = {"smollm2-135m": 5, "tiny-gpt2": 1, "tiny-olmo": 1}  # layers quantized together: bounds the time on 30 layers
KINDS_METHOD = "nf4"  # under which each kind of projection is quantized alone
INTRODUCTION = """\
Reports say that the early layers tolerate quantization better; one quantizes the first 12 of 16 and leaves the last
four as they were. Here each part is quantized alone, everything else stays in fp32, and the change of NLL against fp32
is paired over the same tokens; intervals are 95%, Student's t over windows. Changes do not add up exactly, and parts
differ in size: the last column is the change for every percent of the projections' weights that were quantized."""


def bench(model: str) -> Any:
    """A model and its text: eight windows of 256 tokens, the fewest that give an interval; more on the tiny models."""
    from harness.core.options import Declared
    from harness.core.specification import parse
    from harness.inputs.models import checkpoints
    from harness.inputs.texts import corpora
    from studies.pitfalls import Bench

    declared = Declared(Path())
    tiny = model.startswith("tiny")
    corpus = corpora.read(parse("synthetic" if tiny else "lee"), declared)
    checkpoint = checkpoints.materialise(parse(model), declared)
    return Bench(checkpoint, corpus, width=256, max_tokens=8192 if tiny else 2048)


def scopes_of(model: Any, group: int) -> dict[str, str]:
    """What is quantized alone: kind of part and scope, in the words of a specification."""
    from harness.methods.quantizing import arguments

    _, depth = arguments.decoder_layers(model)
    found = {"linear": "whole", "attention": "part", "mlp": "part"}
    found |= {f"layers={first}-{min(first + group, depth) - 1}": "group" for first in range(0, depth, group)}
    return dict.fromkeys(halves_of(model), "half") | found  # of two layers the halves are the groups


def halves_of(model: Any) -> tuple[str, str]:
    """The scopes of the early and the late half of the layers."""
    from harness.methods.quantizing import arguments

    _, depth = arguments.decoder_layers(model)
    return f"layers=0-{depth // 2 - 1}", f"layers={depth // 2}-{depth - 1}"


def kinds_of(model: Any) -> list[str]:
    """Scopes for each kind of projection, by the last part of its name."""
    return [f"names=*.{kind}" for kind in dict.fromkeys(name.partition(".0.")[2] for name in names_in(model)) if kind]


def names_in(model: Any) -> list[str]:
    """Names of a model's projections."""
    from harness.core.contracts import Scope
    from harness.methods.quantizing import arguments

    return arguments.select(model, Scope())


def measure_model(model: str) -> dict[str, Any]:
    """Every scope under every method, and the late half against the early one."""
    from harness.core.stats import paired_delta
    from harness.inputs.texts.protocols import aggregate, window_slices

    where = bench(model)
    slices, plain = window_slices(where.plan), where.open()
    chosen = scopes_of(plain, GROUPS[model])
    kinds = {scope: "kind" for scope in kinds_of(plain)}
    total = sum(plain.get_submodule(name).weight.numel() for name in names_in(plain))
    early, late = halves_of(plain)
    rows, halves, parts = [], [], []
    for method in METHODS:
        kept = {}
        for scope, part in (chosen | (kinds if method == KINDS_METHOD else {})).items():
            candidate = where.open(f"{method}:{scope}")
            kept[scope] = where.nll(candidate)
            rows.append(
                {
                    "method": method,
                    "scope": scope,
                    "part": part,
                    "share": quantized_elements(method, candidate) / total,
                    **interval(paired_delta(kept[scope], where.reference_nll, slices)),
                }
            )
            print(f"{model}: {method}:{scope} {rows[-1]['delta']:+.4f}", file=sys.stderr)
        halves.append({"method": method, **interval(paired_delta(kept[late], kept[early], slices))})
        shares = {row["scope"]: row["share"] for row in rows if row["method"] == method}
        attention, mlp = (
            (kept[scope] - where.reference_nll) / shares[scope] for scope in ("attention", "mlp")
        )  # (tokens,) each
        parts.append({"method": method, **interval(paired_delta(attention, mlp, slices))})
    return {
        "text": where.corpus.name,
        "tokens": where.plan.tokens,
        "windows": len(where.plan.windows),
        "width": where.width,
        "reference": aggregate(where.reference_nll, where.plan),
        "note": where.checkpoint.note,
        "rows": rows,
        "late_over_early": halves,
        "attention_over_mlp": parts,
    }


def quantized_elements(method: str, model: Any) -> int:
    """Weights that a method quantized in a model."""
    from harness.core import catalog

    return sum(weight.elements for weight in catalog.methods()[method].quantized(model))


def interval(estimate: Any) -> dict[str, float]:
    """An estimate as kept."""
    return {"delta": estimate.value, "low": estimate.low, "high": estimate.high}


def measure(models: Sequence[str]) -> dict[str, Any]:
    """Every model."""
    return {"models": {model: measure_model(model) for model in models or GROUPS}}


def with_interval(row: Mapping[str, Any]) -> str:
    """'+0.01230 [+0.01000, +0.01460]'."""
    return f"{row['delta']:+.5f} [{row['low']:+.5f}, {row['high']:+.5f}]"


def table(rows: Sequence[Mapping[str, Any]], method: str) -> str:
    """One method on one model."""
    body = [
        [
            f"`{row['scope']}`" + " (half)" * (row["part"] == "half"),
            f"{100 * row['share']:.1f}",
            with_interval(row),
            f"{1000 * row['delta'] / (100 * row['share']):+.3f}",
        ]
        for row in rows
        if row["method"] == method
    ]
    headers = [f"`{method}`: quantized alone", "of the weights, %", "change of NLL, nat", "mnat for each percent"]
    return markup.table(headers, body, words=(0,))


def halves_said(pair: Mapping[str, float]) -> str:
    """What the paired interval decides between the halves."""
    if pair["low"] > 0:
        return "the early half tolerates it better, as reports say"
    if pair["high"] < 0:
        return "the late half tolerates it better, against the reports"
    return "halves cannot be told apart"


def parts_said(pair: Mapping[str, float]) -> str:
    """What the paired interval decides between attention and mlp, for equally many weights."""
    value, low, high = (1000 * pair[key] / 100 for key in ("delta", "low", "high"))  # mnat for each percent
    shown = f"attention less mlp {value:+.3f} [{low:+.3f}, {high:+.3f}] mnat"
    if pair["low"] > 0 or pair["high"] < 0:
        return f"For each percent of the weights {'attention' if pair['low'] > 0 else 'mlp'} loses more ({shown})."
    return f"Percent for percent, attention and mlp cannot be told apart ({shown})."


def verdict(found: Mapping[str, Any]) -> str:
    """What the intervals decide: early against late half, attention against mlp, the most and least sensitive group."""
    lines = []
    for pair, parts in zip(found["late_over_early"], found["attention_over_mlp"], strict=True):
        rows = [row for row in found["rows"] if row["method"] == pair["method"]]
        groups = sorted((row for row in rows if row["part"] != "kind"), key=lambda row: row["delta"])
        groups = [row for row in groups if row["scope"].startswith("layers=")]
        smallest = min(row["share"] for row in groups)
        groups = [row for row in groups if row["share"] == smallest]  # of two layers the halves are the groups
        line = f"- `{pair['method']}`: late half less early half {with_interval(pair)} nat: {halves_said(pair)}."
        if any(row["low"] > 0 for row in groups):
            line += f" Least is lost with `{groups[0]['scope']}`, most with `{groups[-1]['scope']}`."
        else:
            line += " No group of layers loses anything that these windows show."
        lines.append(f"{line} {parts_said(parts)}")
    return "\n".join(lines)


def section(model: str, found: Mapping[str, Any]) -> str:
    """One model."""
    head = (
        f"## `{model}`\n\n`{found['text']}`, {found['tokens']:,} tokens in {found['windows']} windows of "
        f"{found['width']}; fp32 perplexity {found['reference']:.3f}."
    )
    caveat = f"> {found['note']}" if found["note"] else ""
    tables = [table(found["rows"], method) for method in METHODS]
    return "\n\n".join(part for part in (head, caveat, verdict(found), *tables) if part)


def render(results: Mapping[str, Any]) -> str:
    """The page."""
    return "\n\n".join([INTRODUCTION, *(section(model, found) for model, found in results["models"].items())])


DOCUMENT = pages.Document(
    "sensitivity", "Which layers and parts tolerate quantization", measure, render, script="quantizers.sensitivity"
)

if __name__ == "__main__":
    sys.exit(pages.run(DOCUMENT))
