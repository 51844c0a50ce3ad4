"""The confidence sequence against its definition, every order of a tiny text, and 2,000 simulated ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from numpy.typing import NDArray

from harness.core import stats
from harness.core.stats import FEWEST_WINDOWS
from harness.metrics.measuring import sequential
from harness.metrics.measuring.sequential import Progress, Sequential

HASH = "ab" * 32
TEXT = ((0.4, 7), (-1.0, 7), (2.5, 7), (0.1, 7), (0.3, 2))  # d_w and its tokens: a short tail
RUNS, WINDOWS = 2000, 40


def mean_of(windows: tuple[tuple[float, int], ...]) -> float:
    return sum(d * n for d, n in windows) / sum(n for _, n in windows)


def residuals(windows: tuple[tuple[float, int], ...], total: tuple[tuple[float, int], ...], m: float) -> list[float]:
    tokens = sum(n for _, n in total) / len(total)
    return [n / tokens * (d - m) for d, n in windows]


def variance_of(windows: tuple[tuple[float, int], ...]) -> float:
    return sum(z * z for z in residuals(windows, windows, mean_of(windows))) / len(windows)


def capital_by_hand(drawn: tuple[tuple[float, int], ...], m: float, v: float, grid: list[float], sign: int) -> float:
    """The capital after the windows drawn, straight from the definition: loops, and a numerical least value."""
    amounts = [1.0] * len(grid)
    for index in range(len(drawn)):
        left = len(TEXT) - index
        past = residuals(drawn[:index], TEXT, m)
        fair = residuals(drawn[index : index + 1], TEXT, m)[0] + sum(past) / left

        def spent(at: float, index: int = index, left: int = left) -> float:
            before = residuals(drawn[:index], TEXT, at)
            return sum(z * z for z in before) + sum(before) ** 2 / left

        least = float(scipy.optimize.minimize_scalar(spent).fun) if index else 0.0
        variance = (len(TEXT) * v - least) / left
        for place, bet in enumerate(grid):
            x = sign * bet * fair
            factor = 1 + x + x * x / 2 if x >= 0 else 1 / (1 - x + x * x / 2)
            amounts[place] *= factor * math.exp(-bet * bet * variance / 2)
    return sum(amounts) / len(amounts)


def log_capital(x: NDArray[np.float64], bounds: NDArray[np.float64], grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithm of the mixed capital after every draw: fair draws and variance bounds (..., t), lambdas (K,)."""
    gains = sequential.influence(grid * x[..., None]) - grid**2 * bounds[..., None] / 2  # (..., t, K)
    logarithms: NDArray[np.float64] = np.logaddexp.reduce(gains.cumsum(-2), axis=-1) - math.log(len(grid))
    return logarithms


def capital(drawn: tuple[tuple[float, int], ...], m: float, v: float, grid: list[float], sign: int) -> float:
    differences, tokens = (np.array(column, dtype=np.float64) for column in zip(*drawn, strict=True))
    weights = tokens * len(TEXT) / sum(n for _, n in TEXT)
    a, b, bounds = sequential.fair_game(differences, weights, len(TEXT), v)
    return math.exp(float(log_capital(sign * (a - b * m), bounds, np.array(grid))[-1]))


@pytest.mark.parametrize("sign", [1, -1])
def test_capital_is_its_definition(sign: int) -> None:
    v = 1.5 * variance_of(TEXT)
    for drawn in ((TEXT[2],), TEXT[:3], TEXT[::-1], (TEXT[4], TEXT[1], TEXT[0], TEXT[2])):
        for m in (-0.7, 0.0, mean_of(TEXT), 1.3):
            expected = capital_by_hand(drawn, m, v, [0.3, 1.1], sign)
            assert capital(drawn, m, v, [0.3, 1.1], sign) == pytest.approx(expected, rel=1e-6)


def test_first_bet_by_hand() -> None:
    # N = 2, equal tokens: x_1 = d_1 - m = 1, v_1 = v = 0.5; then x_2 = 0.5 + 1 / 1, and all of 2 * 0.5 less the
    # square about the best m, (1 + 1 / 1) - (1 + 1)^2 / (1 + 1) = 0, stays: v_2 = 1
    a, b, bounds = sequential.fair_game(np.array([1.0, 0.5]), np.ones(2), 2, 0.5)
    assert a.tolist() == [1.0, 1.5]
    assert b.tolist() == [1.0, 2.0]
    assert bounds.tolist() == [0.5, 1.0]
    assert log_capital(a[:1], bounds[:1], np.array([1.0]))[0] == pytest.approx(math.log(2.5) - 0.25)


@pytest.mark.parametrize("sign", [1, -1])
def test_capital_is_a_supermartingale_over_every_order_where_v_is_the_variance(sign: int) -> None:
    v, mean, grid = variance_of(TEXT), mean_of(TEXT), [0.2, 0.8, 2.0]
    for length in range(len(TEXT)):
        for past in itertools.permutations(TEXT, length):
            rest = [window for window in TEXT if window not in past]
            now = capital(past, mean, v, grid, sign) if past else 1.0
            expected = sum(capital((*past, window), mean, v, grid, sign) for window in rest) / len(rest)
            assert expected <= now * (1 + 1e-9)


def test_variance_of_what_is_left_is_within_its_bound() -> None:
    v, mean = variance_of(TEXT), mean_of(TEXT)
    for drawn in itertools.permutations(TEXT):
        differences, tokens = (np.array(column, dtype=np.float64) for column in zip(*drawn, strict=True))
        _, _, bounds = sequential.fair_game(differences, tokens * len(TEXT) / sum(n for _, n in TEXT), len(TEXT), v)
        for index, bound in enumerate(bounds):
            assert np.var(residuals(drawn[index:], TEXT, mean)) <= bound + 1e-12


def populations(kind: str, generator: np.random.Generator) -> NDArray[np.float64]:
    """(RUNS, WINDOWS) texts of mean 0 and window variance 1, each in random order."""
    draw: dict[str, Callable[[], NDArray[np.float64]]] = {
        "gaussian": lambda: generator.normal(size=(RUNS, WINDOWS)),
        "t3": lambda: generator.standard_t(3, (RUNS, WINDOWS)),
        "lognormal": lambda: generator.lognormal(0, 1.5, (RUNS, WINDOWS)),
        "one outlier": lambda: generator.permuted(np.tile(np.eye(1, WINDOWS)[0], (RUNS, 1)), axis=1),
    }
    values = draw[kind]()
    values = values - values.mean(1, keepdims=True)
    scaled: NDArray[np.float64] = values / values.std(1, keepdims=True)
    return scaled


def misses(texts: NDArray[np.float64], v: float) -> int:
    """Runs in which the true mean is ever outside, on either side."""
    a, _, bounds = sequential.fair_game(texts, np.ones(WINDOWS), WINDOWS, v)
    grid = sequential.bets(WINDOWS, v, sequential.ALPHA)
    ever = np.zeros(len(texts), dtype=bool)
    for sign in (1, -1):
        ever |= (log_capital(sign * a, bounds, grid) >= math.log(2 / sequential.ALPHA)).any(1)
    return int(ever.sum())


@pytest.mark.parametrize("kind", ["gaussian", "t3", "lognormal", "one outlier"])
def test_true_mean_is_covered_at_every_window_at_least_as_often_as_claimed(kind: str) -> None:
    # one-sided: rejects only if the claim (at most 5% of runs) is refuted at 0.1%
    allowed = scipy.stats.binom.ppf(0.999, RUNS, sequential.ALPHA)
    assert misses(populations(kind, np.random.default_rng(11)), 1.0) <= allowed


def test_coverage_is_lost_far_beyond_v_so_the_test_above_can_fail() -> None:
    allowed = scipy.stats.binom.ppf(0.999, RUNS, sequential.ALPHA)
    assert misses(populations("gaussian", np.random.default_rng(11)), 0.1) > allowed


def feed(sequence: Sequential, differences: list[float], tokens: int = 10) -> list[Progress]:
    return [sequence.update(difference, tokens) for difference in differences]


def test_interval_holds_what_the_capital_does_not_refute() -> None:
    differences = np.random.default_rng(8).normal(0.2, 1, 30)
    v, threshold = 3.0, math.log(2 / sequential.ALPHA)
    a, b, bounds = sequential.fair_game(differences, np.ones(30), 30, v)
    grid = sequential.bets(30, v, sequential.ALPHA)
    for count, state in enumerate(feed(Sequential(v, None, counts=[10] * 30), differences[:-1].tolist()), 1):

        def ever(m: float, sign: int, count: int = count) -> bool:
            x = sign * (a - b * m)[:count]
            return bool((log_capital(x, bounds[:count], grid) >= threshold).any())

        margin = 2 * sequential.TOLERANCE * math.sqrt(v)
        assert ever(state.low, 1)
        assert not ever(state.low + margin, 1)
        assert ever(state.high, -1)
        assert not ever(state.high - margin, -1)
        assert state.low < state.value < state.high


def test_decides_on_either_side_at_a_narrow_interval_and_at_the_end() -> None:
    differences = np.random.default_rng(5).normal(0, 1, 60).tolist()
    counts, drawn = [10] * 60, list(range(60))

    def read(bound: float | None, resolution: float = 0.0) -> Progress:
        sequence = Sequential(1.5, bound, resolution, counts=counts)
        return sequential.read(sequence, drawn, lambda index: (differences[index], 10))

    below, above, narrow, end = read(3.0), read(-3.0), read(None, 0.7), read(float(np.mean(differences)))
    assert (below.decided, above.decided, narrow.decided, end.decided) == ("below", "above", "resolution", "end")
    assert below.high < 3.0
    assert above.low > -3.0
    assert (narrow.high - narrow.low) / 2 < 0.7
    assert max(below.windows, above.windows, narrow.windows) < 60
    assert below.tokens_used == 10 * below.windows
    assert (end.windows, end.tokens_used, end.tokens_available) == (60, 600, 600)
    assert end.low == end.high == end.value == pytest.approx(np.mean(differences))


def test_nothing_is_decided_before_the_fewest_windows() -> None:
    states = feed(Sequential(1.0, 50.0, counts=[10] * 20), [0.0, 0.1] * 6)
    decided = [bool(state.decided) for state in states]
    assert decided == [False] * (FEWEST_WINDOWS - 1) + [True] * (12 - FEWEST_WINDOWS + 1)
    few = feed(Sequential(1.0, 50.0, counts=[10] * FEWEST_WINDOWS), [0.0] * FEWEST_WINDOWS)
    assert [state.decided for state in few] == [""] * (FEWEST_WINDOWS - 1) + ["end"]


def test_the_whole_text_is_read_without_a_recorded_variance() -> None:
    states = feed(Sequential(None, 5.0, 1.0, counts=[10] * 12), [0.0] * 12)
    assert [state.decided for state in states] == [""] * 11 + ["end"]
    assert states[5].whole == "no window variance is recorded for this text"
    assert (states[5].low, states[5].high) == (-math.inf, math.inf)


def test_the_whole_text_is_read_once_the_running_variance_exceeds_v() -> None:
    quiet, loud = [0.0, 0.1] * 6, [5.0, -5.0] * 6
    states = feed(Sequential(1.0, None, counts=[10] * 48), [*quiet, *loud, *quiet, *quiet])
    assert not states[11].whole
    assert states[-2].whole.startswith("the running variance")
    assert "exceeds the bound 1 nats^2" in states[-2].whole
    assert (states[-2].low, states[-2].high) == (-math.inf, math.inf)  # and stays so, though it calms down
    assert states[-1].low == states[-1].high == states[-1].value


@pytest.mark.parametrize("value", [0.0, 0.1, -1e-3])
@pytest.mark.parametrize("v", [0.0, 1e-300, 0.04])
def test_equal_windows_divide_by_nothing(value: float, v: float) -> None:
    counts = [511] * 19 + [3]
    sequence = Sequential(v, 0.5, counts=counts)
    states = [sequence.update(value, count) for count in counts]
    assert not any(state.whole for state in states)
    assert all(state.low <= value <= state.high for state in states)
    assert (states[-1].low, states[-1].high) == (value, value)
    if v < 0.04:
        assert states[FEWEST_WINDOWS - 1].decided == "below"


def test_a_difference_where_none_was_recorded_has_the_whole_text_read() -> None:
    states = feed(Sequential(0.0, 0.5, counts=[10] * 20), [0.0, 0.0, 1e-6, 0.0])
    assert [bool(state.whole) for state in states] == [False, False, True, True]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_never_averaged_away(bad: float) -> None:
    states = feed(Sequential(1.0, 5.0, counts=[10] * 12), [0.0, bad, *[0.0] * 10])
    assert states[1].whole == "a loss is not finite"
    assert [state.decided for state in states] == [""] * 11 + ["end"]
    assert math.isnan(states[-1].value)


def test_short_windows_count_by_their_tokens() -> None:
    differences, counts = [0.1, 0.3, -0.2] * 4, [511] * 11 + [40]
    sequence = Sequential(1.0, None, counts=counts)
    last = [sequence.update(*pair) for pair in zip(differences, counts, strict=True)][-1]
    assert last.value == pytest.approx(np.average(differences, weights=counts), abs=1e-15)


def test_shift_and_scale_move_the_interval_along() -> None:
    differences = np.random.default_rng(9).normal(0, 1, 20)
    plain = feed(Sequential(2.0, None, counts=[10] * 30), differences.tolist())[-1]
    moved = feed(Sequential(2e-4, None, counts=[10] * 30), (100 + differences / 100).tolist())[-1]
    assert (moved.low, moved.high) == pytest.approx((100 + plain.low / 100, 100 + plain.high / 100), abs=1e-6)
    mirrored = feed(Sequential(2.0, None, counts=[10] * 30), (-differences).tolist())[-1]
    assert (mirrored.low, mirrored.high) == pytest.approx((-plain.high, -plain.low), abs=1e-9)


def test_the_same_windows_give_the_same_states() -> None:
    differences = np.random.default_rng(2).normal(0, 1, 25).tolist()
    first, second = (feed(Sequential(1.5, 0.3, counts=[10] * 25), differences) for _ in range(2))
    assert first == second


def test_order_is_a_fixed_permutation_of_text_and_windows() -> None:
    counts = [511] * 40 + [17]
    drawn = sequential.order(HASH, counts)
    assert sorted(drawn.tolist()) == list(range(41))
    assert drawn.tolist() == sequential.order(HASH, counts).tolist()
    assert drawn.tolist() != sequential.order("cd" * 32, counts).tolist()
    assert drawn.tolist() != sequential.order(HASH, [255] * 40 + [17]).tolist()
    assert sequential.order(HASH, [5, 5, 5, 5, 5, 5]).tolist() == [4, 5, 3, 0, 2, 1]  # the same on every machine


def test_variance_bound_is_the_window_variance_behind_a_recorded_interval() -> None:
    generator = np.random.default_rng(4)
    candidate, reference = generator.normal(3, 1, 120), generator.normal(3, 1, 120)
    spans = [slice(start, start + 10) for start in range(0, 120, 10)]
    estimate = stats.paired_delta(candidate, reference, spans)
    expected = 1.5 * np.var((candidate - reference).reshape(12, 10).mean(1), ddof=1)
    assert sequential.variance_bound((estimate.low, estimate.high), estimate.count) == pytest.approx(expected)
    assert sequential.variance_bound((0.0, 0.0), 12) == 0.0
    assert sequential.variance_bound(None, 12) is None
    assert sequential.variance_bound((-math.inf, math.inf), 12) is None
    assert sequential.variance_bound((0.0, 1.0), FEWEST_WINDOWS - 1) is None


@pytest.mark.parametrize(
    ("v", "resolution", "alpha"), [(-1.0, 0.0, 0.05), (math.nan, 0.0, 0.05), (1.0, -1.0, 0.05), (1.0, 0.0, 1.0)]
)
def test_numbers_without_sense_are_refused(v: float, resolution: float, alpha: float) -> None:
    with pytest.raises(ValueError, match="no sequence with v"):
        Sequential(v, None, resolution, counts=[1], alpha=alpha)


def test_windows_that_the_plan_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="every window must score a token"):
        Sequential(1.0, None, counts=[3, 0])
    sequence = Sequential(1.0, None, counts=[3, 3])
    sequence.update(0.0, 3)
    with pytest.raises(ValueError, match="the windows held 5 tokens, the plan 6"):
        sequence.update(0.0, 2)
    with pytest.raises(ValueError, match="window 3 of 2"):
        sequence.update(0.0, 3)
    with pytest.raises(ValueError, match="1 windows drawn of 2"):
        sequential.read(Sequential(1.0, None, counts=[3, 3]), [0], lambda index: (0.0, 3))
