"""A session's error rate: p values against SciPy, shares against the rate, and what Holm's step adds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from harness.core import stats
from harness.core.contracts import Member
from harness.core.records import Case, Row, Verdict
from harness.core.stats import Estimate
from harness.judge import rules
from harness.judge.bounds import Bounds, load
from harness.judge.rules import decide

FLOOR = 1e-4
DELTA = Member("perplexity.delta", "nat", "lower", paired=True)


@pytest.fixture(scope="module")
def bounds(tmp_path_factory: pytest.TempPathFactory) -> Bounds:
    return load(tmp_path_factory.mktemp("none"))


def case(metric: str, method: str = "nf4") -> Case:
    text = ("lee", "chunk:512") if metric.startswith("perplexity") else ("", "")
    return Case("gpt2", method, *text, metric, "cpu")


@pytest.mark.parametrize("windows", [2, 8, 148, 1001])
def test_a_losses_p_value_is_scipys_t_test(windows: int) -> None:
    values = np.random.default_rng(windows).normal(0.03, 0.02, windows)
    change = stats.weighted_mean(values, np.full(windows, 511.0))
    assert rules.p_loss(change, 0.0) == pytest.approx(scipy.stats.ttest_1samp(values, 0.0).pvalue, rel=1e-9)
    assert rules.p_loss(change, FLOOR) == pytest.approx(scipy.stats.ttest_1samp(values, FLOOR).pvalue, rel=1e-9)
    assert rules.p_loss(change, 1.0) == 1.0  # beneath the floor


@pytest.mark.parametrize("tokens", [2, 511, 75_530])
def test_a_tokens_p_value_is_scipys_t_test_with_the_runs_shift_beside_it(tokens: int) -> None:
    values, shift = np.random.default_rng(tokens).normal(3e-4, 0.058, tokens), 3e-4
    alone = rules.LossChange(values).mean
    assert rules.p_loss(alone, 0.0) == pytest.approx(scipy.stats.ttest_1samp(values, 0.0).pvalue, rel=0.02)
    both = rules.LossChange(values, 0.058, shift).mean
    error = math.hypot(scipy.stats.sem(values), shift)
    free = min(tokens - 1, stats.MOST_DEGREES)
    assert rules.p_loss(both, 0.0) == pytest.approx(2 * scipy.stats.t.sf(abs(values.mean()) / error, free), rel=1e-6)
    assert both.high - both.low == pytest.approx(2 * scipy.stats.t.ppf(0.975, free) * error, rel=1e-9)


def test_a_p_value_of_one_test_and_the_interval_decide_alike() -> None:
    generator = np.random.default_rng(5)
    for _ in range(200):
        change = stats.weighted_mean(generator.normal(0.3, 1.0, 12), np.ones(12))
        outside = change.low > 0.05 or change.high < -0.05
        assert (rules.p_loss(change, 0.05) <= rules.level(1)) == outside
        outside = change.low > 0 or change.high < 0
        assert (rules.p_time(change, 0.0) <= rules.level(1)) == outside


def test_a_times_p_value_is_scipys_normal_tail() -> None:
    change = Estimate(0.30, 0.30 - 1.959963984540054 * 0.05, 0.5, 10, True)  # standard error 0.05 towards zero
    assert rules.p_time(change, 0.1) == pytest.approx(2 * scipy.stats.norm.sf(0.2 / 0.05), rel=1e-9)
    assert rules.p_time(replace(change, value=0.05), 0.1) == 1.0
    assert rules.p_time(Estimate(0.3, 0.3, 0.3, 10, True), 0.1) == 0.0


def test_equal_windows_have_no_spread_and_divide_by_nothing() -> None:
    change = stats.weighted_mean(np.full(9, 0.01), np.ones(9))
    assert rules.p_loss(change, FLOOR) == 0.0
    assert rules.smallest_loss(change, FLOOR, 10) == FLOOR


@pytest.mark.parametrize("count", [1, 28])
def test_the_smallest_effect_is_seen_nine_times_in_ten(count: int) -> None:
    """By the noncentral t: the power at the effect named is 90%, within the two points of its approximation."""
    windows, sigma = 16, 0.02
    error = sigma / math.sqrt(windows)
    degrees = windows - 1
    reach = stats.student_quantile(0.95, degrees) * error
    effect = rules.smallest_loss(Estimate(0.0, -reach, reach, windows, True), FLOOR, count)
    threshold = scipy.stats.t.isf(rules.level(count) / 2, degrees)
    power = scipy.stats.nct.sf(threshold, degrees, (effect - FLOOR) / error)
    assert power == pytest.approx(rules.RELIABLY, abs=0.03)


def test_the_tests_of_a_session_are_counted(bounds: Bounds) -> None:
    """One model's losses on one text are one test, and a paired loss brings its reference's."""
    both = [case("perplexity"), case("perplexity.delta"), case("perplexity.delta", "absmax-int8")]
    exact = [case("memory.storage"), case("memory.parameters")]
    timed = [case("latency.decode"), case("latency.prefill")]
    assert rules.tests(both, bounds, stop_early=False) == 3  # nf4, absmax-int8, fp32
    assert rules.tests([*both, case("perplexity", "fp32")], bounds, stop_early=False) == 3
    assert rules.tests([*both, both[0]._replace(dataset="olmo")], bounds, stop_early=False) == 4
    assert rules.tests(both[:1], bounds, stop_early=False) == 1
    assert rules.tests(both + exact + timed, bounds, stop_early=False) == 5
    assert rules.tests(both, bounds, stop_early=True) == 4  # and absmax-int8 against its bound: nf4 has none
    assert rules.tests(exact, bounds, stop_early=False) == 1
    assert rules.tests(both, bounds, stop_early=False, unpaired={both[1]}) == 4  # its value has no losses behind it
    assert rules.level(5) == pytest.approx(0.01)


def test_a_perplexity_and_its_delta_share_one_step(bounds: Bounds) -> None:
    """p .014 and .015 of one model's losses, .026 and .4 of others: three tests, and Holm's .0167 rejects the first.

    A delta by its two values alone is a test of its own: of four Holm's .0125 rejects none.
    """
    one = made(0.01, 0.014)
    change = {**one.detail["change"], "p": 0.015}
    alone = replace(one, metric="perplexity.delta", detail={"change": change})
    delta = replace(alone, detail={"change": {**change, "rms": 0.02, "rms_limit": 1.0}})
    rows = rules.settle([alone, one, made(0.01, 0.026), made(0.01, 0.4)], 4)
    assert {row.verdict for row in rows} == {Verdict.WITHIN_NOISE}
    settled = rules.settle([delta, one, made(0.01, 0.026), made(0.01, 0.4)], 3)
    assert [row.verdict for row in settled] == [
        Verdict.WITHIN_NOISE, Verdict.WORSE, Verdict.WITHIN_NOISE, Verdict.WITHIN_NOISE,
    ]  # fmt: skip


def pair_of(generator: np.random.Generator, sd: float) -> list[rules.LossChange]:
    return [rules.LossChange(generator.normal(0, sd, 300), sd, 0.0) for _ in range(2)]


def test_a_delta_adds_no_alarm_to_those_of_its_two_losses(bounds: Bounds) -> None:
    """Reference and candidate moved by rounding, each for itself: the delta is called only where one of them is."""
    generator, level = np.random.default_rng(3), 0.2
    row = Row.of(case("perplexity.delta", "bf16"), value=1.0, detail={"window_counts": [300]})
    alone = together = 0
    for _ in range(500):
        own, reference = pair_of(generator, 0.05)
        found = rules.by_tokens(rules.Question(row, DELTA, bounds, row, lambda sha: None), own, reference)
        assert found.p is not None
        either = min(rules.p_loss(own.mean, 0.0), rules.p_loss(reference.mean, 0.0))
        together += found.p <= level
        alone += rules.p_loss(own.against(reference).mean, 0.0) <= level
        assert found.p >= either
    assert 60 < together <= alone < 140  # 20% of 500 without the other two, and fewer with them


def made(change: float, p: float, word: Verdict = Verdict.WITHIN_NOISE, verdict: Verdict | None = None) -> Row:
    detail = {"change": {"value": change, "low": change, "high": change, "floor": FLOOR, "p": p}}
    return Row.of(
        case("perplexity", f"nf4:block={2 ** (4 + round(1000 * p) % 9)}"),
        value=1.0, verdict=verdict or word, verdict_baseline=word, detail=detail, reason="+0.01 nat",
    )  # fmt: skip


def test_holms_step_adds_to_what_was_rejected_at_once() -> None:
    # p .001 .014 .02 .4 of four tests: Bonferroni's .0125 rejects the first, Holm .003 .042 .042 .4 the first three
    rows = [made(0.1, 0.001, Verdict.WORSE), made(0.01, 0.014), made(-0.01, 0.02), made(0.01, 0.4)]
    settled = rules.settle(rows, 4)
    assert [row.verdict for row in settled] == [
        Verdict.WORSE, Verdict.WORSE, Verdict.BETTER, Verdict.WITHIN_NOISE,
    ]  # fmt: skip
    assert settled[1].reason == "+0.01 nat; worse by Holm's step over the session's 4 tests (p 0.014)"
    assert [row.verdict for row in rules.settle(rows, 8)] == [
        Verdict.WORSE, Verdict.WITHIN_NOISE, Verdict.WITHIN_NOISE, Verdict.WITHIN_NOISE,
    ]  # half of the rate was spent on bounds  # fmt: skip


def test_settling_leaves_a_more_severe_verdict_and_rows_without_a_test() -> None:
    rows = [made(0.01, 0.001, verdict=Verdict.OUT_OF_BOUND), Row.of(case("memory.storage"), value=1.0)]
    settled = rules.settle(rows, 1)
    assert (settled[0].verdict, settled[0].verdict_baseline) == (Verdict.OUT_OF_BOUND, Verdict.WORSE)
    assert settled[1] == rows[1]
    assert rules.settle([], 1) == []


DRAWS: dict[str, Callable[[np.random.Generator, int], np.ndarray[tuple[int, ...], np.dtype[np.float64]]]] = {
    "Gaussian": lambda generator, windows: generator.normal(0, 0.01, windows),
    "symmetric t3": lambda generator, windows: 0.01 * generator.standard_t(3, windows),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_a_session_in_which_nothing_changed_raises_an_alarm_in_one_of_twenty_at_most(kind: str) -> None:
    """400 sessions of 28 tests of pure noise around no change: at most 5%, within the simulation's own 2.1 points."""
    generator, alarms, count, floor = np.random.default_rng(11), 0, 28, 0.0
    for _ in range(400):
        rows = []
        for place in range(count):
            change = stats.weighted_mean(DRAWS[kind](generator, 16), np.full(16, 255.0))
            word = decide(change, floor, count)
            row = made(change.value, rules.p_loss(change, floor), word)
            rows.append(replace(row, method=f"m{place}"))
        alarms += any(row.verdict in (Verdict.WORSE, Verdict.BETTER) for row in rules.settle(rows, count))
    assert alarms <= 28
    assert alarms >= 4 if kind == "Gaussian" else True  # not by never deciding anything


def test_without_shares_most_sessions_would_alarm() -> None:
    """What the test above guards against: 28 tests at 5% each."""
    generator, alarms = np.random.default_rng(11), 0
    for _ in range(200):
        changes = [stats.weighted_mean(generator.normal(0, 0.01, 16), np.ones(16)) for _ in range(28)]
        alarms += any(decide(change, 0.0) is not Verdict.WITHIN_NOISE for change in changes)
    assert alarms > 100


def test_a_users_file_may_widen_what_is_tolerated_on_this_text(tmp_path: Path) -> None:
    change = Estimate(0.01, -0.05, 0.07, 10, True)
    assert decide(change, FLOOR, 1, room=0.005) is Verdict.WORSE
    assert decide(change, FLOOR, 1, room=0.02) is Verdict.WITHIN_NOISE
    assert decide(replace(change, value=-0.01), FLOOR, 1, room=0.005) is Verdict.BETTER
