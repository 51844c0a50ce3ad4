"""Warm-up, interleaving and the A/A floor, under a clock that reads its times from a list."""

from __future__ import annotations

import itertools
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.metrics.measuring import devices
from harness.metrics.measuring.timing import Load, Usage, Warmup, Work, aa_floor, interleave, measure, warm_up


class Scripted:
    """A clock that runs each work and reads the seconds that the script gives it."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds: Iterator[float] = iter(seconds)
        self.calls: list[int] = []  # works handed over at once

    def __call__(self, *works: Work) -> list[float]:
        self.calls.append(len(works))
        for work in works:
            work()
        return [next(self.seconds) for _ in works]


def named(log: list[str], name: str) -> Work:
    return Work(lambda: log.append(name), lambda: log.append(f"prepare {name}"))


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([9.0, 1.0, 1.0], Warmup(3, True)),  # cold first, then steady
        ([9.0, 1.0, 1.09], Warmup(3, True)),  # medians 1.0, 1.045
        ([9.0, 1.0, 1.12, 1.0], Warmup(4, False)),  # medians 1.0, 1.06, 1.0: 6% and 5.7%, at the limit
        ([9.0, 4.0, 2.0, 2.0, 2.0], Warmup(5, True)),  # medians 4, 3, 2, 2
    ],
)
def test_warm_up_ends_when_two_successive_medians_agree(seconds: list[float], expected: Warmup) -> None:
    assert warm_up(Work(lambda: None), Scripted(seconds), limit=len(seconds)) == expected


def test_warm_up_gives_up_after_ten_and_says_so() -> None:
    clock = Scripted([2.0**-n for n in range(20)])
    assert warm_up(Work(lambda: None), clock) == Warmup(10, False)
    assert len(clock.calls) == 10


def test_warm_up_never_counts_the_cold_repetition() -> None:
    # with the cold 1.02 counted the medians 1.02, 1.01 would agree after two repetitions
    assert warm_up(Work(lambda: None), Scripted([1.02, 1.0, 1.0])).repetitions == 3


@pytest.mark.parametrize("limit", [1, 2])
def test_too_short_a_warm_up_cannot_settle(limit: int) -> None:
    assert warm_up(Work(lambda: None), Scripted([1.0] * 9), limit=limit) == Warmup(limit, False)


def test_blocks_alternate_which_goes_first_in_one_call_to_the_clock() -> None:
    log: list[str] = []
    clock = Scripted([1.0, 10.0, 20.0, 2.0, 3.0, 30.0])
    candidate, reference = interleave(named(log, "A"), named(log, "B"), clock, 3)
    assert [name for name in log if len(name) == 1] == ["A", "B", "B", "A", "A", "B"]
    assert (candidate, reference) == ([1.0, 2.0, 3.0], [10.0, 20.0, 30.0])
    assert clock.calls == [6]


def test_no_blocks_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 blocks: at least one is needed"):
        interleave(Work(lambda: None), Work(lambda: None), Scripted([]), 0)


def test_a_drift_of_the_clock_cancels_in_the_ratio_of_blocks() -> None:
    drift = [1.0 * 1.01**i for i in range(40)]  # every repetition 1% slower than the one before
    candidate, reference = interleave(Work(lambda: None), Work(lambda: None), Scripted(drift), 20)
    ratios = [math.log(a / b) for a, b in zip(candidate, reference, strict=True)]
    assert statistics.mean(ratios) == pytest.approx(0.0, abs=1e-12)
    assert math.log(statistics.mean(drift[20:]) / statistics.mean(drift[:20])) == pytest.approx(0.199, abs=0.001)


def test_measure_warms_each_stream_up_by_itself() -> None:
    log: list[str] = []
    clock = Scripted([5.0, 1.0, 1.0, 9.0, 4.0, 2.0, 2.0, 2.0, 1.0, 2.0, 2.1, 1.1])
    timing = measure(named(log, "A"), named(log, "B"), clock, 2)
    assert timing.warmup_candidate == Warmup(3, True)
    assert timing.warmup_reference == Warmup(5, True)
    assert timing.candidate == (1.0, 1.1)
    assert timing.reference == (2.0, 2.1)
    assert [name for name in log if len(name) == 1] == ["A"] * 3 + ["B"] * 5 + ["A", "B", "B", "A"]


@pytest.mark.parametrize(
    ("cores", "others", "blur", "threads", "crowded"),
    [
        (2, 0.05, 0.0, 2, False),
        (2, 0.5, 0.0, 2, True),
        (2, 0.5, 0.4, 2, False),  # too short a while to say
        (8, 0.5, 0.0, 4, False),  # cores enough for both
        (8, 4.5, 0.0, 4, True),
        (2, None, 0.0, 2, False),
    ],
)
def test_a_time_is_crowded_where_fewer_cores_are_left_than_threads(
    cores: int, others: float | None, blur: float, threads: int, crowded: bool
) -> None:
    assert Load(cores, others, 0.0, blur).crowded(threads) is crowded


def test_the_load_is_what_others_did_and_not_what_this_process_did() -> None:
    start = Usage.now()
    before = Usage(start.wall, start.own, 10.0, 2, start.switches)
    after = Usage(start.wall + 2.0, start.own + 3.0, 14.0, 2, start.switches + 6)  # 4 s of cores, 3 of them ours
    assert after.since(before) == Load(2, 0.5, 3.0, 2 / os.sysconf("SC_CLK_TCK") / 2.0)
    assert Usage(0.0, 0.0, None, 2, 0).since(before).others is None


@pytest.mark.parametrize("cores", [1, 2, 4])
def test_short_repetitions_on_an_idle_machine_are_not_crowded(cores: int) -> None:
    """Linux counts in ticks: of 6 ms it sees nothing or 10 ms, in the mean as much as there was."""
    chance, crowded = np.random.default_rng(cores), 0
    for _ in range(300):
        loads = []
        for _ in range(20):
            start = chance.uniform(0, 0.01, cores)  # since each core's last tick
            busy = float(np.floor((start + 0.006) / 0.01).sum()) / 100
            own = 0.006 * cores
            loads.append(Usage(0.006, own, busy, cores, 0).since(Usage(0.0, 0.0, 0.0, cores, 0)))
        mean = Load.over(loads)
        assert mean is not None
        crowded += mean.crowded(cores)
    assert crowded <= 3  # of 300


def test_work_beside_a_timing_is_counted() -> None:
    spin = [sys.executable, "-c", "while True: pass"]
    core = sorted(os.sched_getaffinity(0))[0]
    with subprocess.Popen(["taskset", "-c", str(core), *spin]) as beside:
        try:
            time.sleep(0.5)
            timing = measure(Work(lambda: time.sleep(0.2)), Work(lambda: None), devices.Cpu().time, 6)
        finally:
            beside.kill()
    assert timing.load is not None
    assert timing.load.others is not None
    assert timing.load.others > 0.5
    assert timing.load.crowded(timing.load.cores)


def test_calling_a_work_prepares_and_runs() -> None:
    log: list[str] = []
    named(log, "A")()
    assert log == ["prepare A", "A"]


def test_floor_of_a_steady_stream_is_zero() -> None:
    assert aa_floor([0.25] * 10) == 0.0


def test_floor_by_hand() -> None:
    # d = (ln 2, ln 2): signs ++ give the estimate ln 2, signs +- give 0; the 95% quantile of {0, ln 2} is ln 2
    assert aa_floor([1.0, 2.0, 3.0, 6.0]) == pytest.approx(math.log(2))


def test_floor_forgives_one_outlier() -> None:
    steady = [1.0, 1.01] * 8
    assert aa_floor([*steady, 1.0, 50.0]) == pytest.approx(math.log(1.01), rel=0.5)


@pytest.mark.parametrize("seconds", [[], [1.0, 2.0, 3.0], [1.0, 0.0, 1.0, 1.0], [1.0, math.nan, 1.0, 1.0]])
def test_floor_from_too_little_is_none(seconds: list[float]) -> None:
    assert aa_floor(seconds) is None


def brute_floor(seconds: list[float]) -> float:
    """The floor by loops over every sign pattern, both symmetric halves."""
    pairs = [math.log(b / a) for a, b in zip(seconds[::2], seconds[1::2], strict=False)]
    found = []
    for signs in itertools.product((1, -1), repeat=len(pairs)):
        signed = [sign * pair for sign, pair in zip(signs, pairs, strict=True)]
        walsh = [(a + b) / 2 for a, b in itertools.combinations_with_replacement(signed, 2)]
        found.append(abs(statistics.median(walsh)))
    found.sort()
    return found[math.ceil(0.95 * (len(found) // 2 - 1)) * 2]  # each value twice by symmetry


@given(st.lists(st.floats(0.01, 10.0), min_size=4, max_size=11), st.floats(0.1, 10.0))
def test_floor_equals_brute_force_and_has_no_unit(seconds: list[float], scale: float) -> None:
    floor = aa_floor(seconds)
    assert floor == pytest.approx(brute_floor(seconds), abs=1e-9)
    assert aa_floor([scale * value for value in seconds]) == pytest.approx(floor, abs=1e-9)


def test_floor_holds_the_difference_between_two_streams_of_one_model() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        seconds = np.exp(rng.normal(0.0, 0.1, (2, 10)))  # candidate and reference of one distribution
        floor = aa_floor(list(seconds[1]))
        ratios = np.log(seconds[0] / seconds[1])
        first, second = np.triu_indices(10)
        held += bool(abs(np.median((ratios[first] + ratios[second]) / 2)) <= (floor or 0.0))
    assert held >= 180  # nine of ten at least: 0.934 and 0.969 over 1,000 sessions of 10 and 20 repetitions


def test_many_repetitions_stay_quick_and_close() -> None:
    rng = np.random.default_rng(1)
    floor = aa_floor(list(np.exp(rng.normal(0.0, 0.1, 200))))
    assert floor is not None
    assert 0.02 < floor < 0.2  # 12 pairs of spread 0.14: standard error 0.04, twice that 0.08


def test_a_slow_stream_is_not_warmed_up_any_further() -> None:
    timing = measure(Work(lambda: None), Work(lambda: None), Scripted([3.0] + [1.0] * 40), 10, slow=2.0)
    assert timing.warmup_candidate == Warmup(1, settled=False)
    assert timing.warmup_candidate.seconds == 3.0


@pytest.mark.parametrize(
    ("seconds", "asked", "given"),
    [(0.2, 10, 10), (0.25, 10, 10), (0.3, 10, 8), (0.4, 20, 12), (1.0, 10, 6), (1.0, 4, 4)],
)
def test_blocks_that_take_long_are_fewer_but_never_too_few(seconds: float, asked: int, given: int) -> None:
    clock = Scripted([seconds] * 60)
    timing = measure(Work(lambda: None), Work(lambda: None), clock, asked, pace=0.5)
    assert len(timing.candidate) == len(timing.reference) == given
