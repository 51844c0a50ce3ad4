"""Timing interleaved over processes: blocks of one repetition a side, one figure each.

Two versions of a library cannot live in one process, so that the interleaved blocks of `timing` are driven from
outside: each process holds its model and its prepared work, and runs one repetition a request (`answer`), which
`interleave` asks for. As in `timing`, and by its warm-up: a block holds one timed repetition of every side, the order
of the sides is reversed from block to block, and block i of each side's samples was taken next to block i of the
others'. A side sleeps while another works, so that a repetition finds the caches full of another process's data: one
untimed repetition leads, except where a repetition is long beside that.
"""

from __future__ import annotations

import functools
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness.core import catalog
from harness.core.errors import HarnessError
from harness.core.identity import identity_of
from harness.core.records import Case, Figure, Row, Verdict
from harness.core.stats import summarise
from harness.metrics.measuring.timing import FEWEST_BLOCKS, Load, Usage, Warmup, Work, aa_floor, warm_up
from harness.run.messages import Repetition, Reply

if TYPE_CHECKING:
    from harness.run.group import Group

SLOW_SECONDS = 2.0  # a repetition: no further warm-up, and no more than FEWEST_BLOCKS blocks
LEAD_BELOW_SECONDS = 0.5  # refilling 50 MiB of caches takes some 10 ms: 2% of this, and less of what is longer
WARMUP_LIMIT = 6  # repetitions; each side's process has run whole windows of text before

Ask = Callable[[Repetition], Any]


@dataclass
class Stream:
    """One side's repetitions of one case."""

    ask: Ask
    case: Case
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)  # beside each of them
    warmup: Warmup = field(default_factory=lambda: Warmup(0, settled=False))
    lead: int = 0  # untimed repetitions in front of each timed one
    trouble: str = ""  # why it was given up, in one line

    def repeat(self) -> float:
        """One repetition's seconds."""
        facts = dict(self.ask(Repetition(self.case, self.lead)))
        seconds = float(facts.pop("seconds"))
        if load := facts.pop("load", None):
            self.loads.append(load)
        self.facts = facts
        return seconds

    def warm(self) -> None:
        """Until it settles; what was seen decides whether repetitions get a lead."""
        work = Work(self.repeat)
        self.warmup = warm_up(work, lambda *_: [self.repeat()], limit=WARMUP_LIMIT, slow=SLOW_SECONDS)
        self.lead = int(self.warmup.seconds < LEAD_BELOW_SECONDS)

    def time(self) -> None:
        """One block's repetition."""
        self.seconds.append(self.repeat())

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
    for stream in streams.values():
        stream.loads = []
    order = list(streams)
    for block in range(blocks):
        for name in order if block % 2 == 0 else reversed(order):
            streams[name].attempt(streams[name].time)
    own = uuid.uuid4().hex
    figures: dict[str, Figure | str] = {}
    for name, stream in streams.items():
        if stream.trouble:
            figures[name] = stream.trouble
            continue
        summary, samples = summarise(stream.seconds), tuple(stream.seconds)
        detail = {
            "p90": summary.p90,
            "p99": summary.p99,
            "aa_floor": aa_floor(samples),
            "blocks": len(samples),
            "turns": own,
            "turns_of": order,
            "lead": stream.lead,
            "warmup": {"repetitions": stream.warmup.repetitions, "settled": stream.warmup.settled},
            **stream.facts,
        }
        if load := Load.over(stream.loads):
            crowded = case.device == "cpu" and load.crowded(stream.facts["threads"])
            detail |= {"others": load.others, "switches": load.switches, "crowded": crowded}
        figures[name] = Figure(summary.p50, "s", len(samples), summary.iqr, samples=samples, detail=detail)
    return figures


def answer(group: Group, asked: Repetition) -> Reply:
    """Seconds of one repetition, or with a figure the row of the whole timing: judged beside the others', not alone."""
    import torch  # here: the side that asks has none

    group.case = asked.case
    if asked.figure is None:
        with torch.inference_mode():
            lengths, work = prepared(group, asked.case.metric)
            start = Usage.now()
            *_, seconds = group.device.time(*[work] * (asked.lead + 1))
            load = Usage.now().since(start)
        return Reply("seconds", data={"seconds": seconds, **lengths, "threads": torch.get_num_threads(), "load": load})
    figure = asked.figure
    plan = group.plan if group.case.dataset else None
    text = {"protocol_id": plan.protocol_id, "token_hash": plan.token_hash} if plan else {}
    row = Row.of(
        group.case,
        **text,
        revision=group.checkpoint.revision,
        identity=identity_of(group.checkpoint),
        method_id=group.method_id,
        **vars(figure),
        census=group.census,
        bits_per_weight=group.census.get("bits_per_weight"),
        environment=group.environment.id,
        seconds=round(sum(figure.samples), 3),
        key=group.key(group.case),
        verdict=Verdict.UNRECORDED,
        reason="timed in turn with the other sides: judged in their comparison",
    )
    return Reply("row", row=row, data=group.environment.to_dict())


@functools.cache
def prepared(group: Group, metric: str) -> tuple[dict[str, int], Work]:
    """The token counts and the work of a timed metric, made once: a process has one group, whose cache is kept too."""
    build = catalog.metrics()[group.case.family].work
    if build is None:
        raise HarnessError(f"{metric} is no timed metric: it cannot be taken in turn")
    lengths, make = build(group, catalog.member_of(group.case))
    return lengths, make(group.model)
