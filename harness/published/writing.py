"""Judgements as plain entries, and entries as a terminal table, as JSON and as a section of markdown.

An entry holds all that a reader is shown, so that a report can be made anew from published.json, without torch.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from decimal import Decimal
from itertools import groupby
from typing import Any

from tabulate import tabulate

from harness.core.text import mib
from harness.core.values import decode_number, encode
from harness.published.counting import describe
from harness.published.judging import Finding, Judgement

LINE_WIDTH = 160  # of a sentence in the terminal
NOTE_WIDTH = 72  # of the terminal's last column: the whole line stays under 200 characters
FIGURES = 6  # significant digits of our number where the claim prints none
HEADERS = ("part", "method", "metric", "published", "ours", "storage MiB", "verdict", "why")
RULE = "|:--|:--|:--|--:|--:|--:|:--|:--|"
RATIOS = ("report", "method", "published time", "ratio", "ours [95%]", "of", "why they differ")
RATIO_RULE = "|:--|:--|--:|--:|--:|:--|:--|"

PAGE_HEADING = """\
# Published figures, computed again

Made by `python -m harness published --markdown > docs/published.md`, from the claims in `baselines/published`, the
architectures, and the times recorded in `baselines` alone. *Reproduced* is to the last printed digit. *Storage* is
every byte that the corresponding method of ours holds, quantization state included; the last column adds up the
difference to the published figure.
"""

Entry = Mapping[str, Any]


def entry(judgement: Judgement) -> dict[str, Any]:
    """One judgement; numbers in the claim's unit, infinities as text, `ours` null where there is none."""
    claim = judgement.claim
    given = {
        "id": claim.id,
        "report": claim.report.name,
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
        "ours": None if judgement.ours is None else float(judgement.ours),
        "verdict": str(judgement.finding),
        "note": judgement.note,
        "command": judgement.command,
        "printed": claim.published,
        "ours_printed": _ours(judgement),
        "specification": claim.specification,
        "storage_bytes": judgement.storage,
        "published_ratio": None if judgement.ratio is None else float(judgement.ratio),
    }
    encoded: dict[str, Any] = encode(given)
    return encoded


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
    for name, group in groupby(entries, key=lambda entry: entry["report"]):
        lines = [[*_cells(entry), entry["note"]] for entry in group]
        widths = [None, 22, None, None, None, None, None, NOTE_WIDTH]
        written = tabulate(
            lines, HEADERS, tablefmt="simple", maxcolwidths=widths, disable_numparse=True,
            colalign=("left", "left", "left", "right", "right", "right", "left", "left"),
        )  # fmt: skip
        parts.append(f"{name}\n{written}")
    if timed := _timed(entries):
        lines = [_ratio_cells(entry) for entry in timed]
        widths = [None, 22, None, None, None, None, NOTE_WIDTH]
        written = tabulate(
            lines, RATIOS, tablefmt="simple", maxcolwidths=widths, disable_numparse=True,
            colalign=("left", "left", "right", "right", "right", "left", "left"),
        )  # fmt: skip
        parts.append(f"{textwrap.fill(_where(timed), LINE_WIDTH)}\n{written}")
    return "\n\n".join([*parts, summary(entries)])


def section(entries: Sequence[Entry]) -> str:
    """Markdown without a heading of its own level 2: the counts, the ratios of times, then one table a report."""
    parts = [summary(entries)]
    if timed := _timed(entries):
        lines = [_line([_escape(cell) for cell in _ratio_cells(entry)]) for entry in timed]
        parts += ["### Ratios of times", _escape(_where(timed)), "\n".join([_line(RATIOS), RATIO_RULE, *lines])]
    for name, group in groupby(entries, key=lambda entry: entry["report"]):
        found = list(group)
        parts.append(f"### Report {_escape(name)}: {_escape(found[0]['model'])}")
        parts.append(f"Text: {_escape(found[0]['text'])}. Protocol: {_escape(found[0]['protocol'])}.")
        lines = [_line([_escape(cell) for cell in (*_cells(entry), entry["note"])]) for entry in found]
        parts.append("\n".join([_line(HEADERS), RULE, *lines]))
    return "\n\n".join(parts) + "\n"


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
        f"{float(decode_number(entry['published_ratio'])):.3f}",
        f"{value:.3f} [{low:.3f}, {high:.3f}]",
        ours["metric"],
        entry["why_ratio"],
    ]


def _line(cells: Sequence[str]) -> str:
    """A row of a markdown table, unpadded: the last column is long."""
    return f"| {' | '.join(cells)} |"


def _cells(entry: Entry) -> list[str]:
    storage = entry.get("storage_bytes")
    return [
        entry["part"],
        entry["method"],
        entry["metric"],
        f"{entry['printed']} {entry['unit']}",
        entry.get("ours_printed", ""),
        mib(storage) if storage is not None else "",
        entry["verdict"],
    ]


def _ours(judgement: Judgement) -> str:
    if judgement.ours is None:
        return ""
    if judgement.finding is Finding.REPRODUCED or judgement.claim.digits:
        return str(judgement.ours.quantize(Decimal(1).scaleb(-judgement.claim.digits)))
    return f"{judgement.ours:.{FIGURES}g}"


def _escape(text: str) -> str:
    return re.sub(r"([\\`*|\[\]<~$])", r"\\\1", re.sub(r"\s", " ", text))
