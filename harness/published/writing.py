"""Judgements as a terminal table, as JSON and as a section of markdown."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from itertools import groupby
from typing import Any

from tabulate import tabulate

from harness.published.conventions import describe
from harness.published.judging import Finding, Judgement
from harness.records import encode

MIB = 2**20
NOTE_WIDTH = 72  # of the terminal's last column: the whole line stays under 200 characters
FIGURES = 6  # significant digits of our number where the claim prints none
HEADERS = ("part", "method", "metric", "published", "ours", "storage MiB", "verdict", "why")
RULE = "|:--|:--|:--|--:|--:|--:|:--|:--|"


def as_json(judgements: Sequence[Judgement]) -> str:
    """`{"claims": [...]}`; numbers in the claim's unit, infinities as text, `ours` null where there is none."""
    return json.dumps({"claims": [_entry(judgement) for judgement in judgements]}, indent=1, allow_nan=False)


def _entry(judgement: Judgement) -> dict[str, Any]:
    claim = judgement.claim
    entry = {
        "report": claim.report.name,
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
        "specification": claim.specification,
        "storage_bytes": judgement.storage,
    }
    encoded: dict[str, Any] = encode(entry)
    return encoded


def summary(judgements: Sequence[Judgement]) -> str:
    """How many figures got which verdict, and the memory figures by themselves."""
    counts = Counter(judgement.finding for judgement in judgements)
    memory = [judgement for judgement in judgements if judgement.claim.metric == "memory"]
    reproduced = sum(judgement.finding is Finding.REPRODUCED for judgement in memory)
    words = ", ".join(f"{counts[finding]} {finding}" for finding in Finding if counts[finding])
    return f"{len(judgements)} figures: {words}. Memory: {reproduced} of {len(memory)} figures reproduced."


def table(judgements: Sequence[Judgement]) -> str:
    """For a terminal: one line a figure, notes wrapped, reports apart."""
    parts = []
    for name, group in groupby(judgements, key=lambda judgement: judgement.claim.report.name):
        lines = [[*_cells(judgement), judgement.note] for judgement in group]
        widths = [None, 22, None, None, None, None, None, NOTE_WIDTH]
        written = tabulate(
            lines, HEADERS, tablefmt="simple", maxcolwidths=widths, disable_numparse=True,
            colalign=("left", "left", "left", "right", "right", "right", "left", "left"),
        )  # fmt: skip
        parts.append(f"{name}\n{written}")
    return "\n\n".join([*parts, summary(judgements)])


def section(judgements: Sequence[Judgement]) -> str:
    """Markdown without a heading of its own level 2: the counts, then one table a report."""
    parts = [summary(judgements)]
    for name, group in groupby(judgements, key=lambda judgement: judgement.claim.report.name):
        found = list(group)
        report = found[0].claim.report
        parts.append(f"### Report {name}: {_escape(report.model)}")
        parts.append(f"Text: {_escape(report.text)}. Protocol: {_escape(report.protocol)}.")
        lines = [_line([_escape(cell) for cell in (*_cells(judgement), judgement.note)]) for judgement in found]
        parts.append("\n".join([_line(HEADERS), RULE, *lines]))
    return "\n\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    """A row of a markdown table, unpadded: the last column is long."""
    return f"| {' | '.join(cells)} |"


def _cells(judgement: Judgement) -> list[str]:
    claim = judgement.claim
    return [
        claim.part,
        claim.method,
        claim.metric,
        f"{claim.published} {claim.unit}",
        _ours(judgement),
        f"{judgement.storage / MIB:,.2f}" if judgement.storage is not None else "",
        str(judgement.finding),
    ]


def _ours(judgement: Judgement) -> str:
    if judgement.ours is None:
        return ""
    if judgement.finding is Finding.REPRODUCED or judgement.claim.digits:
        return str(judgement.ours.quantize(Decimal(1).scaleb(-judgement.claim.digits)))
    return f"{judgement.ours:.{FIGURES}g}"


def _escape(text: str) -> str:
    return re.sub(r"([\\`*|\[\]<~$])", r"\\\1", text)
