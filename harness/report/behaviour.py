"""Invariants in reports: how two sides' behaviour is compared, and what a session's report says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from harness.records import Row, Verdict
from harness.report import writing
from harness.report.decisions import Entry
from harness.report.writing import code, escape, plural, table

FAMILY = "invariant"
FACTOR = 2.0  # of two figures that both break a limit: less apart is the same break under other rounding


def holds(row: Row) -> bool:
    """Whether the invariant held."""
    return row.detail.get("holds") is True


def seen(row: Row) -> str:
    """What was seen, in a few words: 'holds', the exception, or the figure."""
    if row.value is None:
        return str(Verdict.MISSING)
    exception = str(row.detail.get("exception", ""))
    return "holds" if holds(row) else exception or writing.number(row.value, 3)


def behaved(blank: Entry) -> Entry:
    """An invariant on both sides: kept, lost, regained, or broken on both alike or otherwise."""
    a, b = blank.a, blank.b
    fault = f"; known as {b.detail['fault']} ({b.detail.get('reference', '')})" if b.detail.get("fault") else ""
    if holds(a) and holds(b):
        return replace(blank, verdict=Verdict.SAME, reason="holds on both sides")
    if holds(a) or holds(b):
        verdict, words = (Verdict.WORSE, "no longer holds") if holds(a) else (Verdict.BETTER, "holds again")
        return replace(blank, verdict=verdict, reason=f"{words}: {seen(a)} -> {seen(b)}{fault}")
    raised = [bool(row.detail.get("exception")) for row in (a, b)]
    told = f"holds on neither side: {seen(a)} -> {seen(b)}{fault}"
    if raised[0] != raised[1]:
        return replace(blank, verdict=Verdict.BETTER if raised[0] else Verdict.WORSE, reason=told)
    if raised[0] or a.value is None or b.value is None or a.value == b.value:
        return replace(blank, verdict=Verdict.SAME, reason=told)
    if a.detail.get("fault") and a.detail.get("fault") == b.detail.get("fault"):  # both within the range that is listed
        return replace(blank, verdict=Verdict.WITHIN_NOISE, reason=told)
    apart = Verdict.WORSE if b.value > FACTOR * a.value else Verdict.BETTER if a.value > FACTOR * b.value else None
    return replace(blank, verdict=apart or Verdict.WITHIN_NOISE, reason=told)


def section(rows: Sequence[Row]) -> str:
    """What a session's report says of its invariants; "" where it measured none."""
    found = [row for row in rows if row.case.family == FAMILY]
    if not found:
        return ""
    told = [row for row in found if not (row.value is not None and holds(row) and row.verdict is not Verdict.BETTER)]
    kept = len(found) - len(told)
    opening = f"{kept:,} of {plural(len(found), 'check')} hold. Those that do not, and known faults that are gone:"
    if not told:
        return f"All of {plural(len(found), 'check')} hold."
    lines = [
        [code(row.method), code(row.model), code(row.metric), escape(seen(row)), str(row.verdict), escape(row.reason)]
        for row in told
    ]
    return f"{opening}\n\n" + table(["method", "on", "invariant", "seen", "verdict", "why"], lines, words=range(6))
