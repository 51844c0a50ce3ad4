"""What methods lose against fp32 on real texts, and the bounds that follow: the numbers behind `[[reference]]`.

Measured are the embedded model on `lee` (the whole of it, for `stopping`) and on the other texts that are given, and
the tiny models on their own language (the losses of `noise`, under the usual kernel), beside what other people publish.
A bound is the smallest step of STEPS that lies above all of them:
above the upper end of every measured interval, and above every public figure. What is left out is listed with why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harness.core import stats
from harness.core.text import NOTHING, percent
from harness.report import markup
from studies import pages
from studies.gate import noise
from studies.gate.noise import TEXTS, TINY, USUAL

DATA = Path(__file__).parents[2] / "docs" / "studies" / "data" / "gate.json"
STEPS = (1.001, 1.002, 1.005, 1.01, 1.02, 1.05, 1.1)  # ratios of perplexity
EIGHT_BIT = ("absmax-int8", "zeropoint-int8")
BOUNDED = (*EIGHT_BIT, "bnb-int8", "bf16", "fp16")


class Public(NamedTuple):
    """A published ratio of perplexities, and whose it is."""

    methods: tuple[str, ...]
    ratio: float
    source: str


PUBLIC = (
    Public(EIGHT_BIT, 7.3451 / 7.3315, "torchao, docs/source/workflows/inference.md: int8 weights by row, 8B"),
    Public(EIGHT_BIT, 1.000425, "llama.cpp, tools/perplexity: q8_0, 8B"),
    Public(
        EIGHT_BIT, 1.0009, "report 1e290afccbc8fef6: int8 by row, Phi-3-mini, Penn Treebank (fourth power of 1.000226)"
    ),
    Public(("bf16", "fp16"), 1.000404, "llama.cpp, tools/perplexity: bf16 beside fp16, 8B"),
    Public(("bnb-int8",), 31.826826 / 31.616287, "report 402d78b58c8735bf: gpt2, Wikipedia"),
    Public(("bnb-int8",), 15.1966 / 14.9789, "report f30b6a73be1e93ea: OLMo-1B, Penn Treebank"),
    Public(("bnb-int8",), 49.50 / 49.27, "SakethReddyVemula/ANLP-A4: gpt2, WikiText-2"),
    Public(("bnb-int8",), 49.839063 / 49.615658, "ChetaNMahipaL/ANLP-Assignment-4: gpt2, WikiText-2"),
    Public(("bnb-int8",), 267.02 / 261.66, "amanfoundongithub/Quantization: gpt2, Penn Treebank, sentence averages"),
    Public(("bnb-int8",), 19.1612 / 19.1325, "ajit-srikanth/Quantization-and-Model-Compression: opt-350m, Wikipedia"),
    Public(
        ("bnb-int8",), 7.4535 / 7.3315, "torchao, docs/source/workflows/inference.md: int8 weights and activations, 8B"
    ),
)
LEFT_OUT = (
    "report 1e290afccbc8fef6, `bnb-int8` on Phi-3-mini: +10.5%, of fp16 against fp32 in padded batches of sentences: "
    "dtype and padding are in it too",
    "Varun0157/quantisation, `bnb-int8` on gpt-neo-125m: eleven times the reference's perplexity, of a state that was "
    "loaded without holding its names to the model's",
    "4-bit methods: the embedded weights lie on a 4-bit grid already (Q4_1), so that another costs them 23% to 42%, "
    "and published are +5.6% (NF4, OLMo-1B) to +39% (FP4, Phi-3-mini): no step says what a user should tolerate",
)


def measured(keep: Path) -> list[dict[str, Any]]:
    """The delta of every method on every text: one entry each, nats."""
    found = []
    for series in (TEXTS, *TINY):
        reference = noise.losses_of(keep, series, USUAL, "fp32")
        for method in (name for name in series.methods if name != "fp32"):
            losses = noise.losses_of(keep, series, USUAL, method)
            groups: dict[str, list[str]] = {}
            for name in losses:
                if name in reference:
                    groups.setdefault("synthetic" if series in TINY else name.rpartition("-")[0], []).append(name)
            for text, names in groups.items():
                ours, theirs = (np.concatenate([side[name] for name in names]) for side in (losses, reference))
                counts = [count for name in names for count in noise.counts_of(series, losses[name])]
                spans = stats.spans(counts)
                delta = stats.paired_delta(ours, theirs, spans)
                found.append(
                    {"model": series.model, "text": text, "protocol": series.protocol, "method": method,
                     "tokens": len(ours) + len(counts),
                     "windows": delta.count, "value": delta.value, "low": delta.low, "high": delta.high}
                )  # fmt: skip
    return found


def whole_text() -> list[dict[str, Any]]:
    """What `stopping` measured of the embedded model over all of `lee`."""
    kept = pages.read(DATA)["results"].get("saving", {}).get("found", {}) if DATA.is_file() else {}
    rows = {row["method"]: row for row in kept.get("rows", ())}
    model, text, protocol = kept.get("text", ("", "", ""))
    told = {"model": model, "text": text, "protocol": protocol, "windows": kept.get("windows")}
    return [
        {**told, "tokens": kept["tokens"] + kept["windows"], **{name: row[name] for name in ("method", "low", "high")},
         "value": row["delta"]}
        for row in rows.values()
    ]  # fmt: skip


def step(limit: float) -> float | None:
    """The smallest step above a loss in nats; None above all."""
    return next((ratio for ratio in STEPS if math.log(ratio) > limit), None)


def derived(rows: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A bound for every method that gets one, and what it rests on."""
    found = []
    for method in BOUNDED:
        own = [row for row in rows if row["method"] == method]
        limits = {f"{row['model']} on {row['text']}": row["high"] for row in own}
        limits |= {one.source: math.log(one.ratio) for one in PUBLIC if method in one.methods}
        if limits:
            source = max(limits, key=lambda name: limits[name])
            found.append({"method": method, "bound": step(limits[source]), "largest": limits[source], "of": source})
    return found


def measure(texts: Mapping[str, str], keep: Path | None = None, minutes: float | None = None) -> dict[str, Any]:
    """Every text and method; losses are kept as `noise` keeps them. Of 0 minutes, of what lies there alone."""
    keep, others = keep or noise.home(), {name: text for name, text in texts.items() if name != "lee"} or texts
    if minutes != 0:
        noise.measure_losses(others, keep, [one.label for one in (TEXTS, *TINY)])
    rows: list[Mapping[str, Any]] = [*whole_text(), *measured(keep)]
    return {"rows": rows, "bounds": derived(rows)}


def render(found: Mapping[str, Any]) -> str:
    """The section."""
    lines = [
        [
            f"`{row['model']}`",
            f"`{row['text']}`",
            f"`{row['method']}`",
            f"{row['tokens']:,}",
            f"{row['value']:+.5f} [{row['low']:+.5f}, {row['high']:+.5f}]",
        ]
        for row in found["rows"]
    ]
    public = [[f"`{method}`", percent(math.log(one.ratio)), one.source] for one in PUBLIC for method in one.methods]
    bound = [
        [
            f"`{row['method']}`",
            f"{100 * (row['bound'] - 1):.2g}%" if row["bound"] else NOTHING,
            f"{row['largest']:+.5f}",
            row["of"],
        ]
        for row in found["bounds"]
    ]
    steps = ", ".join(f"{100 * (ratio - 1):.2g}%" for ratio in STEPS)
    return "\n\n".join(
        (
            "Losses against `fp32` on the same tokens, with Student's 95% interval over windows; `chunk:512` on the "
            "embedded model, `chunk:256` on the tiny ones.",
            markup.table(["model", "text", "method", "tokens", "change of NLL, nat"], lines, words=(0, 1, 2)),
            "Published by others:",
            markup.table(["method", "change of perplexity", "source"], public, words=(0, 2)),
            f"A bound is the smallest of {steps} above the upper end of every interval and every public figure. These "
            "are the `[[reference]]` rules of `harness/judge/bounds.toml`.",
            markup.table(["method", "bound", "largest, nat", "of"], bound, words=(0, 3)),
            "Left out:\n\n" + "\n".join(f"- {line}" for line in LEFT_OUT),
        )
    )
