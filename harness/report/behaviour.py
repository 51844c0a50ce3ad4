"""What a session's report says of its invariants."""

from __future__ import annotations

from collections.abc import Sequence

from harness.records import Row, Verdict
from harness.report.writing import code, escape, table
from harness.text import plural
from harness.two_reports import INVARIANT, holds, seen


def section(rows: Sequence[Row]) -> str:
    """What a session's report says of its invariants; "" where it measured none."""
    found = [row for row in rows if row.case.family == INVARIANT]
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
