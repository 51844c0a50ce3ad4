"""Known pitfalls: faults that reports' figures bear the marks of, as closed formulas and marks over figures.

A claim names its fault by `Pitfall.name`. The formulas say what a fault makes of right figures, without a model: plain
numbers in, plain numbers out. The demonstrations, each fault beside its right version on models and texts, are
`studies/pitfalls`; `docs/studies/pitfalls.md` shows them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from harness.core.stats import spans

MUCH = 1.5  # times the reference: what no sound protocol or 8-bit code comes near
SLIGHT = 1.02  # times the right figure, where both are of the same tokens and should be equal

Figures = Mapping[str, float]  # by name, the unit in it; perplexities and counts have none


@dataclass(frozen=True)
class Pitfall:
    """One fault."""

    name: str  # as claims and `python -m harness published` refer to it
    title: str
    reported: str  # what a report prints that this explains; "" for a fault that no report's figure needs
    symptom: Callable[[Figures], bool]  # whether figures bear the mark: true of the fault, false of the right version
    mark: str  # the same in words


PITFALLS = {
    pitfall.name: pitfall
    for pitfall in (
        Pitfall(
            "codes-without-scale",
            "Codes used without their scale, whole model",
            "infinite perplexity of an int8 GPT-2",
            lambda found: found["perplexity"] > found["vocabulary"],
            "perplexity above the vocabulary's size, that of a model that knows nothing",
        ),
        Pitfall(
            "codes-without-scale-selective",
            "Codes used without their scale, projections only",
            "perplexities of 46,417,899 and 69,637,184 where half a model is int8",
            lambda found: found["perplexity"] > MUCH * found["reference perplexity"],
            f"perplexity above {MUCH} times the reference's",
        ),
        Pitfall(
            "overflowing-code",
            "The divisor 2^b, whose top code is 0",
            "the formula step = (max - min) / 2^b beside an infinite perplexity",
            lambda found: found["largest error, steps"] > 1,
            "an error of more than one step somewhere",
        ),
        Pitfall(
            "padding-scored",
            "Padding scored",
            "perplexities near 20,000 for GPT-2",
            lambda found: found["perplexity"] > MUCH * found["reference perplexity"],
            f"perplexity above {MUCH} times that of the same texts without padding",
        ),
        Pitfall(
            "labels-not-shifted",
            "Labels not shifted, or shifted twice",
            "perplexities near 20,000 for GPT-2",
            lambda found: found["perplexity"] > MUCH * found["reference perplexity"],
            f"perplexity above {MUCH} times that of next-token labels",
        ),
        Pitfall(
            "texts-cut",
            "Texts cut to 512 characters",
            "31.62 for GPT-2, on texts cut to 512 characters",
            lambda found: found["share of the text read, %"] < 100 and found["perplexity"] > found["whole texts"],
            "part of the text unread, and a higher perplexity for what was read",
        ),
        Pitfall(
            "empty-scope",
            "A scope that matched nothing",
            "'selective' int8 of a Phi-3 that equals the whole-model one to the byte",
            lambda found: found["storage, bytes"] == found["whole-model storage, bytes"],
            "the selection's bytes equal the whole model's",
        ),
        Pitfall(
            "dequantize-every-call",
            "Weights dequantized at every call",
            "int8 that generates eight times slower than fp32",
            lambda found: found["weights dequantized a forward"] > 0,
            "work at every forward that grows with the weights (the time is shown, not asserted)",
        ),
        Pitfall(
            "sentence-average",
            "Perplexities averaged over sentences",
            "perplexities above 200 on the Penn Treebank",
            lambda found: found["perplexity"] > SLIGHT * found["sum / count"],
            f"more than {SLIGHT} times exp(sum NLL / count) over the same tokens",
        ),
        Pitfall(
            "missing-bos",
            "A missing BOS",
            "",
            lambda found: found["perplexity"] > SLIGHT * found["with BOS"],
            f"perplexity above {SLIGHT} times that of the same tokens behind a BOS",
        ),
        Pitfall(
            "missing-bos-made",
            "A missing BOS, in a model made to need it",
            "",
            lambda found: found["perplexity"] > SLIGHT * found["without the sink head"],
            f"perplexity above {SLIGHT} times that of the model without the head that needs BOS",
        ),
        Pitfall(
            "tied-head-twice",
            "A tied head counted twice",
            "a quantized OLMo that holds its head as a copy beside the embedding",
            lambda found: found["bytes counted"] > found["bytes held"],
            "more bytes than the parameters take",
        ),
        Pitfall(
            "better-than-reference",
            "A quantized model 'better' than its reference",
            "FP4 at 13,978 and NF4 at 18,281 beside fp32 at 20,390",
            lambda found: found["delta, nat"] < 0,
            "a negative change of NLL",
        ),
    )
}


def perplexity(nll: ArrayLike) -> float:
    """The exponential of the mean of (tokens,) nats, summed in float64; inf beyond 709 nats."""
    with np.errstate(over="ignore"):
        return float(np.exp(np.asarray(nll, np.float64).mean()))


def in_fp32(nll: ArrayLike) -> float:
    """The same with the exponential in fp32, as torch.exp of an fp32 loss gives it; inf beyond 88.7 nats."""
    with np.errstate(over="ignore"):
        return float(np.exp(np.float32(np.asarray(nll, np.float64).mean())))


def kept_code(value: float, low: float, high: float, divisor: int, bits: int = 8) -> int:
    """The code that a `bits`-bit store keeps of a value in low..high under step = (high - low) / divisor.

    With the divisor 2^bits the maximum gets the code 2^bits, which is kept as 0; 2^bits - 1 is right.
    """
    return round((value - low) * divisor / (high - low)) % (1 << bits)


def restored(code: int, low: float, high: float, divisor: int) -> float:
    """The value code * step + low that such a store gives back."""
    return code * (high - low) / divisor + low


def with_padding(text: float, padding: float, share: float) -> float:
    """Perplexity where padding is scored like text, from that of each; `share` of the positions (0..1) are padding."""
    return math.exp((1 - share) * math.log(text) + share * math.log(padding))


def averaged(nll: ArrayLike, counts: Sequence[int]) -> float:
    """The plain mean of perplexities of pieces: (tokens,) nats, and the tokens of each piece, which add up to them.

    Since exp is convex, it is of equal pieces never below `perplexity`.
    """
    values = np.asarray(nll, np.float64)
    with np.errstate(over="ignore"):
        return float(np.exp([values[span].mean() for span in spans(counts)]).mean())


def tied_twice(held: int, vocabulary: int, width: int) -> int:
    """Bytes counted where a tied head is listed beside its embedding: (vocabulary, width) in fp32 once more."""
    return held + vocabulary * width * 4
