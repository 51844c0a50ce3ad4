"""How far a model's predictions are from the unquantized reference's, on the same windows, side by side.

At scored position i the reference predicts p_i over the vocabulary and the model q_i, softmax in fp32; x_i is the true
token. Windows and scored positions are the protocol's (`protocols`); N scored tokens in all; batch 1.

divergence.kl                nat          lower   sum_i KL(p_i || q_i) / N, KL(p || q) = sum_v p(v) ln(p(v) / q(v));
                                                  detail `median p99 max` over tokens
divergence.same_top          share        higher  share of positions, 0 to 1, where argmax p_i = argmax q_i
divergence.rms_dp            probability  lower   sqrt(sum_i (q_i(x_i) - p_i(x_i))^2 / N); detail: signed `mean` and
                                                  percentiles `p1 p5 p50 p95 p99` of the change, and its `largest` size
divergence.first_divergence  token        higher  greedy continuations of the two models agree on so many tokens before
                                                  they part, 64 where they never do: the median over 4 prompts, which
                                                  are the first 32 tokens of windows spread over the text; decoded
                                                  token by token with a cache; samples: one a prompt, in text order

`count` is N, for first_divergence the prompts. `interval`: Student's t over windows, 95% (`stats.paired_delta`
against zero; of rms_dp the square root of that of its square), an estimate for text like this; with fewer than 8
windows detail `usable` is false. first_divergence has none. Where the context is short, the continuation shrinks to
what it holds (detail `new_tokens`).

A prediction that is not finite is never averaged away: kl is then nan or inf, rms_dp nan, and detail `non_finite`
counts such tokens. Left out: windows with nothing to score, and the reference itself, which differs from itself by
nothing. Equal to: llama.cpp's `--kl-divergence` names the same quantities (mean KLD, same top p, RMS dp) over its own
`half` windows, with 16-bit stored reference logits; no test shows equality.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from harness.core.contracts import Member, Metric, Subject
from harness.core.errors import HarnessError
from harness.core.records import Figure
from harness.core.stats import Estimate, paired_delta
from harness.inputs.models.context import context_of
from harness.inputs.texts.protocols import window_slices

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from harness.metrics.measuring.engine import Divergence

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 4, 32, 64  # a median of 4 is no single prompt's whim
PERCENTILES = (1, 5, 50, 95, 99)
_compared: WeakKeyDictionary[Subject, dict[str, Divergence]] = WeakKeyDictionary()  # by plan, while its subject lives
_agreed: WeakKeyDictionary[Subject, dict[tuple[str, bytes], int]] = WeakKeyDictionary()  # by reference and prompt


def compared(subject: Subject) -> Divergence:
    """Both models over the case's plan: run once, whichever members ask."""
    from harness.metrics.measuring import engine

    plans = _compared.setdefault(subject, {})
    key = f"{subject.case.reference} {subject.plan.token_hash} {subject.plan.protocol_id}"
    if key not in plans:
        both = subject.reference, subject.model
        plans[key] = engine.compare_predictions(*both, subject.plan.windows, device=subject.device.name)
    return plans[key]


def over_windows(subject: Subject, values: NDArray[Any]) -> tuple[Estimate, dict[str, Any]]:
    """Mean of (scored tokens,) values with its interval over windows, and what stands beside every figure here."""
    slices = window_slices(subject.plan)
    numbers = values.astype(np.float64)
    estimate = paired_delta(numbers, np.zeros_like(numbers), slices)
    with np.errstate(invalid="ignore"):  # inf - inf
        mean = float(numbers.mean())
    usual = {"windows": len(slices), "usable": estimate.usable, "non_finite": int((~np.isfinite(numbers)).sum())}
    return Estimate(mean, estimate.low, estimate.high, len(numbers), estimate.usable), usual


def kl(subject: Subject, member: Member) -> Figure:
    """Mean KL divergence, nats a scored token."""
    values = compared(subject).kl
    estimate, detail = over_windows(subject, values)
    finite = bool(np.isfinite(values).all())
    middle, late = np.percentile(values.astype(np.float64), [50, 99]).tolist() if finite else (math.nan, math.nan)
    detail |= {"median": middle, "p99": late, "max": float(values.max())}
    return Figure(estimate.value, member.unit, estimate.count, interval=(estimate.low, estimate.high), detail=detail)


def same_top(subject: Subject, member: Member) -> Figure:
    """Share of positions on whose likeliest token both agree."""
    estimate, detail = over_windows(subject, compared(subject).same_top)
    limits = (max(estimate.low, 0.0), min(estimate.high, 1.0))
    return Figure(estimate.value, member.unit, estimate.count, interval=limits, detail=detail)


def rms_dp(subject: Subject, member: Member) -> Figure:
    """Root mean square of the change of the true token's probability."""
    change = compared(subject).change.astype(np.float64)
    estimate, detail = over_windows(subject, change**2)
    values = np.percentile(change, PERCENTILES) if np.isfinite(change).all() else [math.nan] * len(PERCENTILES)
    detail |= {f"p{at}": float(value) for at, value in zip(PERCENTILES, values, strict=True)}
    detail |= {"mean": float(change.mean()), "largest": float(np.abs(change).max())}
    limits = (float(np.sqrt(np.maximum(estimate.low, 0.0))), float(np.sqrt(estimate.high)))
    return Figure(math.sqrt(estimate.value), member.unit, estimate.count, interval=limits, detail=detail)


def prompts(subject: Subject) -> list[NDArray[np.int64]]:
    """Up to PROMPTS beginnings of windows, (PROMPT_TOKENS,) each, spread evenly over the plan."""
    long = [window.ids for window in subject.plan.windows if len(window.ids) >= PROMPT_TOKENS]
    if not long:
        raise HarnessError(
            f"divergence.first_divergence needs a window of {PROMPT_TOKENS} tokens, and {subject.plan.protocol} gives "
            "none here: choose a wider window or a longer text"
        )
    places = np.linspace(0, len(long) - 1, min(PROMPTS, len(long))).round().astype(int)
    return [long[place][:PROMPT_TOKENS] for place in places.tolist()]


def first_divergence(subject: Subject, member: Member) -> Figure:
    """Median number of tokens on which greedy continuations agree."""
    from harness.metrics.measuring import engine

    model: Any = subject.model
    context = context_of(model.config) or PROMPT_TOKENS + NEW_TOKENS
    new = min(NEW_TOKENS, context - PROMPT_TOKENS)
    if new < 1:
        raise HarnessError(f"divergence.first_divergence: a context of {context} tokens holds no continuation")
    known = _agreed.setdefault(subject, {})  # protocols with the same windows give the same prompts
    agreed = []
    for prompt in prompts(subject):
        key = subject.case.reference, prompt.tobytes()
        if key not in known:
            both = subject.reference, subject.model
            known[key] = engine.first_divergence(*both, prompt, new, subject.device.name)
        agreed.append(known[key])
    detail = {"prompt_tokens": PROMPT_TOKENS, "new_tokens": new, "never": agreed.count(new)}
    samples = tuple(float(count) for count in agreed)
    return Figure(float(statistics.median(agreed)), member.unit, len(agreed), samples=samples, detail=detail)


MEASURES = {
    "divergence.kl": kl,
    "divergence.same_top": same_top,
    "divergence.rms_dp": rms_dp,
    "divergence.first_divergence": first_divergence,
}


METRIC = Metric(
    family="divergence",
    members=(
        Member("divergence.kl", "nat", "lower", paired=True),
        Member("divergence.same_top", "share", "higher", paired=True),
        Member("divergence.rms_dp", "probability", "lower", paired=True),
        Member("divergence.first_divergence", "token", "higher", paired=True),
    ),
    measure=lambda subject, member: MEASURES[member.name](subject, member),
)
