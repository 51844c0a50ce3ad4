"""Reading a text only as far as a verdict needs: a confidence sequence over windows drawn without replacement. numpy.

The estimand is the token-weighted mean of window differences, D = sum(n_w d_w) / sum(n_w) over all N windows of the
text, as `stats.paired_delta` has it. With weights W = n / mean(n), known from the plan, the residuals
z_w(m) = W_w (d_w - m) average to zero over the text exactly where m = D: a short last window counts by its tokens, and
equal differences leave no residual, whatever the tokens. After i - 1 windows the next residual has the conditional mean
-sum(z_j) / (N - i + 1), since all N sum to zero, so x_i(m) = z_i + sum_{j<i} z_j / (N - i + 1) is fair under m = D.

For each lambda the capital is the product over i of exp(phi(lambda x_i) - lambda^2 v_i / 2), phi Catoni's influence
function; averaged over a grid of lambda it is a supermartingale that begins at 1, so under m = D it ever reaches
2 / alpha with probability alpha / 2 at most (Ville), once for each sign. Those m for which neither did form an
interval. v_i bounds the variance of what is left: sum z_w(D)^2 <= N v gives v_i = (N v - q_i) / (N - i + 1), q_i
being the least over m of sum_{j<i} z_j^2 + (sum_{j<i} z_j)^2 / (N - i + 1); the first is v itself.

What is claimed: where the window variance (1/N) sum z_w(D)^2 of the text is at most v, the interval holds D at every
window at once with probability 1 - alpha over orders. Where it is more, nothing is: once FEWEST_WINDOWS are read a
running variance above v has the whole text read, and no stop comes before. At the end D is exact.

Source: Wang and Ramdas, Catoni-style confidence sequences for heavy-tailed mean estimation, 2023, section 5, for draws
with replacement; the fair game without replacement is Waudby-Smith and Ramdas, Confidence sequences for sampling
without replacement, 2020, section 2. The bound v_i is derived above.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.core.stats import CONFIDENCE, FEWEST_WINDOWS, student_quantile

HEADROOM = 1.5  # the variance bound over the recorded window variance
ALPHA = 1 - CONFIDENCE
GRID_RATIO = 4.0  # between the sample sizes that neighbouring lambdas suit: 3 or 4 of them cost a mixture ln 4 nats
TOLERANCE = 1e-5  # of an endpoint, in standard deviations under v: far under what a report prints
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Progress:
    """What is known after some windows."""

    value: float  # token-weighted mean of the windows read, kept within the interval; nats
    low: float
    high: float
    decided: (
        str  # 'below' or 'above' the bound, 'resolution' (as narrow as asked for), 'end' (value is D), '' (read on)
    )
    windows: int
    tokens_used: int
    tokens_available: int
    whole: str = ""  # why the whole text has to be read, '' where it need not


def order(token_hash: str, counts: Sequence[int]) -> NDArray[np.int64]:
    """The order in which windows are drawn: fixed by the text and how it is cut, the same on every machine.

    Args:
        token_hash: of the plan.
        counts: scored tokens of each window that scores any, in text order; they tell one W from another.

    Returns:
        A permutation of range(len(counts)), int64.
    """
    seed = f"{token_hash}:{','.join(map(str, counts))}"
    keys = [hashlib.sha256(f"{seed}:{window}".encode()).digest() for window in range(len(counts))]
    return np.array(sorted(range(len(counts)), key=keys.__getitem__), dtype=np.int64)


def variance_bound(interval: tuple[float, float] | None, windows: int) -> float | None:
    """The bound v from a recorded whole-text delta: 1.5 times the window variance behind its interval, nats^2.

    Args:
        interval: of `stats.paired_delta` over every window of the same tokens, nats.
        windows: how many; its `count`.

    Returns:
        HEADROOM * windows * SE^2; None where none was recorded, it is not finite, or over fewer than FEWEST_WINDOWS.
    """
    if interval is None or windows < FEWEST_WINDOWS or not all(map(math.isfinite, interval)):
        return None
    error = (interval[1] - interval[0]) / 2 / student_quantile(CONFIDENCE, windows - 1)
    return HEADROOM * windows * error**2


def influence(x: Array) -> Array:
    """Catoni's phi, the narrowest that his inequality allows: sign(x) ln(1 + |x| + x^2 / 2)."""
    size = np.abs(x)
    return np.copysign(np.log1p(size + size * size / 2), x)


def fair_game(differences: Array, weights: Array, windows: int, v: float) -> tuple[Array, Array, Array]:
    """The draws as bets: x_i(m) = a_i - b_i m and the variance bound of each.

    Args:
        differences: (..., t) d_w in the order drawn, nats; best shifted so that the first is near zero.
        weights: (t,) or (..., t) tokens over the mean tokens of all windows.
        windows: N, of the whole text.
        v: bound of (1/N) sum z_w(D)^2, nats^2.

    Returns:
        a (..., t), b (..., t), and v_i (..., t), nats^2, never negative.
    """

    def before(values: Array) -> Array:
        return values.cumsum(-1) - values

    left = windows - np.arange(differences.shape[-1], dtype=np.float64)  # (t,) windows not yet drawn, this one too
    weights = np.broadcast_to(weights, differences.shape)
    product, square = weights * differences, weights * weights
    a_before, b_before = before(product), before(weights)
    p0 = before(product * product) + a_before**2 / left
    p1 = before(square * differences) + a_before * b_before / left
    p2 = before(square) + b_before**2 / left  # 0 only before the first draw
    seen = p0 - np.divide(p1 * p1, p2, out=np.zeros_like(p1), where=p2 > 0)  # (..., t) q_i
    bounds = np.maximum(windows * v - np.maximum(seen, 0), 0) / left
    return product + a_before / left, weights + b_before / left, bounds


def bets(windows: int, v: float, alpha: float) -> Array:
    """(K,) grid of lambda, 1/nats: each is best at one sample size, from FEWEST_WINDOWS up to the text."""
    sizes = [float(FEWEST_WINDOWS)]
    while sizes[-1] * GRID_RATIO <= windows:
        sizes.append(sizes[-1] * GRID_RATIO)
    return np.sqrt(2 * math.log(2 / alpha) / (np.array(sizes) * v))


class Sequential:
    """The confidence sequence of one case; feed it windows in `order`.

    Args:
        v: variance bound, nats^2 (`variance_bound`); None where nothing is recorded: the whole text is then read.
        bound: the limit on D to decide against, nats; None where there is none.
        resolution: half-width, nats, at which to stop whatever the bound; 0.0 for never.
        counts: scored tokens of every window that the text has.
        alpha: error probability, both sides together.

    Raises:
        ValueError: a negative or non-finite v or resolution, alpha outside (0, 1), or no window with tokens.
    """

    def __init__(
        self,
        v: float | None,
        bound: float | None,
        resolution: float = 0.0,
        *,
        counts: Sequence[int],
        alpha: float = ALPHA,
    ) -> None:
        if (v is not None and not 0 <= v < math.inf) or not 0 <= resolution < math.inf or not 0 < alpha < 1:
            raise ValueError(f"no sequence with v {v}, resolution {resolution}, alpha {alpha}")
        if not len(counts) or min(counts) < 1:
            raise ValueError("every window must score a token, and there must be one")
        self.v, self.bound, self.resolution = v, bound, resolution
        self.windows, self.tokens = len(counts), sum(counts)
        self.threshold = math.log(2 / alpha)
        self.grid = bets(self.windows, v, alpha) if v else None
        self.whole = "" if v is not None else "no window variance is recorded for this text"
        self.low, self.high = -math.inf, math.inf
        self._differences: list[float] = []
        self._tokens: list[int] = []

    def update(self, difference: float, tokens: int) -> Progress:
        """One more window: its mean of candidate - reference NLL in nats, and its scored tokens."""
        if len(self._tokens) == self.windows or tokens < 1:
            raise ValueError(f"window {len(self._tokens) + 1} of {self.windows} with {tokens} tokens")
        self._differences.append(float(difference))
        self._tokens.append(int(tokens))
        if not math.isfinite(difference):
            self.whole = self.whole or "a loss is not finite"
        read, decided = len(self._tokens), ""
        if read == self.windows:
            if sum(self._tokens) != self.tokens:
                raise ValueError(f"the windows held {sum(self._tokens)} tokens, the plan {self.tokens}")
            self.low = self.high = self._mean()
            decided = "end"
        elif not self.whole:
            self._narrow()
        if self.whole and not decided:
            self.low, self.high = -math.inf, math.inf  # what was claimed under v no longer is
        elif not decided and read >= FEWEST_WINDOWS:
            if self.bound is not None and not self.low <= self.bound <= self.high:
                decided = "below" if self.high < self.bound else "above"
            elif (self.high - self.low) / 2 < self.resolution:
                decided = "resolution"
        value = min(max(self._mean(), self.low), self.high)
        return Progress(value, self.low, self.high, decided, read, sum(self._tokens), self.tokens, self.whole)

    def _mean(self) -> float:
        """Token-weighted mean of what was read, summed from the first so that equal differences stay equal."""
        first = self._differences[0]
        if not all(map(math.isfinite, self._differences)):
            return math.nan
        rest = math.fsum(n * (d - first) for d, n in zip(self._differences, self._tokens, strict=True))
        return first + rest / sum(self._tokens)

    def _narrow(self) -> None:
        """Intersect the interval with what the windows read so far allow, or find that v does not hold."""
        assert self.v is not None
        first = self._differences[0]
        shifted = np.array(self._differences) - first  # (t,)
        weights = np.array(self._tokens) * (self.windows / self.tokens)  # (t,)
        centre = float((weights * shifted).sum() / weights.sum())
        running = float(((weights * (shifted - centre)) ** 2).sum()) / max(1, len(shifted) - 1)
        if (len(shifted) >= FEWEST_WINDOWS or not self.v) and running > self.v:
            self.whole = f"the running variance {running:.3g} exceeds the bound {self.v:.3g} nats^2"
            return
        if self.grid is None:  # v is 0: every window is said to be equal
            self.low = self.high = first
            return
        a, b, bounds = fair_game(shifted, weights, self.windows, self.v)
        self.low = max(self.low, first + self._endpoint(a, b, bounds, centre, self.low - first))
        self.high = min(self.high, first - self._endpoint(-a, b, bounds, -centre, first - self.high))
        if self.low > self.high:
            self.whole = "no mean fits the windows read under the recorded variance"

    def _endpoint(self, a: Array, b: Array, bounds: Array, centre: float, known: float) -> float:
        """The least m not refuted from below, on its outer side; `known` is a lower limit that holds already, or -inf.

        What is refuted is so for every smaller m too: from `centre`, a guess, the border is found to TOLERANCE.
        """
        assert self.v is not None
        assert self.grid is not None
        grid, cost = self.grid[:, None], self.grid**2 * float(bounds.sum()) / 2  # (K, 1), (K,)
        threshold = self.threshold + math.log(len(self.grid))

        def refuted(m: float) -> bool:
            gains = influence(grid * (a - b * m)).sum(-1) - cost  # (K,)
            return bool(np.logaddexp.reduce(gains) >= threshold)

        if math.isfinite(known) and not refuted(known):
            return known
        step = stride = math.sqrt(self.v)
        low, high = known, max(centre, known)
        while refuted(high):
            low, high, stride = high, high + stride, 2 * stride
        if not math.isfinite(low):
            low, stride = high - step, step
            while not refuted(low):
                high, stride = low, 2 * stride
                low -= stride
        while high - low > TOLERANCE * step:
            middle = (low + high) / 2
            low, high = (middle, high) if refuted(middle) else (low, middle)
        return low


def read(sequence: Sequential, drawn: Sequence[int], window: Callable[[int], tuple[float, int]]) -> Progress:
    """Read windows in the order drawn until the case is decided or the text ends.

    Args:
        sequence: fresh.
        drawn: permutation of all windows, from `order`.
        window: index in text order -> (mean of candidate - reference NLL in nats, scored tokens).
    """
    if len(drawn) != sequence.windows:
        raise ValueError(f"{len(drawn)} windows drawn of {sequence.windows}")
    for index in drawn:
        state = sequence.update(*window(int(index)))
        if state.decided:
            break
    return state
