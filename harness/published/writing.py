"""Judgements as plain entries, and entries as a terminal table and as a section of markdown.

An entry holds all that a reader is shown, so that a report can be made anew from published.json, without torch.
Published ratios of times stand beside those measured here: a ratio is the only part of a time that travels at all.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from itertools import groupby
from pathlib import Path
from typing import Any

from tabulate import tabulate

from harness.core.records import Row
from harness.core.specification import parse
from harness.core.text import mib
from harness.core.values import decode_number, encode
from harness.judge import baselines
from harness.published import origins
from harness.published.counting import describe
from harness.published.judging import Finding, Judgement

LINE_WIDTH = 160  # of a sentence in the terminal
METHOD_WIDTH = 22  # of the terminal's second column
NOTE_WIDTH = 72  # of the terminal's last column: the whole line stays under 200 characters
FIGURES = 6  # significant digits of our number where the claim prints none
HEADERS = ("part", "method", "metric", "published", "true", "ours", "storage MiB", "verdict", "why")
RULE = "|:--|:--|:--|--:|--:|--:|--:|:--|:--|"
RATIOS = ("report", "method", "published time", "ratio", "ours [95%]", "of", "why they differ")
RATIO_RULE = "|:--|:--|--:|--:|--:|:--|:--|"
EMBEDDED = "smollm2-135m"  # whose recorded figures stand beside published ones where no session is named
INSTEAD: Mapping[str, tuple[str, ...]] = {  # what a report timed -> members of `latency`, the nearest first
    "forward": ("latency.forward", "latency.prefill"),
    "generate": ("latency.generate", "latency.decode"),
    "evaluation": ("latency.evaluation", "latency.forward", "latency.prefill"),
}
SIMILAR = 1.1  # two ratios within 10% are called alike: reports print no intervals

PAGE_HEADING = """\
# Published figures, computed again

Made by `python -m harness published --markdown > docs/published.md`, from the claims that ship with the package, the
architectures, and the times recorded in `baselines` alone. Where the reports do not say what they did, their programs
do: each report is told first in words (what was claimed, what was computed, what the right figure is), then figure by
figure. *Published* is as printed. *True* is the perplexity or the time that the printed figure stands for by the rule
of its program, with its ratio to the true reference. *Ours* is what we computed; *reproduced* is to the last printed
digit. *Storage* is every byte that the corresponding method of ours holds, quantization state included; the last column
adds up the difference to the published figure. The faults by name are shown one by one in
[studies/pitfalls.md](studies/pitfalls.md). Figures of your own go through the same mill: [claims.md](claims.md).
"""

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Ratio:
    """A method's time over the reference's: geometric centre and 95% limits."""

    value: float
    low: float
    high: float
    metric: str  # member of `latency`
    where: str  # model and device


Measured = Mapping[tuple[str, str], Ratio]  # by method name and member of `latency`


def entry(judgement: Judgement) -> dict[str, Any]:
    """One judgement; numbers in the claim's unit, infinities as text, `ours` null where there is none."""
    claim, ours, printed = judgement.claim, judgement.ours, ""
    if ours is not None:
        as_claimed = judgement.finding is Finding.REPRODUCED or claim.digits
        printed = str(ours.quantize(Decimal(1).scaleb(-claim.digits))) if as_claimed else f"{ours:.{FIGURES}g}"
    given = {
        "id": claim.id,
        "report": claim.report.name,
        "title": claim.report.heading,
        "told": claim.report.told,
        "known_from": known_from(claim.report.provenance),
        "model": claim.report.model,
        "text": claim.report.text,
        "protocol": claim.report.protocol,
        "timed": claim.report.timed if claim.unit in ("s", "ms") else "",
        "timing": claim.report.timing,
        "part": claim.part,
        "method": claim.method,
        "metric": claim.metric,
        "published": float(claim.value),
        "unit": claim.unit,
        "convention": describe(claim.convention) if claim.convention else "",
        "ours": None if ours is None else float(ours),
        "verdict": str(judgement.finding),
        "note": judgement.note,
        "command": judgement.command,
        "printed": claim.published,
        "ours_printed": printed,
        "specification": claim.specification,
        "storage_bytes": judgement.storage,
        "published_ratio": None if judgement.ratio is None else float(judgement.ratio),
        "true": None if judgement.true is None else float(judgement.true),
        "true_ratio": None if judgement.true_ratio is None else float(judgement.true_ratio),
        "true_unit": "s" if claim.unit in ("s", "ms") else claim.unit,
        "rule": origins.words(claim.rule) if claim.rule else "",
    }
    encoded: dict[str, Any] = encode(given)
    return encoded


def known_from(origin: origins.Origin) -> str:
    """Where what is known of a report is known from, and what no source says; "" where nothing is."""
    parts = [
        f"Known from {origin.program}" if origin.program else "",
        f"its outputs {origin.outputs}" if origin.outputs else "",
        origin.libraries,
        origin.device,
        f"no source says: {', '.join(origin.open)}" if origin.open else "",
    ]
    return "; ".join(part for part in parts if part)


def of_rows(rows: Iterable[Row]) -> Measured:
    """The ratios of a session's rows; of a method's specifications the bare name, else the first, stands for it."""
    found: dict[tuple[str, str], Ratio] = {}
    for row in sorted(rows, key=lambda row: ":" in row.method):
        if row.value is not None and row.metric.startswith("latency."):
            _put(found, row.method, row.metric, row.detail, f"{row.model}, {row.device}")
    return found


def of_baselines(folder: Path) -> Measured:
    """The ratios recorded for the embedded model's bare methods, of several the newest."""
    found: dict[tuple[str, str], Ratio] = {}
    files = [(path, baselines.read_overlay(path)[1]) for path in baselines.overlays(folder / EMBEDDED)]
    entries = [(entry, path.name.partition("@")[0]) for path, entries in files for entry in entries]
    for entry, bare in sorted(entries, key=lambda pair: pair[0].recorded, reverse=True):
        if entry.method_id.partition(":")[0] == bare and entry.metric.startswith("latency."):
            world = entry.environment
            chip = world.gpu or f"{world.cpu} ({world.instructions}), {world.threads} threads"
            where = f"{EMBEDDED}, {chip}, recorded {entry.recorded[:10]}"
            _put(found, entry.method_id, entry.metric, entry.detail, where)
    return found


def _put(found: dict[tuple[str, str], Ratio], method: str, metric: str, detail: Mapping[str, Any], where: str) -> None:
    limits = [detail.get(name) for name in ("log_ratio", "log_ratio_low", "log_ratio_high")]
    if all(isinstance(limit, (int, float)) and math.isfinite(limit) for limit in limits):
        value, low, high = (math.exp(float(limit)) for limit in limits if limit is not None)
        found.setdefault((parse(method).name, metric), Ratio(value, low, high, metric, where))


def beside(entries: Sequence[Entry], measured: Measured) -> list[dict[str, Any]]:
    """The entries, each published ratio of times with ours beside it and the reason where the two differ."""
    told = []
    for entry in entries:
        timed, name = entry.get("timed", ""), str(entry.get("specification", "")).partition(":")[0]
        ours = next((measured[name, metric] for metric in INSTEAD.get(timed, ()) if (name, metric) in measured), None)
        if ours is None or ratio_of(entry) is None:
            told.append({**entry, "our_ratio": None})
        else:
            told.append({**entry, "our_ratio": asdict(ours), "why_ratio": why(entry, ours, name)})
    return told


def ratio_of(entry: Entry) -> float | None:
    """A time's ratio to its reference: by the run's other outputs where they tell it, else as published."""
    found = entry.get("true_ratio") if entry.get("true_ratio") is not None else entry.get("published_ratio")
    return None if found is None else float(decode_number(found))


def why(entry: Entry, ours: Ratio, name: str) -> str:
    """Whether the ratios are alike, and what is known to separate them."""
    published, timed = ratio_of(entry) or math.nan, entry["timed"]
    if ours.low <= published <= ours.high or max(published / ours.value, ours.value / published) <= SIMILAR:
        return "alike"
    here, there = ("faster" if ratio < 1 else "slower" for ratio in (ours.value, published))
    times = f"{here} in both, {ours.value / published:.2g} times the published ratio here"
    parts = [times if here == there else f"{there} there, {here} here"]
    if entry.get("verdict") == "refuted" and entry.get("true_ratio") is None:
        parts.append("the published times are none of what they are called, so their ratio says nothing of it")
    kernels = "bitsandbytes has kernels for cards that read its codes, and others for processors"
    others = "an implementation of its own there, ours here, on hardware that the report does not name"
    parts.append(kernels if name.startswith("bnb-") else others)
    if entry.get("timing"):
        parts.append(str(entry["timing"]))
    if any(word in str(entry.get("specification")) for word in ("names=", "layers=")):
        parts.append("ours with every projection quantized")
    if ours.metric != f"latency.{timed}":
        parts.append(f"{ours.metric} stands in for the report's {timed}")
    parts.append(f"{entry.get('model')} there, another model here")
    return "; ".join(parts)


def summary(entries: Sequence[Entry]) -> str:
    """How many figures got which verdict, and the memory figures by themselves."""
    counts = Counter(entry["verdict"] for entry in entries)
    memory = [entry["verdict"] for entry in entries if entry["metric"] == "memory"]
    words = ", ".join(f"{counts[finding]} {finding}" for finding in Finding if counts[finding])
    reproduced = memory.count(Finding.REPRODUCED)
    return f"{len(entries)} figures: {words}. Memory: {reproduced} of {len(memory)} figures reproduced."


def table(entries: Sequence[Entry]) -> str:
    """For a terminal: one line a figure, notes wrapped, reports apart; then the ratios of times."""
    parts = []
    for _, group in groupby(entries, key=lambda entry: entry["report"]):
        found = list(group)
        parts.append(f"{_title(found[0])}\n{_terminal(HEADERS, list(map(_cells, found)), RULE)}")
    if timed := _timed(entries):
        written = _terminal(RATIOS, list(map(_ratio_cells, timed)), RATIO_RULE)
        parts.append(f"{textwrap.fill(_where(timed), LINE_WIDTH)}\n{written}")
    return "\n\n".join([*parts, summary(entries)])


def _terminal(headers: Sequence[str], lines: Sequence[Sequence[str]], rule: str) -> str:
    """A table with its columns aligned as markdown's rule says, its last column wrapped."""
    widths = [None, METHOD_WIDTH, *[None] * (len(headers) - 3), NOTE_WIDTH]
    sides = ["right" if cell.endswith(":") else "left" for cell in rule.strip("|").split("|")]
    return tabulate(lines, headers, tablefmt="simple", maxcolwidths=widths, disable_numparse=True, colalign=sides)


def section(entries: Sequence[Entry]) -> str:
    """Markdown without a heading of its own level 2: the counts, the ratios of times, then one table a report."""
    parts = [summary(entries)]
    if timed := _timed(entries):
        parts += [
            "### Ratios of times",
            _escape(_where(timed)),
            _markdown(RATIOS, map(_ratio_cells, timed), RATIO_RULE),
        ]
    for _, group in groupby(entries, key=lambda entry: entry["report"]):
        found = list(group)
        parts.append(f"### {_escape(_title(found[0]))}")
        told, known = (str(found[0].get(name) or "") for name in ("told", "known_from"))
        parts += [_escape(" ".join(paragraph.split())) for paragraph in told.split("\n\n") if paragraph.strip()]
        parts.append(f"Text: {_escape(found[0]['text'])}. Protocol: {_escape(found[0]['protocol'])}.")
        parts += [f"{_escape(known)}."] * bool(known)
        parts.append(_markdown(HEADERS, map(_cells, found), RULE))
    return "\n\n".join(parts) + "\n"


def _title(entry: Entry) -> str:
    return str(entry.get("title") or f"Report {entry['report']}: {entry['model']}")


def _markdown(headers: Sequence[str], lines: Iterable[Sequence[str]], rule: str) -> str:
    """A table, unpadded: the last column is long."""
    rows = [f"| {' | '.join(map(_escape, line))} |" for line in lines]
    return "\n".join([f"| {' | '.join(headers)} |", rule, *rows])


def page(entries: Sequence[Entry]) -> str:
    """docs/published.md."""
    return f"{PAGE_HEADING}\n{section(entries)}"


def _timed(entries: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry.get("our_ratio")]


def _where(timed: Sequence[Entry]) -> str:
    places = dict.fromkeys(entry["our_ratio"]["where"] for entry in timed)
    return (
        "A time belongs to its machine; a ratio to the unquantized reference on the same machine is all that can be "
        f"compared. Beside the published ones, ours on {' and '.join(places)}."
    )


def _ratio_cells(entry: Entry) -> list[str]:
    ours = entry["our_ratio"]
    value, low, high = (float(decode_number(ours[name])) for name in ("value", "low", "high"))
    return [
        entry["report"],
        f"{entry['method']} ({entry['part']})",
        f"{float(entry['printed']):.4g} {entry['unit']}",
        _ratio_cell(entry),
        f"{value:.3f} [{low:.3f}, {high:.3f}]",
        ours["metric"],
        entry["why_ratio"],
    ]


def _ratio_cell(entry: Entry) -> str:
    """The ratio, and the printed one where the run's other outputs tell another."""
    ratio, printed = ratio_of(entry), entry.get("published_ratio")
    other = f" (printed {float(decode_number(printed)):.3f})" if entry.get("true_ratio") is not None else ""
    return f"{ratio:.3f}{other}"


def _true_cell(entry: Entry) -> str:
    """What the printed figure stands for, with its ratio."""
    if entry.get("true") is None:
        return ""
    value = float(decode_number(entry["true"]))
    unit = entry.get("true_unit", "")
    shown = f"{value:.4f}" if unit == "ppl" else f"{value:.4g} {unit}"
    ratio = entry.get("true_ratio")
    return shown if ratio is None else f"{shown} (x{float(decode_number(ratio)):.4f})"


def _cells(entry: Entry) -> list[str]:
    storage = entry.get("storage_bytes")
    return [
        entry["part"],
        entry["method"],
        entry["metric"],
        f"{entry['printed']} {entry['unit']}",
        _true_cell(entry),
        entry.get("ours_printed", ""),
        mib(storage) if storage is not None else "",
        entry["verdict"],
        entry["note"],
    ]


def _escape(text: str) -> str:
    return re.sub(r"([\\`*|\[\]<~$])", r"\\\1", re.sub(r"\s", " ", text))
