"""Timing interleaved over processes: blocks of one repetition a side, one figure each.

Two versions of a library cannot live in one process, so that the interleaved blocks of `timing` are driven from
outside: each process holds its model and its prepared work, and runs one repetition a request (`answer`), which
`interleave` asks for. As in `timing`, and by its warm-up: a block holds one timed repetition of every side, the order
of the sides is reversed from block to block, and block i of each side's samples was taken next to block i of the
others'. A side sleeps while another works, so that a repetition finds the caches full of another process's data: one
untimed repetition leads, except where a repetition is long beside that.
"""

from __future__ import annotations

import statistics
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from harness.core import catalog
from harness.core.errors import HarnessError
from harness.core.records import Case, Figure, Row, Verdict
from harness.core.stats import summarise
from harness.metrics.measuring.timing import FEWEST_BLOCKS, Warmup, Work, aa_floor, warm_up
from harness.run.messages import Repetition, Reply

if TYPE_CHECKING:
    from harness.run.group import Group

SLOW_SECONDS = 2.0  # a repetition: no further warm-up, and no more than FEWEST_BLOCKS blocks
LEAD_BELOW_SECONDS = 0.5  # refilling 50 MiB of caches takes some 10 ms: 2% of this, and less of what is longer
WARMUP_LIMIT = 6  # repetitions; each side's process has run whole windows of text before

Ask = Callable[[Repetition], Any]
_prepared: WeakKeyDictionary[Group, dict[str, tuple[dict[str, int], Work]]] = WeakKeyDictionary()


@dataclass
class Stream:
    """One side's repetitions of one case."""

    ask: Ask
    case: Case
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    warmup: Warmup = field(default_factory=lambda: Warmup(0, settled=False))
    trouble: str = ""  # why it was given up, in one line

    @property
    def lead(self) -> int:
        """Untimed repetitions in front of each timed one."""
        return int(not self.seconds or statistics.median(self.seconds) < LEAD_BELOW_SECONDS)

    def repeat(self, lead: int = 0) -> float:
        """One repetition's seconds."""
        facts = dict(self.ask(Repetition(self.case, lead)))
        seconds = float(facts.pop("seconds"))
        self.facts = facts
        return seconds

    def warm(self) -> None:
        """Until it settles; what was seen decides whether repetitions get a lead."""
        seen: list[float] = []

        def clock(*works: Work) -> list[float]:
            seen.extend(float(str(work.run())) for work in works)
            return seen[-len(works) :]

        self.warmup = warm_up(Work(self.repeat), clock, limit=WARMUP_LIMIT, slow=SLOW_SECONDS)
        self.seconds = seen[1:] or seen

    def attempt(self, step: Callable[[], None]) -> None:
        """Run a step; a failure gives the stream up, with its reason."""
        if self.trouble:
            return
        try:
            step()
        except HarnessError as error:
            self.trouble = str(error)


def interleave(asks: Mapping[str, Ask], case: Case, blocks: int) -> dict[str, Figure | str]:
    """Time a case on every side.

    Args:
        asks: by side, how its process is asked for a repetition.
        case: a timed one.
        blocks: repetitions of every side, at most 6 where one takes over 2 s.

    Returns:
        By side its figure: p50 with the interquartile range as spread, and in `detail` the `turns` by which figures of
        one timing know each other; or why there is none.
    """
    streams = {name: Stream(ask, case) for name, ask in asks.items()}
    for stream in streams.values():
        stream.attempt(stream.warm)
    if any(stream.warmup.seconds > SLOW_SECONDS for stream in streams.values()):
        blocks = min(blocks, FEWEST_BLOCKS)
    leads = {name: stream.lead for name, stream in streams.items()}
    for stream in streams.values():
        stream.seconds = []
    order = list(streams)
    for block in range(blocks):
        for name in order if block % 2 == 0 else reversed(order):
            stream, lead = streams[name], leads[name]
            stream.attempt(lambda stream=stream, lead=lead: stream.seconds.append(stream.repeat(lead)))  # type: ignore[misc]
    own = uuid.uuid4().hex
    return {name: stream.trouble or _figure(stream, leads[name], own, order) for name, stream in streams.items()}


def _figure(stream: Stream, lead: int, own: str, order: Sequence[str]) -> Figure:
    summary = summarise(stream.seconds)
    detail = {
        "p90": summary.p90,
        "p99": summary.p99,
        "aa_floor": aa_floor(stream.seconds),
        "blocks": len(stream.seconds),
        "turns": own,
        "turns_of": list(order),
        "lead": lead,
        "warmup": {"repetitions": stream.warmup.repetitions, "settled": stream.warmup.settled},
        **stream.facts,
    }
    samples = tuple(stream.seconds)
    return Figure(summary.p50, "s", len(samples), summary.iqr, samples=samples, detail=detail)


def answer(group: Group, asked: Repetition) -> Reply:
    """Seconds of one repetition, or with a figure the row of the whole timing."""
    import torch  # here: the side that asks has none

    group.case = asked.case
    if asked.figure is not None:
        return Reply("row", row=row_of(group, asked.figure), data=group.environment.to_dict())
    with torch.inference_mode():
        lengths, work = prepared(group, asked.case.metric)
        *_, seconds = group.device.time(*[work] * (asked.lead + 1))
    return Reply("seconds", data={"seconds": seconds, **lengths, "threads": torch.get_num_threads()})


def prepared(group: Group, metric: str) -> tuple[dict[str, int], Work]:
    """The token counts and the work of a timed metric, made once a process: a prompt's cache is kept with it."""
    known = _prepared.setdefault(group, {})
    if metric not in known:
        build = catalog.metrics()[group.case.family].work
        if build is None:
            raise HarnessError(f"{metric} is no timed metric: it cannot be taken in turn")
        lengths, make = build(group, catalog.member_of(group.case))
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
