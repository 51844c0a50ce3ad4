"""How two pieces of work are timed against each other: warm-up, interleaved blocks, noise floor.

Pure logic over a clock, so that a fake clock tests it; the clock of a real device is its `time` (`devices`).

- *Warm-up*, each stream by itself: the first repetition is cold and never counts. Behind it the median of all
  warm repetitions so far is taken after each one; two successive medians within 5% of each other end the warm-up,
  ten repetitions (the cold one included) end it in any case, and the timing then says that it did not settle.
- *Repetitions* come in blocks of one candidate and one reference repetition, side by side, so that a drift of the
  processor's clock meets both. The order alternates from block to block (A B, B A, A B, ...), so that neither
  stream always follows the other. A stream with a repetition above the caller's `slow` seconds is not warmed up any
  further. Blocks that take longer than the caller's `pace` are fewer, so that all of them take no longer than those
  asked for would at that pace, but never fewer than FEWEST_BLOCKS.
- Raw samples are kept; `stats` summarises them.
- What else ran on the cores meanwhile is counted (`Load`): a time taken beside other work is nobody's.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from harness.core.environment import usable_cores
from harness.core.stats import walsh_averages

AGREEMENT = 0.05  # two successive medians within 5%
WARMUP_LIMIT = 10  # repetitions
FEWEST_BLOCKS = 6  # with which a 95% signed-rank interval exists: 2 / 2^6 = 0.03, while 2 / 2^5 = 0.06
FLOOR_QUANTILE = 0.95  # the floor holds 95% of the differences that a stream shows against itself
SPARE = 0.2  # of a core, that other work may take: the system's own, on an idle machine, takes less than a tenth
STAT = Path("/proc/stat")
EXHAUSTIVE_PAIRS = 12  # 2^11 sign patterns up to symmetry; more pairs are thinned to this many, evenly spread


def _nothing() -> None:
    """No preparation."""


@dataclass(frozen=True)
class Work:
    """One repetition: `prepare` runs outside the timed region, `run` inside it. Calling it does both, untimed."""

    run: Callable[[], object]
    prepare: Callable[[], object] = _nothing

    def __call__(self) -> None:
        """Prepare and run, for a caller that measures something else."""
        self.prepare()
        self.run()


class Clock(Protocol):
    """Runs the works in order, each on an idle device, and gives the seconds of each, in that order."""

    def __call__(self, *works: Work) -> list[float]:
        """Seconds of each work's `run`."""


@dataclass(frozen=True)
class Warmup:
    """How many repetitions were thrown away, and whether the medians agreed at the end."""

    repetitions: int
    settled: bool
    seconds: float = field(default=0.0, compare=False)  # of a repetition: the median of the warm ones, or the only one


@dataclass(frozen=True)
class Load:
    """What went on beside a timing: means over its seconds.

    Attributes:
        cores: that this process may use.
        others: of them, how many were busy for somebody else, a hypervisor's other guests too; below zero by as much
            as it is blurred. None where Linux does not say.
        switches: a second, by which this process lost a core before it was done with it.
        blur: cores by which `others` may be off: Linux counts in hundredths of a second.
    """

    cores: int
    others: float | None
    switches: float
    blur: float = 0.0

    @classmethod
    def over(cls, loads: Sequence[Load]) -> Load | None:
        """The mean over repetitions that were timed apart, whose blurs are independent; None where there are none."""
        if not loads:
            return None
        others, switches, blur = ([getattr(load, name) for load in loads] for name in ("others", "switches", "blur"))
        known = None if None in others else statistics.mean(others)
        return cls(loads[0].cores, known, statistics.mean(switches), statistics.mean(blur) / math.sqrt(len(loads)))

    def crowded(self, threads: int) -> bool:
        """Whether fewer cores were left than this process has threads."""
        return self.others is not None and self.others - max(0, self.cores - threads) > SPARE + self.blur


@dataclass(frozen=True)
class Usage:
    """Counters at one moment, seconds."""

    wall: float
    own: float  # of this process, all threads
    busy: float | None  # of the cores that it may use
    cores: int
    switches: int

    @classmethod
    def now(cls) -> Usage:
        """Read them."""
        cores = usable_cores()
        busy, tick = None, os.sysconf("SC_CLK_TCK")
        if STAT.is_file():
            lines = [line.split() for line in STAT.read_text(encoding="ascii").splitlines() if line.startswith("cpu")]
            ticks = {name: [int(value) for value in values[:8]] for name, *values in lines}
            counted = [ticks[f"cpu{core}"] for core in cores if f"cpu{core}" in ticks]
            busy = sum(sum(each) - each[3] - each[4] for each in counted) / tick  # all but idle and waiting for a disk
        return cls(time.monotonic(), time.process_time(), busy, len(cores), _switches())

    def since(self, start: Usage) -> Load:
        """What went on between two moments."""
        wall = max(self.wall - start.wall, 1e-9)
        others = None
        if self.busy is not None and start.busy is not None:
            others = (self.busy - start.busy - (self.own - start.own)) / wall
        blur = self.cores / os.sysconf("SC_CLK_TCK") / wall
        return Load(self.cores, others, (self.switches - start.switches) / wall, blur)


def _switches() -> int:
    """Times that this process was put aside for another, so far; 0 where the system does not count."""
    try:
        import resource  # local: methods and metrics are listed on Windows too
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


@dataclass(frozen=True)
class Timing:
    """Raw seconds of both streams; index i of each is block i."""

    candidate: tuple[float, ...]
    reference: tuple[float, ...]
    warmup_candidate: Warmup
    warmup_reference: Warmup
    load: Load | None = field(default=None, compare=False)


def warm_up(work: Work, clock: Clock, *, limit: int = WARMUP_LIMIT, slow: float = math.inf) -> Warmup:
    """Repeat until two successive medians of the warm repetitions agree, at most `limit` times.

    The fewest repetitions that can settle are three: a cold one, and two medians behind it.
    """
    warm: list[float] = []
    previous = math.nan
    for repetition in range(1, limit + 1):
        (seconds,) = clock(work)
        if seconds > slow:
            return Warmup(repetition, settled=False, seconds=seconds)
        if repetition == 1:
            continue
        warm.append(seconds)
        median = statistics.median(warm)
        if abs(median - previous) <= AGREEMENT * previous:  # False while previous is nan
            return Warmup(repetition, settled=True, seconds=median)
        previous = median
    return Warmup(limit, settled=False, seconds=statistics.median(warm) if warm else seconds)


def interleave(candidate: Work, reference: Work, clock: Clock, blocks: int) -> tuple[list[float], list[float]]:
    """Seconds of both streams over `blocks` blocks, handed to the clock as one sequence."""
    if blocks < 1:
        raise ValueError(f"{blocks} blocks: at least one is needed")
    order = [(candidate, reference) if block % 2 == 0 else (reference, candidate) for block in range(blocks)]
    seconds = clock(*itertools.chain.from_iterable(order))
    pairs = [seconds[2 * block : 2 * block + 2] for block in range(blocks)]
    pairs = [pair if block % 2 == 0 else pair[::-1] for block, pair in enumerate(pairs)]
    return [first for first, _ in pairs], [second for _, second in pairs]


def measure(
    candidate: Work,
    reference: Work,
    clock: Clock,
    blocks: int,
    *,
    limit: int = WARMUP_LIMIT,
    slow: float = math.inf,
    pace: float = math.inf,
) -> Timing:
    """Warm both streams up, then time them in interleaved blocks; fewer where one takes over `pace` seconds."""
    warm_candidate = warm_up(candidate, clock, limit=limit, slow=slow)
    warm_reference = warm_up(reference, clock, limit=limit, slow=slow)
    if (block := warm_candidate.seconds + warm_reference.seconds) > pace:
        blocks = min(blocks, max(FEWEST_BLOCKS, int(blocks * pace / block)))
    start = Usage.now()
    ours, theirs = interleave(candidate, reference, clock, blocks)
    load = Usage.now().since(start)
    return Timing(tuple(ours), tuple(theirs), warm_candidate, warm_reference, load)


def aa_floor(seconds: Sequence[float]) -> float | None:
    """How far a stream seems to differ from itself in this session, as an absolute log ratio.

    The stream's repetitions are split into alternating halves and paired, d_i = ln(x_{2i+1} / x_{2i}). Which of a
    pair is called candidate is arbitrary, so every pattern of signs gives one A/A comparison: the Hodges-Lehmann
    estimate (median of Walsh averages) of the signed d_i. The floor is the 95% quantile of their absolute values.
    Halves have half the blocks of the comparison that is judged, which widens the floor; signs that cancel by chance
    narrow it: with independent log-normal noise it held the estimate between two streams of one model in 93% of
    simulated sessions at 10 repetitions and 97% at 20 (tests hold nine of ten).
    None below four repetitions, and where a time is not above zero: a floor from nothing would read as no noise.
    """
    values = np.asarray(seconds, dtype=np.float64)  # (repetitions,) seconds
    if len(values) < 4 or not np.all(np.isfinite(values) & (values > 0)):
        return None
    even = len(values) // 2 * 2
    pairs = np.log(values[1:even:2] / values[0:even:2])  # (pairs,)
    if len(pairs) > EXHAUSTIVE_PAIRS:
        pairs = pairs[np.linspace(0, len(pairs) - 1, EXHAUSTIVE_PAIRS).round().astype(int)]
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(pairs) - 1)))  # (patterns, pairs - 1)
    signed = pairs * np.hstack([np.ones((len(signs), 1)), signs])  # (patterns, pairs), first sign fixed by symmetry
    estimates = np.median(walsh_averages(signed), axis=-1)  # (patterns,)
    return float(np.quantile(np.abs(estimates), FLOOR_QUANTILE, method="higher"))
