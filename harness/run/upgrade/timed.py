"""Timing that live sides take in turn, the driving side: warm-up, blocks of one repetition a side, one figure each.

As in `timing`, and by its warm-up: a block holds one timed repetition of every side, the order of the sides is
reversed from block to block, and block i of each side's samples was taken next to block i of the others'. A side sleeps
while another works, so that a repetition finds the caches full of another process's data: one untimed repetition
leads in each turn, except where a repetition is long beside that.
"""

from __future__ import annotations

import statistics
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.core.errors import HarnessError
from harness.core.records import Case, Figure
from harness.core.stats import summarise
from harness.metrics.measuring.timing import FEWEST_BLOCKS, Warmup, Work, aa_floor, warm_up
from harness.run.messages import Turn

SLOW_SECONDS = 2.0  # a repetition: no further warm-up, and no more than FEWEST_BLOCKS blocks
LEAD_BELOW_SECONDS = 0.5  # refilling 50 MiB of caches takes some 10 ms: 2% of this, and less of what is longer
WARMUP_LIMIT = 6  # repetitions; each side's process has run whole windows of text before

Ask = Callable[[Turn], Any]


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
        facts = dict(self.ask(Turn(self.case, lead)))
        seconds = float(facts.pop("seconds"))
        self.facts = facts
        return seconds

    def warm(self) -> None:
        """Until it settles; what was seen decides whether turns get a lead."""
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


def take_turns(asks: Mapping[str, Ask], case: Case, blocks: int) -> dict[str, Figure | str]:
    """Time a case on every side.

    Args:
        asks: by side, how its process is asked for a turn.
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
    turns = uuid.uuid4().hex
    return {name: stream.trouble or _figure(stream, leads[name], turns, order) for name, stream in streams.items()}


def _figure(stream: Stream, lead: int, turns: str, order: Sequence[str]) -> Figure:
    summary = summarise(stream.seconds)
    detail = {
        "p90": summary.p90,
        "p99": summary.p99,
        "aa_floor": aa_floor(stream.seconds),
        "blocks": len(stream.seconds),
        "turns": turns,
        "turns_of": list(order),
        "lead": lead,
        "warmup": {"repetitions": stream.warmup.repetitions, "settled": stream.warmup.settled},
        **stream.facts,
    }
    samples = tuple(stream.seconds)
    return Figure(summary.p50, "s", len(samples), summary.iqr, samples=samples, detail=detail)
