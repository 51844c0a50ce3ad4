"""Timing that several processes take in turn, the measuring side: one repetition when asked, a row at the end.

Two versions of a library cannot live in one process, so that the interleaved blocks of `timing` are driven from
outside: each process holds its model and its prepared work, and runs one repetition a request.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from harness.core import catalog
from harness.core.catalog import member_of
from harness.core.errors import HarnessError
from harness.core.records import Figure, Row, Verdict
from harness.metrics.measuring.timing import Work
from harness.run.group import Group
from harness.run.messages import Reply, Turn

_prepared: WeakKeyDictionary[Group, dict[str, tuple[dict[str, int], Work]]] = WeakKeyDictionary()


def answer(group: Group, turn: Turn) -> Reply:
    """Seconds of one repetition, or with a figure the row of the whole timing."""
    group.case = turn.case
    if turn.figure is not None:
        row = row_of(group, turn.figure)
        return Reply("row", row=row, data=group.environment.to_dict())
    with torch.inference_mode():
        lengths, work = prepared(group, turn.case.metric)
        *_, seconds = group.device.time(*[work] * (turn.lead + 1))
    return Reply("seconds", data={"seconds": seconds, **lengths, "threads": torch.get_num_threads()})


def prepared(group: Group, metric: str) -> tuple[dict[str, int], Work]:
    """The token counts and the work of a timed metric, made once a process: a prompt's cache is kept with it."""
    known = _prepared.setdefault(group, {})
    if metric not in known:
        member = member_of(group.case)
        build = catalog.metrics()[group.case.family].work
        if build is None:
            raise HarnessError(f"{metric} is no timed metric: it cannot be taken in turn")
        lengths, make = build(group, member)
        known[metric] = lengths, make(group.model)
    return known[metric]


def row_of(group: Group, figure: Figure) -> Row:
    """The row of a figure that was taken in turn with other processes: it is judged beside theirs, not alone."""
    plan = group.plan if group.case.dataset else None
    text = {"protocol_id": plan.protocol_id, "token_hash": plan.token_hash} if plan else {}
    return Row.of(
        group.case,
        **text,
        revision=group.checkpoint.revision,
        method_id=group.method_id,
        value=figure.value,
        unit=figure.unit,
        count=figure.count,
        spread=figure.spread,
        samples=figure.samples,
        detail=figure.detail,
        census=group.census,
        bits_per_weight=group.census.get("bits_per_weight"),
        environment=group.environment.id,
        seconds=round(sum(figure.samples), 3),
        key=group.key(group.case),
        verdict=Verdict.UNRECORDED,
        reason="timed in turn with the other sides: judged in their comparison",
    )
