"""What a report of very many cases shows instead of every table: one table a model, and the verdicts that matter."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from harness.records import Row, Verdict
from harness.report import tables
from harness.report.account import FAILING
from harness.report.matrix import NO_TEXT, Section, finite
from harness.report.verdicts import MOVED, verdicts
from harness.report.writing import code, escape
from harness.text import NOTHING, mib, number, plural, ratio

MOST_CASES = 5_000  # of one report with every table: some 2 MB of markdown, more than code hosts render


def is_large(cases: int) -> bool:
    """Whether a report of so many cases leaves its tables out."""
    return cases > MOST_CASES


def left_out(cases: int) -> str:
    """What this report does not show, and where it stands."""
    return (
        f"This report has {plural(cases, 'case')}, more than the {MOST_CASES:,} up to which every figure has its line "
        "and every text its plots. One table a model follows; every figure is in measurements.jsonl, and `python -m "
        "harness report DIR --models NAME` prints the whole report of one model."
    )


def overview(section: Section) -> str:
    """One line a method over all texts: how far its perplexity is from the reference's, bits, storage, verdict."""
    rows = {method: section.rows(method, (*section.texts, NO_TEXT)) for method in section.methods}
    columns: list[tables.Column] = [
        ("texts", lambda method: str(len(ratios(section, method)) or NOTHING)),
        ("ratio to reference, median [least, most]", lambda method: spread(ratios(section, method))),
        ("bits/weight", lambda method: number(tables.bits(section, method))),
        ("storage MiB", lambda method: tables.shown(section.row(method, "memory.storage"), mib)),
        ("cases", lambda method: f"{len(rows[method]):,}"),
        ("missing", lambda method: f"{sum(row.value is None for row in rows[method]):,}"),
        ("verdict", lambda method: tables.verdict(rows[method])),
    ]
    head = f"## {code(section.model)} on {escape(section.device)}"
    notes = [f"> {escape(note)}" for note in section.notes()]
    return "\n\n".join([head, *notes, tables.by_method(section, columns)])


def ratios(section: Section, method: str) -> list[float]:
    """Perplexity over the reference's on each text that has a finite one."""
    if method == section.reference:
        return []
    found = (tables.quality_ratio(section, method, text) for text in section.texts)
    return [ratio for ratio in found if ratio is not None and finite(ratio)]


def spread(values: Sequence[float]) -> str:
    """'1.0012 [0.9990, 1.0100]': median, least and most."""
    return ratio(statistics.median(values), min(values), max(values)) if values else NOTHING


def matters(row: Row) -> bool:
    """Whether a verdict is shown in a report of any size: it failed, or it moved against its record."""
    moved = row.verdict is Verdict.BETTER or row.verdict_baseline in MOVED
    return row.value is not None and (row.verdict in FAILING or moved)


def verdicts_that_matter(rows: Sequence[Row]) -> str:
    """Verdicts case by case, of those that failed or moved."""
    told = [row for row in rows if matters(row)]
    ran = sum(row.value is not None for row in rows)
    opening = f"{len(told):,} of {plural(ran, 'measured case')} failed or moved; the others are in measurements.jsonl."
    return "\n\n".join(part for part in (opening, verdicts(told)) if part)
