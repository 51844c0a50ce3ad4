"""Exact facts that changed: one failure a model, method and device, wherever its cases run. No torch.

Bytes and a census are facts of a model under a method on a device, so that every case of those meets a change of them.
The first of them, in plan order, is `worse` and names what changed; the others keep what their own figure says and
point to it. Who is first follows from the plan, so that workers and shards agree without a word; what they cannot know
of each other (the first one has no figure, bytes that only some cases meet) is settled where their rows come together.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from harness.core import catalog
from harness.core.records import Case, Row, Verdict, quoted
from harness.judge.verdicts import LABEL_WIDTH, SELECTABLE, command

CHANGED = "exact_facts"  # of a row's detail: the changed lines, where they were recorded, and the case that fails
OWN = "own"  # in there, of the row that fails: what its figure says by itself
MOVED = frozenset({Verdict.WORSE, Verdict.BETTER})  # of a figure that is itself among the changed facts


def hold(row: Row, lines: Sequence[str], where: str, first: Case) -> Row:
    """The judged row, held to the recorded facts.

    Args:
        row: judged.
        lines: what changed, one line a fact ('memory.storage on cpu: 1000 -> 1048'); nothing: the row as it is.
        where: file, time and class of the record.
        first: the case that fails for them.
    """
    told: dict[str, Any] = {name: value for name, value in row.detail.items() if name != CHANGED}
    if not lines:
        return replace(row, detail=told) if CHANGED in row.detail else row
    told[CHANGED] = {"lines": list(lines), "recorded": where, "first": first.id}
    row = replace(row, detail=told)
    return _worse(row) if row.case == first else _pointing(row)


def settle(rows: Sequence[Row], elsewhere: Collection[Case] = ()) -> list[Row]:
    """Rows that came together, in plan order, so that one of a group fails.

    Where the case that should have failed has no figure, the next does; of several that fail, the first does.

    Args:
        rows: judged, one a case.
        elsewhere: cases that other shards measure: what fails there fails for these rows too.
    """
    others = {case.id for case in elsewhere}
    failing = {row.case.group: row.case.id for row in reversed(rows) if first_of(row) == row.case.id}
    settled = []
    for row in rows:
        first = first_of(row)
        if first and first not in others:
            now = failing.setdefault(row.case.group, row.case.id)
            row = row if first == now else _handed_over(row, now)
        settled.append(row)
    return settled


def first_of(row: Row) -> str:
    """The id of the case that fails for the exact facts that a row met; '' where they are as recorded."""
    told = row.detail.get(CHANGED) if row.value is not None else None
    return str(told["first"]) if told else ""


def message(row: Row) -> str:
    """The report of the one failure: what changed, where it was recorded, and the commands to measure and record."""
    told, case = row.detail[CHANGED], row.case
    members = [member.name for metric in catalog.metrics().values() for member in metric.members if member.exact]
    group = f"{quoted(case.model)}/{quoted(case.method)}/"
    alone = ("-k", group) if SELECTABLE.fullmatch(group) else ()  # the reference is planned beside it
    exact = replace(row, metric=",".join(members), dataset="", protocol="", protocol_id="")
    lines = [
        *(("changed", line) for line in told["lines"]),
        ("recorded", told["recorded"]),
        ("reason", row.reason),
        ("measure", command(row)),
        ("record", command(exact, "--regen-all", *alone)),
    ]
    shown = (f"  {name:<{LABEL_WIDTH}}{text}" for name, text in lines)
    return "\n".join([f"{row.verdict}: {case.id}: exact facts changed", *shown])


def _handed_over(row: Row, now: str) -> Row:
    """A row for whose facts another case fails than it said."""
    told, first = row.detail[CHANGED], first_of(row)
    if first == row.case.id:
        if OWN not in told:  # of a report of before it was noted: nobody knows what the figure says by itself
            return row
        verdict, baseline, reason = told[OWN]
        row = replace(row, verdict=Verdict(verdict), verdict_baseline=baseline and Verdict(baseline), reason=reason)
    else:
        row = replace(row, reason=row.reason.removesuffix(_see(first)).removesuffix("; "))
    kept = {name: value for name, value in told.items() if name != OWN}
    row = replace(row, detail={**row.detail, CHANGED: {**kept, "first": now}})
    return _worse(row) if now == row.case.id else _pointing(row)


def _pointing(row: Row) -> Row:
    """The row with what its own figure says, and a word on the case that fails for its facts."""
    lines, first = row.detail[CHANGED]["lines"], first_of(row)
    if any(line.startswith(f"{row.metric} on ") for line in lines) and row.verdict_baseline in MOVED:
        # what it says of the record is what the first one fails for
        row = replace(row, verdict=row.verdict_reference or Verdict.UNRECORDED, verdict_baseline=None)
    return replace(row, reason="; ".join(filter(None, (row.reason, _see(first)))))


def _worse(row: Row) -> Row:
    told = {**row.detail[CHANGED], OWN: [row.verdict, row.verdict_baseline, row.reason]}
    text = f"exact facts differ from the record: {'; '.join(told['lines'])} ({told['recorded']})"
    verdict = min((Verdict.WORSE, row.verdict), key=lambda word: word.severity)
    reason = "; ".join(filter(None, (text, row.reason)))
    detail = {**row.detail, CHANGED: told}
    return replace(row, verdict=verdict, verdict_baseline=Verdict.WORSE, reason=reason, detail=detail)


def _see(first: str) -> str:
    return f"exact facts changed: see {first}"
