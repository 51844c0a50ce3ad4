"""Perplexity of a text, and the paired change to the unquantized reference on the same tokens.

NLL_i = -ln p(x_i | what its window holds before it), in nats, softmax in fp32; which tokens are scored and how windows
are cut is the protocol's (`protocols`). N scored tokens in all, n_w of them in window w, m_w their mean NLL.

perplexity                ppl       lower   exp(sum NLL / N); under gptq exp(mean of m_w)
perplexity.delta          nat       lower   D = ln(PPL / PPL of the reference) = sum(n_w d_w) / N, d_w the window's mean
                                            of (NLL - reference NLL), token for token; interval: Student's t over
                                            windows, 95% (`stats.paired_delta`), unusable below 8 windows.
                                            Under gptq all n_w are equal, so D is there the same ratio of perplexities
perplexity.word           ppl/word  lower   exp(sum NLL / words), rolling only
perplexity.byte           ppl/byte  lower   exp(sum NLL / bytes), rolling only
perplexity.bits_per_byte  bit/byte  lower   sum NLL / (ln 2 * bytes), rolling only

`count` is N; for the delta it is the number of windows that score anything. `spread` is a standard error over windows,
in the figure's unit: SE = sqrt(m / (m - 1) * sum((n_w (m_w - mean))^2)) / N for the mean NLL, m windows, carried over
by the derivative (perplexity * SE); none for fewer than two windows. It speaks of text like this, not of this text.

Words are counted by splitting the original page at white space, bytes in UTF-8, as lm-evaluation-harness does. Where
they come to more than `LONGEST_WORD` bytes each (Chinese, Japanese, Thai, genomes: written without blanks) there are
none to speak of, and the word's figure is left out; token and byte figures stand.

Left out: the first token of a window, unless BOS stands before it (never under rolling); padding; windows with nothing
to score, counted in detail `unscored_windows`. A loss that is not finite is never averaged away: the value is then inf
or nan, and detail `non_finite` counts such tokens. Equal to: Hugging Face's recipe (`stride`), vLLM's test (`chunk`),
GPTQ's evaluation (`gptq`), lm-evaluation-harness (`rolling`) and llama.cpp (`half`) by intent; where a test shows it,
it says with what tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.core.contracts import Member, Metric, Subject
from harness.core.errors import HarnessError, LeftOut
from harness.core.records import Figure
from harness.core.stats import paired_delta
from harness.core.text import plural
from harness.inputs.texts.protocols import aggregate, mean_nll, window_slices

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROLLING = ("rolling",)
LONGEST_WORD = 64  # bytes of the mean word; in scripts with blanks it has some 5 to 25


def standard_error(nll: NDArray[np.float32], slices: Sequence[slice]) -> float | None:
    """Standard error of the mean NLL over windows, nats; None for fewer than two windows or losses not finite."""
    values = nll.astype(np.float64)
    if len(slices) < 2 or not np.isfinite(values).all():
        return None
    counts = np.array([place.stop - place.start for place in slices])  # (windows,)
    sums = np.array([values[place].sum() for place in slices])  # (windows,) nats
    residuals = sums - counts * values.mean()
    return float(math.sqrt(len(slices) / (len(slices) - 1) * float((residuals**2).sum())) / counts.sum())


def describe(subject: Subject, nll: NDArray[np.float32]) -> dict[str, Any]:
    """What stands beside every figure of this family."""
    scoring = len(window_slices(subject.plan))
    return {
        "scored": len(nll),
        "windows": scoring,
        "unscored_windows": len(subject.plan.windows) - scoring,
        "non_finite": int((~np.isfinite(nll)).sum()),
    }


def delta(subject: Subject, nll: NDArray[np.float32]) -> Figure:
    """D with its interval over windows."""
    reference = subject.reference_nll()
    estimate = paired_delta(nll, reference, window_slices(subject.plan))
    detail = describe(subject, nll) | {
        "ratio": float(np.exp(estimate.value)),
        "usable": estimate.usable,
        "same_tokens": int((nll == reference).sum()),  # bit for bit
        "reference_non_finite": int((~np.isfinite(reference)).sum()),
    }
    return Figure(estimate.value, "nat", estimate.count, interval=(estimate.low, estimate.high), detail=detail)


def normalised(subject: Subject, nll: NDArray[np.float32], member: Member) -> Figure:
    """Perplexity a word or byte, or bits a byte."""
    per = "word" if member.name == "perplexity.word" else "byte"
    units = subject.plan.normalisers.get(per, 0)
    if not units:
        raise HarnessError(
            f"{member.name}: the tokenizer cannot say how many {per}s the planned tokens cover: leave out --max-tokens"
        )
    size = subject.plan.normalisers.get("byte", 0) / units
    if per == "word" and size > LONGEST_WORD:
        raise LeftOut(
            f"{member.name}: white space parts this text into {plural(units, 'word')} of {size:,.0f} bytes each, which "
            "are none: perplexity.byte and perplexity.bits_per_byte stand for it"
        )
    error = standard_error(nll, window_slices(subject.plan))
    nats = float(nll.astype(np.float64).sum()) / units
    if member.name == "perplexity.bits_per_byte":
        value, slope = nats / math.log(2), 1 / math.log(2)
    else:
        with np.errstate(over="ignore"):
            value = slope = float(np.exp(nats))
    detail = describe(subject, nll) | {f"{per}s": units, "nats": nats}
    spread = None if error is None else slope * error * len(nll) / units
    return Figure(value, member.unit, len(nll), spread, detail=detail)


def measure(subject: Subject, member: Member) -> Figure:
    """One member for the case in hand."""
    nll = subject.nll()
    if member.name == "perplexity":
        value, error = aggregate(nll, subject.plan), standard_error(nll, window_slices(subject.plan))
        detail = describe(subject, nll) | {"mean_nll": mean_nll(nll, subject.plan)}
        return Figure(value, "ppl", len(nll), None if error is None else value * error, detail=detail)
    return delta(subject, nll) if member.paired else normalised(subject, nll, member)


METRIC = Metric(
    family="perplexity",
    members=(
        Member("perplexity", "ppl", "lower", needs_whole_text=True),
        Member("perplexity.delta", "nat", "lower", paired=True),
        Member("perplexity.word", "ppl/word", "lower", protocols=ROLLING, needs_whole_text=True),
        Member("perplexity.byte", "ppl/byte", "lower", protocols=ROLLING, needs_whole_text=True),
        Member("perplexity.bits_per_byte", "bit/byte", "lower", protocols=ROLLING, needs_whole_text=True),
    ),
    measure=measure,
)
