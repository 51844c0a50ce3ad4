"""Intervals for paired differences, and what else a verdict rests on. numpy only; scipy is met in the tests alone."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95  # of every two-sided interval
FEWEST_WINDOWS = 8  # below it Student's t over windows is shown, but decides nothing
MOST_DEGREES = 1000  # of freedom: beyond, Student's t is its normal limit to three digits
EXACT_RANKS = 200  # beyond, the signed-rank distribution's normal limit is good to 1e-4 and the table is slow


@dataclass(frozen=True)
class Estimate:
    """A number with a two-sided 95% interval, from `count` observations.

    `usable` is False where the interval must not decide anything: too few observations, or a non-finite one (then
    all three numbers are nan).
    """

    value: float
    low: float
    high: float
    count: int
    usable: bool


@dataclass(frozen=True)
class Summary:
    """Order statistics of raw observations, in their unit (linear interpolation between them)."""

    p50: float
    p90: float
    p99: float
    iqr: float  # p75 - p25


def spans(counts: Iterable[int]) -> list[slice]:
    """Where parts of so many entries each lie in one flat array, one after another."""
    return [slice(start, end) for start, end in itertools.pairwise(itertools.accumulate(counts, initial=0))]


def student_coverage(t: float, degrees: int) -> float:
    """P(|T| <= t) of Student's t with a whole number of degrees of freedom, t >= 0.

    The finite sums of Abramowitz and Stegun 26.7.3 and 26.7.4 in theta = arctan(t / sqrt(degrees)).
    """
    theta = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    if degrees == 1:
        return 2 * theta / math.pi
    top = np.arange(2, degrees - 2, 2) if odd else np.arange(1, degrees - 2, 2)
    factors = top / (top + 1) * cosine**2  # ratio of each term to the one before it
    terms = np.concatenate([[cosine if odd else 1.0], factors]).cumprod()
    total = sine * float(terms.sum())
    return 2 / math.pi * (theta + total) if odd else total


@functools.lru_cache(maxsize=1024)
def student_quantile(confidence: float, degrees: int) -> float:
    """The t with P(|T| <= t) = confidence, by bisection over the angle; ValueError outside (0, 1) or below 1 degree."""
    if not 0 < confidence < 1 or degrees < 1:
        raise ValueError(f"no Student t quantile at confidence {confidence}, degrees {degrees}")
    low, high = 0.0, math.pi / 2
    for _ in range(80):  # halves pi/2 below a double's resolution
        middle = (low + high) / 2
        if student_coverage(math.sqrt(degrees) * math.tan(middle), degrees) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def degrees(count: int) -> int:
    """Degrees of freedom of a mean of `count` observations, at least 1."""
    return max(1, min(count - 1, MOST_DEGREES))


def student_mean(value: float, error: float, count: int) -> Estimate:
    """A mean of `count` observations of a known standard error, with Student's t."""
    reach = student_quantile(CONFIDENCE, degrees(count)) * error
    return Estimate(value, value - reach, value + reach, count, True)


def paired_delta(candidate: ArrayLike, reference: ArrayLike, slices: Sequence[slice]) -> Estimate:
    """The token-weighted mean of paired differences, with Student's t over windows.

    D = sum(n_w d_w) / sum(n_w), d_w the mean of candidate - reference over window w's n_w tokens: for per-token NLL
    in nats this is ln(PPL_candidate / PPL_reference). D is exact for the text read; the interval is an estimate
    for text like it. Its standard error is the ratio estimator's, sqrt(m / (m - 1) * sum((n_w (d_w - D))^2)) /
    sum(n_w) over m windows (Cochran, Sampling Techniques, 3rd ed., 6.4), which for equal windows is s / sqrt(m).

    Args:
        candidate: (scored tokens,) in window order.
        reference: the same tokens under the reference.
        slices: one a window, of both arrays; windows that score nothing are left out.

    Returns:
        Estimate in the arrays' unit; `count` windows; `usable` False below 8 windows or with a non-finite loss.

    Raises:
        ValueError: arrays of different shape, not flat, or slices that do not cover them once.
    """
    ours, theirs = np.asarray(candidate, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if ours.shape != theirs.shape or ours.ndim != 1:
        raise ValueError(f"paired losses must be flat and alike, not {ours.shape} and {theirs.shape}")
    spans = [span for span in slices if len(ours[span])]
    counts = np.array([len(ours[span]) for span in spans], dtype=np.float64)  # (windows,)
    if not spans or counts.sum() != len(ours):
        raise ValueError(f"windows hold {counts.sum():.0f} of {len(ours)} losses")
    if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return Estimate(math.nan, math.nan, math.nan, len(spans), False)
    change = ours - theirs  # (scored tokens,)
    means = np.array([change[span].mean() for span in spans])  # (windows,)
    return weighted_mean(means, counts)


def weighted_mean(means: NDArray[np.float64], counts: NDArray[np.float64]) -> Estimate:
    """The ratio estimator over windows: means (m,), tokens a window (m,), all finite; see `paired_delta`."""
    windows = len(means)
    if means.min() == means.max():  # equal to the bit: no rounding of the weighted mean may open the interval
        value, error = float(means[0]), 0.0
    else:
        value = float((counts * means).sum() / counts.sum())
        residuals = counts * (means - value)
        error = math.sqrt(windows / (windows - 1) * float((residuals**2).sum())) / float(counts.sum())
    if windows == 1:
        return Estimate(value, -math.inf, math.inf, 1, False)
    reach = student_quantile(CONFIDENCE, windows - 1) * error
    return Estimate(value, value - reach, value + reach, windows, windows >= FEWEST_WINDOWS)


def walsh_averages(values: ArrayLike) -> NDArray[np.float64]:
    """(x_i + x_j) / 2 for all i <= j, sorted: (..., n) -> (..., n (n + 1) / 2)."""
    data = np.asarray(values, dtype=np.float64)
    first, second = np.triu_indices(data.shape[-1])
    return np.sort((data[..., first] + data[..., second]) / 2)


@functools.lru_cache(maxsize=256)
def signed_rank_tail(count: int, confidence: float) -> int:
    """The largest k with P(T <= k) <= (1 - confidence) / 2 for Wilcoxon's signed-rank T of `count` values; -1 if none.

    Exact up to 200 values (the distribution of a sum of independent ranks, built rank by rank), then its normal limit.
    """
    level = (1 - confidence) / 2
    total = count * (count + 1) // 2
    if count > EXACT_RANKS:
        z = NormalDist().inv_cdf(1 - level)
        return math.floor(total / 2 - 0.5 - z * math.sqrt(count * (count + 1) * (2 * count + 1) / 24))
    chances = np.zeros(total + 1)  # P(T = t)
    chances[0] = 1.0
    for rank in range(1, count + 1):
        shifted = np.concatenate([np.zeros(rank), chances[:-rank]])
        chances = (chances + shifted) / 2
    # a tail that equals the level exactly (2^-n sums) must count as within it
    return int(np.searchsorted(chances.cumsum(), level * (1 + 1e-12), side="right")) - 1


def hodges_lehmann(values: ArrayLike) -> Estimate:
    """The one-sample pseudo-median: median of the Walsh averages, with the interval that inverts Wilcoxon's test.

    Args:
        values: (n,) paired differences, e.g. log ratios of interleaved blocks.

    Returns:
        Estimate in their unit with confidence of at least 95%; below 6 values no such interval exists (2 / 2^5 is
        0.0625) and it is infinite and not usable; a non-finite value makes everything nan.

    Source: Hodges and Lehmann 1963; interval by Tukey, in Hollander and Wolfe, section 3.3.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not len(data):
        raise ValueError(f"a pseudo-median needs a flat list of values, not shape {data.shape}")
    if not np.isfinite(data).all():
        return Estimate(math.nan, math.nan, math.nan, len(data), False)
    averages = walsh_averages(data)
    tail = signed_rank_tail(len(data), CONFIDENCE)
    if tail < 0:
        return Estimate(float(np.median(averages)), -math.inf, math.inf, len(data), False)
    return Estimate(float(np.median(averages)), float(averages[tail]), float(averages[-1 - tail]), len(data), True)


def hodges_lehmann_ratio(candidate_seconds: ArrayLike, reference_seconds: ArrayLike) -> Estimate:
    """The log ratio ln(candidate / reference) over paired blocks, by `hodges_lehmann`.

    A time that is not above zero (a clock too coarse) or not finite makes everything nan and unusable; ValueError
    where the lists differ in length.
    """
    ours = np.asarray(candidate_seconds, dtype=np.float64)
    theirs = np.asarray(reference_seconds, dtype=np.float64)
    if ours.shape != theirs.shape:
        raise ValueError(f"blocks must be paired: {ours.shape} candidate times, {theirs.shape} of the reference")
    positive = (ours > 0) & (theirs > 0) & np.isfinite(ours) & np.isfinite(theirs)
    if not positive.all():
        return Estimate(math.nan, math.nan, math.nan, len(ours), False)
    return hodges_lehmann(np.log(ours / theirs))


def summarise(values: ArrayLike) -> Summary:
    """p50, p90, p99 and interquartile range of (n,) observations; all nan where one is not finite or none is there."""
    data = np.asarray(values, dtype=np.float64)
    if not len(data) or not np.isfinite(data).all():
        return Summary(math.nan, math.nan, math.nan, math.nan)
    p25, p50, p75, p90, p99 = (float(value) for value in np.percentile(data, [25, 50, 75, 90, 99]))
    return Summary(p50, p90, p99, p75 - p25)


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given: reject those at or under the session's error rate.

    ValueError for a value outside [0, 1]. Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    values = np.asarray(pvalues, dtype=np.float64)
    if values.size and not ((values >= 0) & (values <= 1)).all():
        raise ValueError("a p value lies outside [0, 1]")
    order = np.argsort(values, kind="stable")
    scaled = np.minimum(values[order] * np.arange(len(values), 0, -1), 1.0)
    adjusted = np.empty(len(values))
    adjusted[order] = np.maximum.accumulate(scaled)
    return adjusted.tolist()
