"""Intervals and ranks against scipy, brute force, and values worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from harness.core import stats


def windows(sizes: list[int]) -> list[slice]:
    ends = np.cumsum(sizes).tolist()
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 7, 8, 19, 30, 147, 1001])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
def test_student_quantile_equals_scipys(degrees: int, confidence: float) -> None:
    expected = scipy.stats.t.ppf((1 + confidence) / 2, degrees)
    assert stats.student_quantile(confidence, degrees) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("confidence", "degrees"), [(0.0, 3), (1.0, 3), (0.95, 0)])
def test_student_quantile_refuses_what_has_none(confidence: float, degrees: int) -> None:
    with pytest.raises(ValueError, match="no Student t quantile"):
        stats.student_quantile(confidence, degrees)


def test_paired_delta_by_hand() -> None:
    # windows of 3, 3 and 1 tokens with means 1, 2 and 4: D = (3*1 + 3*2 + 1*4) / 7 = 13/7
    candidate = np.array([1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 4.0]) + 5
    found = stats.paired_delta(candidate, np.full(7, 5.0), windows([3, 3, 1]))
    assert found.value == pytest.approx(13 / 7)
    # residuals n (d - D): 3 * -6/7, 3 * 1/7, 15/7; squares sum to (324 + 9 + 225) / 49
    error = math.sqrt(3 / 2 * (324 + 9 + 225) / 49) / 7
    assert found.high - found.value == pytest.approx(4.302652729911275 * error)  # t(0.975, 2) from a printed table
    assert found.count == 3
    assert not found.usable


def test_equal_windows_give_students_own_interval() -> None:
    generator = np.random.default_rng(7)
    difference = generator.normal(0.1, 1, (12, 5))
    reference = generator.normal(3, 1, 60)
    found = stats.paired_delta(reference + difference.ravel(), reference, windows([5] * 12))
    low, high = scipy.stats.t.interval(0.95, 11, difference.mean(), scipy.stats.sem(difference.mean(axis=1)))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.usable


def test_all_equal_windows_have_zero_width_and_divide_by_nothing() -> None:
    reference = np.linspace(1, 2, 30)
    found = stats.paired_delta(reference, reference, windows([4] * 7 + [2]))
    assert found == stats.Estimate(0.0, 0.0, 0.0, 8, True)
    shifted = stats.weighted_mean(np.full(9, 0.1), np.array([511.0] * 8 + [3.0]))
    assert (shifted.low, shifted.value, shifted.high) == (0.1, 0.1, 0.1)


def test_seven_windows_are_not_usable_and_one_has_no_interval() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(0, 1, 14)
    assert not stats.paired_delta(values, np.zeros(14), windows([2] * 7)).usable
    assert stats.paired_delta(np.r_[values, 0, 1], np.zeros(16), windows([2] * 8)).usable
    alone = stats.paired_delta(values, np.zeros(14), windows([14]))
    assert (alone.low, alone.high, alone.usable) == (-math.inf, math.inf, False)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_non_finite_loss_makes_everything_nan(bad: float, side: int) -> None:
    pair = [np.zeros(16), np.zeros(16)]
    pair[side][3] = bad
    found = stats.paired_delta(pair[0], pair[1], windows([2] * 8))
    assert all(math.isnan(value) for value in (found.value, found.low, found.high))
    assert not found.usable


def test_paired_delta_refuses_losses_that_do_not_pair() -> None:
    with pytest.raises(ValueError, match=r"flat and alike, not \(3,\) and \(4,\)"):
        stats.paired_delta(np.zeros(3), np.zeros(4), [slice(0, 3)])
    with pytest.raises(ValueError, match="windows hold 2 of 3 losses"):
        stats.paired_delta(np.zeros(3), np.zeros(3), [slice(0, 2)])
    with pytest.raises(ValueError, match="windows hold 0 of 0 losses"):
        stats.paired_delta(np.zeros(0), np.zeros(0), [])


def test_windows_that_score_nothing_are_left_out() -> None:
    found = stats.paired_delta([1.0, 3.0], [0.0, 0.0], [slice(0, 1), slice(1, 1), slice(1, 2)])
    assert (found.value, found.count) == (2.0, 2)


@pytest.mark.parametrize("sizes", [[8] * 8, [8] * 12, [8] * 20, [8] * 19 + [3]])
def test_coverage_is_within_two_points_of_nominal_for_gaussian_windows(sizes: list[int]) -> None:
    """20,000 runs: the share's own standard error is 0.15 points, so two points are no accident."""
    generator = np.random.default_rng(20261122)
    counts = np.array(sizes, dtype=np.float64)
    draws = generator.normal(0.3, 1 / np.sqrt(counts), (20_000, len(sizes)))
    covered = sum(found.low <= 0.3 <= found.high for found in (stats.weighted_mean(means, counts) for means in draws))
    assert 0.93 <= covered / len(draws) <= 0.97


def brute_tail(count: int, level: float) -> int:
    """The largest k with P(T <= k) <= level, over every pattern of signs."""
    ranks = range(1, count + 1)
    totals = [sum(itertools.compress(ranks, signs)) for signs in itertools.product((0, 1), repeat=count)]
    return max((k for k in range(max(totals)) if sum(t <= k for t in totals) <= level * len(totals)), default=-1)


@pytest.mark.parametrize("count", range(1, 12))
def test_signed_rank_tail_equals_brute_force(count: int) -> None:
    assert stats.signed_rank_tail(count, 0.95) == brute_tail(count, 0.025)


def test_signed_rank_tail_of_the_printed_tables() -> None:
    # two-sided 5% critical values of Wilcoxon's signed-rank test, as in every textbook
    assert [stats.signed_rank_tail(n, 0.95) for n in (5, 6, 8, 10, 15, 20, 25)] == [-1, 0, 3, 8, 25, 52, 89]


def test_signed_rank_tail_is_continuous_where_the_normal_limit_takes_over() -> None:
    exact, limit = stats.signed_rank_tail(stats.EXACT_RANKS, 0.95), stats.signed_rank_tail(stats.EXACT_RANKS + 1, 0.95)
    assert 0 < limit - exact < stats.EXACT_RANKS + 1  # one more rank moves it by less than that rank


@pytest.mark.parametrize("count", [6, 10, 20])
def test_the_interval_is_what_wilcoxons_test_does_not_reject(count: int) -> None:
    values = np.random.default_rng(count).normal(0.05, 0.1, count)
    found = stats.hodges_lehmann(values)

    def pvalue(shift: float) -> float:
        return float(scipy.stats.wilcoxon(values - shift, mode="exact").pvalue)

    for inside in (found.low + 1e-9, found.value, found.high - 1e-9):
        assert pvalue(inside) > 0.05
    for outside in (found.low - 1e-9, found.high + 1e-9):
        assert pvalue(outside) <= 0.05


def test_hodges_lehmann_by_hand() -> None:
    # Walsh averages of 0, 2, 10: 0 1 2 5 6 10, whose median is 3.5
    assert stats.walsh_averages([10.0, 0.0, 2.0]).tolist() == [0, 1, 2, 5, 6, 10]
    found = stats.hodges_lehmann([10.0, 0.0, 2.0])
    assert (found.value, found.low, found.high, found.usable) == (3.5, -math.inf, math.inf, False)


def test_six_values_are_the_fewest_with_an_interval() -> None:
    assert not stats.hodges_lehmann([1.0, 2, 3, 4, 5]).usable
    six = stats.hodges_lehmann([1.0, 2, 3, 4, 5, 6])
    assert (six.low, six.value, six.high, six.usable) == (1.0, 3.5, 6.0, True)


def test_log_ratio_of_a_model_twice_as_slow_and_robust_to_one_stall() -> None:
    reference = np.array([1.0, 1.1, 0.9, 1.0, 1.2, 1.0, 0.8, 1.0, 1.0, 1.0])
    candidate = 2 * reference
    assert stats.hodges_lehmann_ratio(candidate, reference).value == pytest.approx(math.log(2))
    candidate[4] = 50.0  # another process woke up
    assert stats.hodges_lehmann_ratio(candidate, reference).value == pytest.approx(math.log(2))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_times_that_cannot_be_are_never_averaged_away(bad: float) -> None:
    found = stats.hodges_lehmann_ratio([1.0] * 7 + [bad], [1.0] * 8)
    assert math.isnan(found.value)
    assert not found.usable
    assert math.isnan(stats.hodges_lehmann([1.0, math.nan]).low)


def test_unpaired_or_absent_values_are_refused() -> None:
    with pytest.raises(ValueError, match="blocks must be paired"):
        stats.hodges_lehmann_ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="needs a flat list of values"):
        stats.hodges_lehmann([])


@given(st.lists(st.floats(-5, 5), min_size=6, max_size=30), st.floats(-3, 3))
def test_hodges_lehmann_moves_with_its_values(values: list[float], shift: float) -> None:
    before, after = stats.hodges_lehmann(values), stats.hodges_lehmann(np.array(values) + shift)
    assert before.low <= before.value <= before.high
    assert (after.low, after.value, after.high) == pytest.approx(
        (before.low + shift, before.value + shift, before.high + shift), abs=1e-9
    )


def test_summary_by_hand() -> None:
    found = stats.summarise([4.0, 0.0, 1.0, 3.0, 2.0])
    assert (found.p50, found.iqr) == (2.0, 2.0)
    assert found.p90 == pytest.approx(3.6)
    assert found.p99 == pytest.approx(3.96)
    assert math.isnan(stats.summarise([]).p50)
    assert math.isnan(stats.summarise([1.0, math.inf]).iqr)


def test_holm_by_hand() -> None:
    # sorted .01 .02 .03 .04 times 4 3 2 1 = .04 .06 .06 .04, made monotone
    assert stats.holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert stats.holm([]) == []
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    with pytest.raises(ValueError, match="outside"):
        stats.holm([0.5, math.nan])


def test_holm_keeps_the_session_error_rate() -> None:
    """20 true hypotheses a session, 4,000 sessions: at most 5% of sessions alarm (standard error 0.34 points)."""
    draws: NDArray[np.float64] = np.random.default_rng(3).uniform(size=(4000, 20))
    alarms = np.mean([min(stats.holm(session.tolist())) <= 0.05 for session in draws])
    assert 0.03 <= alarms <= 0.06
