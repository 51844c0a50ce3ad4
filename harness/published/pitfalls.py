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
    tell: str  # how to recognise it in somebody's table, without their program


PITFALLS = {
    pitfall.name: pitfall
    for pitfall in (
        Pitfall(
            "codes-without-scale",
            "Codes used without their scale, whole model",
            "infinite perplexity of an int8 GPT-2",
            lambda found: found["perplexity"] > found["vocabulary"],
            "perplexity above the vocabulary's size, that of a model that knows nothing",
            "an infinite perplexity, or one beyond the vocabulary, beside memory figures that look right",
        ),
        Pitfall(
            "codes-without-scale-selective",
            "Codes used without their scale, projections only",
            "perplexities of 46,417,899 and 69,637,184 where half a model is int8",
            lambda found: found["perplexity"] > MUCH * found["reference perplexity"],
            f"perplexity above {MUCH} times the reference's",
            "a perplexity of millions for int8, where any use of the scale costs a few percent",
        ),
        Pitfall(
            "overflowing-code",
            "The divisor 2^b, whose top code is 0",
            "a formula in one report's prose, (max - min) / 2^b, which its program never ran",
            lambda found: found["largest error, steps"] > 1,
            "an error of more than one step somewhere",
            "a formula with 2^b under the line; int8 worse than other people's int4",
        ),
        Pitfall(
            "truncated-codes",
            "Codes truncated instead of rounded",
            "both int8 rows of an OLMo-1B, made by a cast of w / scale",
            lambda found: found["largest error, steps"] > 0.75,
            "an error of more than half a step, always towards 0",
            "int8 rows that cost more than the 0.1% of rounded ones: 1.5% there",
        ),
        Pitfall(
            "padding-scored",
            "Padding scored",
            "no figure of a report: a public program that pads sentences to 512 with a new token and scores it all",
            lambda found: found["perplexity"] > MUCH * found["reference perplexity"],
            f"perplexity above {MUCH} times that of the same texts without padding",
            "a perplexity that changes with batch size or padded length",
        ),
        Pitfall(
            "labels-not-shifted",
            "Labels not shifted",
            "",
            lambda found: found["perplexity"] > MUCH * found["reference perplexity"],
            f"perplexity above {MUCH} times that of next-token labels",
            "perplexities of thousands; a coarser method does better than a finer one",
        ),
        Pitfall(
            "labels-shifted-twice",
            "Labels shifted twice",
            "perplexities of 13,978 to 20,515 for GPT-2 (beside a mean of sentence perplexities)",
            lambda found: found["perplexity"] > MUCH * found["reference perplexity"],
            f"perplexity above {MUCH} times that of next-token labels",
            "perplexities of thousands where FP4 lies below NF4, NF4 below int8 and int8 below fp32",
        ),
        Pitfall(
            "windows-scored-twice",
            "Overlapping windows scored whole, divided by the text's length",
            "218.36 for OLMo-1B on the Penn Treebank, which is 14.98 to the power 1.99",
            lambda found: found["perplexity"] > MUCH * found["sum / count"],
            f"perplexity above {MUCH} times that of the same windows over their own length",
            "windows that overlap by half, and nearly the square of other people's figure; ratios squared too",
        ),
        Pitfall(
            "batch-denominator",
            "A sentence's loss over its batch's tokens",
            "3.05 for Phi-3-mini, the fourth root of 86.5",
            lambda found: MUCH * found["perplexity"] < found["sum / count"],
            f"perplexity below 1/{MUCH} of the same batches' over their own tokens",
            "a perplexity of 2 to 4, ratios to the reference near 1, another figure at another batch size",
        ),
        Pitfall(
            "wrong-base",
            "2 to the power of nats",
            "48.27 for GPT-Neo-125m, which is 268.5 to the power ln 2",
            lambda found: MUCH * found["perplexity"] < found["sum / count"],
            f"perplexity below 1/{MUCH} of e to the same mean",
            "a figure that is the right one to the power 0.693: 10 for 28, 48 for 268",
        ),
        Pitfall(
            "reference-on-another-slice",
            "Reference and candidate on different slices",
            "a GPT-2 of 55.55 on 30 rows beside its int8 of 51.67 on thousands",
            lambda found: found["tokens of the reference"] != found["tokens of the candidate"],
            "other tokens under the reference than under the candidate",
            "int8 better than its reference by more than a percent, while the other rows are worse",
        ),
        Pitfall(
            "texts-cut",
            "Texts cut to 512 characters",
            "31.62 for GPT-2 on 3,000 articles, each cut to its first 512 characters",
            lambda found: found["share of the text read, %"] < 100 and found["perplexity"] > found["whole texts"],
            "part of the text unread, and a higher perplexity for what was read",
            "a perplexity above public figures of the same model and text, with a maximal length in characters",
        ),
        Pitfall(
            "empty-scope",
            "A scope that matched nothing",
            "'selective' int8 of a Phi-3 that equals the whole-model one to the byte",
            lambda found: found["storage, bytes"] == found["whole-model storage, bytes"],
            "the selection's bytes equal the whole model's",
            "two rows with the same bytes and the same digits of perplexity",
        ),
        Pitfall(
            "dequantize-every-call",
            "Weights dequantized at every call",
            "int8 of a Phi-3 that generates 7.6 to 8 times slower than fp32 on a processor",
            lambda found: found["weights dequantized a forward"] > 0,
            "work at every forward that grows with the weights (the time is shown, not asserted)",
            "a quantized row slower than fp32, the more so the fewer tokens a forward has",
        ),
        Pitfall(
            "sentence-average",
            "Perplexities averaged over sentences",
            "six perplexities near 20,000 for GPT-2 (beside labels shifted twice), and 19.13 for OPT-350m",
            lambda found: found["perplexity"] > SLIGHT * found["sum / count"],
            f"more than {SLIGHT} times exp(sum NLL / count) over the same tokens",
            "a perplexity above public figures of the same text, from a loop that appends one figure a sentence",
        ),
        Pitfall(
            "missing-bos",
            "A missing BOS",
            "",
            lambda found: found["perplexity"] > SLIGHT * found["with BOS"],
            f"perplexity above {SLIGHT} times that of the same tokens behind a BOS",
            "short windows and a perplexity some percent above other people's",
        ),
        Pitfall(
            "missing-bos-made",
            "A missing BOS, in a model made to need it",
            "",
            lambda found: found["perplexity"] > SLIGHT * found["without the sink head"],
            f"perplexity above {SLIGHT} times that of the model without the head that needs BOS",
            "the same, many times over",
        ),
        Pitfall(
            "tied-head-twice",
            "A tied head counted twice",
            "an OLMo that holds its head as a copy beside the embedding; 155.48 MiB for GPT-2 at a byte an element",
            lambda found: found["bytes counted"] > found["bytes held"],
            "more bytes than the parameters take",
            "bytes that exceed the parameters' by vocabulary times width times the width of an element",
        ),
        Pitfall(
            "declared-not-stored",
            "Bytes declared, not stored",
            "118.97 and 393.70 MiB for GPT-2s whose tensors are all fp32",
            lambda found: found["bytes printed"] < found["bytes held"],
            "fewer bytes printed than the model holds",
            "a quarter of the bytes without any 8-bit tensor: no scale is counted, and fp32 products time like fp32",
        ),
        Pitfall(
            "packed-halved-again",
            "Packed elements halved again",
            "39.09 MiB for a GPT-2 in 4 bits",
            lambda found: found["bytes printed"] < found["bytes held"],
            "fewer bytes printed than the codes take",
            "a 4-bit row below an eighth of fp32",
        ),
        Pitfall(
            "one-card-of-several",
            "One card of several",
            "0.78 GB for a Phi-3-mini in NF4 whose FP4 row takes 2.28",
            lambda found: found["bytes printed"] < found["bytes held"],
            "fewer bytes printed than the model holds",
            "a row of the same format at a half or a third of its twin, and less than its codes take",
        ),
        Pitfall(
            "mean-per-event",
            "A profiler's mean per event as a pass",
            "0.72 ms for a forward of an OLMo-1B that took 699",
            lambda found: found["time printed, ms"] < found["wall clock of a pass, ms"] / 2,
            "less than half the wall clock of the pass",
            "times below what reading the weights takes; quantized rows faster the more kernels they add",
        ),
        Pitfall(
            "first-pass",
            "A reference that pays the first pass",
            "fp32 at 86 and 95 ms before int8 at 55 and 57 on one card",
            lambda found: found["passes before timing"] == 0,
            "no pass before the timed ones",
            "whatever is timed first is the slowest; the same model timed twice gives two figures",
        ),
        Pitfall(
            "not-synchronized",
            "No synchronizing",
            "28 to 95 ms for GPT-2 on a card, clocked around calls that return at once",
            lambda found: found["time printed, ms"] < found["wall clock of a pass, ms"] / 2,
            "less than half of what the work takes",
            "times on a card that hardly grow with the length of the input",
        ),
        Pitfall(
            "dropout-while-timing",
            "Dropout active while timing",
            "both int8 rows of a GPT-2 that were set to eval() after they were timed",
            lambda found: found["largest difference between two passes"] > 0,
            "two passes over the same input that differ",
            "a copy built from a configuration, eval() nowhere before the clock; figures that vary with the seed",
        ),
        Pitfall(
            "better-than-reference",
            "A quantized model 'better' than its reference",
            "FP4 at 13,978 and NF4 at 18,281 beside fp32 at 20,390",
            lambda found: found["delta, nat"] < 0,
            "a negative change of NLL",
            "a 4-bit row below the unquantized one",
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
