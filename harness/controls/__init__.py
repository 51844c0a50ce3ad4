"""Negative controls: faults that reports' figures bear the marks of, rebuilt beside their right counterparts.

Each control is a function that runs the fault and the right version on one model and text and gives the same figures
of both. Its symptom is a predicate over such figures: true of the fault, false of the right version. `docs/pitfalls.md`
shows the figures; `tests/numerics/test_controls.py` holds the predicates on the tiny models, and
`tests/unit/test_documents.py` on the embedded model's figures as measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from harness.controls import scoring, sink, weights
from harness.controls.bench import Bench, Figures, Shown

EMBEDDED, TINY = "smollm2-135m", ("tiny-gpt2", "tiny-olmo")
MUCH = 1.5  # times the reference: what no sound protocol or 8-bit code comes near
SLIGHT = 1.02  # times the right figure, where both are of the same tokens and should be equal


@dataclass(frozen=True)
class Control:
    """One fault.

    Attributes:
        name: as `python -m harness published` refers to it.
        title: a few words.
        reported: what a report prints that this explains; "" for a fault that no report's figure needs.
        run: shows fault and right version; its docstring says what goes wrong.
        symptom: whether figures bear the mark.
        mark: the same in words.
        models: it is shown on: all, but where a control needs a tied head, a model trained on prose, or its own.
    """

    name: str
    title: str
    reported: str
    run: Callable[[Bench], Shown]
    symptom: Callable[[Figures], bool]
    mark: str
    models: tuple[str, ...] = (EMBEDDED, *TINY)


CONTROLS = (
    Control(
        "codes-without-scale",
        "Codes used without their scale, whole model",
        "infinite perplexity of an int8 GPT-2",
        weights.codes_without_scale,
        lambda found: found["perplexity"] > found["vocabulary"],
        "perplexity above the vocabulary's size, that of a model that knows nothing",
    ),
    Control(
        "codes-without-scale-selective",
        "Codes used without their scale, projections only",
        "perplexities of 46,417,899 and 69,637,184 where half a model is int8",
        weights.codes_without_scale_selective,
        lambda found: found["perplexity"] > MUCH * found["reference perplexity"],
        f"perplexity above {MUCH} times the reference's",
    ),
    Control(
        "overflowing-code",
        "The divisor 2^b, whose top code is 0",
        "the formula step = (max - min) / 2^b beside an infinite perplexity",
        weights.overflowing_code,
        lambda found: found["largest error, steps"] > 1,
        "an error of more than one step somewhere",
    ),
    Control(
        "padding-scored",
        "Padding scored",
        "perplexities near 20,000 for GPT-2",
        scoring.padding_scored,
        lambda found: found["perplexity"] > MUCH * found["reference perplexity"],
        f"perplexity above {MUCH} times that of the same texts without padding",
    ),
    Control(
        "labels-not-shifted",
        "Labels not shifted, or shifted twice",
        "perplexities near 20,000 for GPT-2",
        scoring.labels_not_shifted,
        lambda found: found["perplexity"] > MUCH * found["reference perplexity"],
        f"perplexity above {MUCH} times that of next-token labels",
    ),
    Control(
        "texts-cut",
        "Texts cut to 512 characters",
        "31.62 for GPT-2, on texts cut to 512 characters",
        scoring.texts_cut,
        lambda found: found["share of the text read, %"] < 100 and found["perplexity"] > found["whole texts"],
        "part of the text unread, and a higher perplexity for what was read",
    ),
    Control(
        "empty-scope",
        "A scope that matched nothing",
        "'selective' int8 of a Phi-3 that equals the whole-model one to the byte",
        weights.empty_scope,
        lambda found: found["storage, bytes"] == found["whole-model storage, bytes"],
        "the selection's bytes equal the whole model's",
    ),
    Control(
        "dequantize-every-call",
        "Weights dequantized at every call",
        "int8 that generates eight times slower than fp32",
        weights.dequantize_every_call,
        lambda found: found["weights dequantized a forward"] > 0,
        "work at every forward that grows with the weights (the time is shown, not asserted)",
    ),
    Control(
        "sentence-average",
        "Perplexities averaged over sentences",
        "perplexities above 200 on the Penn Treebank",
        scoring.sentence_average,
        lambda found: found["perplexity"] > SLIGHT * found["sum / count"],
        f"more than {SLIGHT} times exp(sum NLL / count) over the same tokens",
    ),
    Control(
        "missing-bos",
        "A missing BOS",
        "",
        scoring.missing_bos,
        lambda found: found["perplexity"] > SLIGHT * found["with BOS"],
        f"perplexity above {SLIGHT} times that of the same tokens behind a BOS",
        models=(EMBEDDED,),
    ),
    Control(
        "missing-bos-made",
        "A missing BOS, in a model made to need it",
        "",
        sink.missing_bos_made,
        lambda found: found["perplexity"] > SLIGHT * found["without the sink head"],
        f"perplexity above {SLIGHT} times that of the model without the head that needs BOS",
        models=("tiny-gpt2",),
    ),
    Control(
        "tied-head-twice",
        "A tied head counted twice",
        "a quantized OLMo that holds its head as a copy beside the embedding",
        weights.tied_head_twice,
        lambda found: found["bytes counted"] > found["bytes held"],
        "more bytes than the parameters take",
        models=(EMBEDDED, "tiny-gpt2"),
    ),
    Control(
        "better-than-reference",
        "A quantized model 'better' than its reference",
        "FP4 at 13,978 and NF4 at 18,281 beside fp32 at 20,390",
        scoring.better_than_reference,
        lambda found: found["delta, nat"] < 0,
        "a negative change of NLL",
    ),
)

__all__ = ["CONTROLS", "EMBEDDED", "TINY", "Bench", "Control", "Figures", "Shown"]
