"""Every verdict by itself: both comparisons, the change, the smallest effect that could have been seen, the look-up.

What a session's report says of its invariants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.core.records import Row, Verdict
from harness.core.text import NOTHING, percent, plural
from harness.core.values import decode_number
from harness.judge.two_reports import INVARIANT, holds, seen
from harness.report.markup import code, escape, table

LIMITS = """\
*Against the record*: a change of the recorded figure, for losses and times in percent with its 95% interval, paired
token by token; *smallest effect* is what nine of ten sessions with this spread would have called, and of an exact
figure the smallest step. At most 5% of sessions in which nothing changed raise an alarm: every test has its share of
it, and Holm's step-down settles the session. A perplexity against the reference is exact on this text: no test."""
MOVED, OTHER = (Verdict.WORSE, Verdict.BETTER), Verdict.NOT_COMPARABLE


def verdicts(rows: Sequence[Row]) -> str:
    """One line a measured case; "" where none was measured."""
    found = [row for row in rows if row.value is not None]
    if not found:
        return ""
    lines = [
        [
            code(row.model),
            code(row.method),
            code(row.metric) + (f" {code(row.dataset)} {code(row.protocol)}" if row.dataset else ""),
            str(row.verdict_reference or NOTHING),
            str(row.verdict_baseline or NOTHING),
            change(row),
            escape(str(row.detail.get("smallest", ""))) or NOTHING,
            code(row.baseline) if row.baseline else NOTHING,
        ]
        for row in found
    ]
    headers = ["model", "method", "metric", "against the reference", "against the record"]
    headers += ["change [95%]", "smallest effect", "looked up in"]
    parts = [LIMITS, table(headers, lines, words=(0, 1, 2, 3, 4, -1)), *stopped(found), *differences(found)]
    return "\n\n".join(parts)


def change(row: Row) -> str:
    """The change against the record in percent, with its interval."""
    told: Any = row.detail.get("change")
    if not isinstance(told, Mapping):
        return NOTHING
    value, low, high = (percent(float(decode_number(told[name]))) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def stopped(rows: Sequence[Row]) -> list[str]:
    """What early-stopped cases read, and what they know: bullets."""
    lines = []
    for row in rows:
        if "tokens_used" in row.detail and row.interval is not None:
            used, available = row.detail["tokens_used"], row.detail["tokens_available"]
            why = f"; {escape(row.detail['why_whole'])}" if row.detail.get("why_whole") else ""
            end = (
                f"stopped at '{row.detail['decided']}' with {row.interval[0]:+.5f} to {row.interval[1]:+.5f} nat"
                if row.stopped_early
                else "undecided before its end"
            )
            lines.append(
                f"- {code(row.model)}, {code(row.method)}: {used:,} of {available:,} tokens used "
                f"({100 * used / available:.0f}%), {end}{why}"
            )
    return ["Read early (`--stop-early`), windows in their seeded order:\n\n" + "\n".join(lines)] if lines else []


def differences(rows: Sequence[Row]) -> list[str]:
    """How the record's environment differs from this one, line by line, wherever something moved or may not compare."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        lines = row.detail.get("environment_difference")
        if lines is not None and (row.verdict_baseline in MOVED or (lines and row.verdict_baseline is OTHER)):
            groups.setdefault(tuple(row.detail["environment_difference"]), []).append(row)
    parts = []
    for lines, found in groups.items():
        names = ", ".join(dict.fromkeys(f"{code(row.method)} {code(row.metric)}" for row in found))
        blamed = (
            " The unquantized reference itself moved." if any("itself moved" in row.reason for row in found) else ""
        )
        head = f"Recorded in another environment than {plural(len(found), 'case')} that moved or may not compare "
        head += f"({names}):{blamed}"
        if not lines:
            head = f"Recorded in this very environment, and moved ({names}): no version or processor did it.{blamed}"
        parts.append("\n".join([head, *(["", *(f"- {escape(line)}" for line in lines)] if lines else [])]))
    return parts


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
