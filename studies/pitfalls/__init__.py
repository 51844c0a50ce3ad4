"""Negative controls: faults that reports' figures bear the marks of, rebuilt beside their right counterparts.

Each control is a function that runs the fault and the right version on one model and text and gives the same figures
of both. Names, marks and symptoms are those of `harness.published.pitfalls`: a symptom is true of the fault and false
of the right version. `docs/studies/pitfalls.md` shows the figures; `studies/tests/test_pitfalls.py` holds the symptoms
on the tiny models, and `studies/tests/test_pages.py` on the embedded model's figures as measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from harness.published.pitfalls import PITFALLS, Pitfall
from studies.pitfalls import scoring, sink, times, weights
from studies.pitfalls.bench import Bench, Shown

EMBEDDED, TINY = "smollm2-135m", ("tiny-gpt2", "tiny-olmo")


@dataclass(frozen=True)
class Control:
    """One fault, shown.

    Attributes:
        pitfall: its name, its mark and what reports print of it.
        run: shows fault and right version; its docstring says what goes wrong.
        models: it is shown on: all, but where a control needs a tied head, a model trained on prose, or its own.
    """

    pitfall: Pitfall
    run: Callable[[Bench], Shown]
    models: tuple[str, ...] = (EMBEDDED, *TINY)

    @property
    def name(self) -> str:
        """The pitfall's."""
        return self.pitfall.name


CONTROLS = (
    Control(PITFALLS["codes-without-scale"], weights.codes_without_scale),
    Control(PITFALLS["codes-without-scale-selective"], weights.codes_without_scale_selective),
    Control(PITFALLS["overflowing-code"], weights.overflowing_code),
    Control(PITFALLS["truncated-codes"], weights.truncated_codes),
    Control(PITFALLS["padding-scored"], scoring.padding_scored),
    Control(PITFALLS["labels-not-shifted"], scoring.labels_not_shifted),
    Control(PITFALLS["labels-shifted-twice"], scoring.labels_shifted_twice),
    Control(PITFALLS["windows-scored-twice"], scoring.windows_scored_twice),
    Control(PITFALLS["batch-denominator"], scoring.batch_denominator),
    Control(PITFALLS["wrong-base"], scoring.wrong_base),
    Control(PITFALLS["reference-on-another-slice"], scoring.reference_on_another_slice),
    Control(PITFALLS["texts-cut"], scoring.texts_cut),
    Control(PITFALLS["empty-scope"], weights.empty_scope),
    Control(PITFALLS["dequantize-every-call"], weights.dequantize_every_call),
    Control(PITFALLS["sentence-average"], scoring.sentence_average),
    Control(PITFALLS["missing-bos"], scoring.missing_bos, models=(EMBEDDED,)),
    Control(PITFALLS["missing-bos-made"], sink.missing_bos_made, models=("tiny-gpt2",)),
    Control(PITFALLS["tied-head-twice"], weights.tied_head_twice, models=(EMBEDDED, "tiny-gpt2")),
    Control(PITFALLS["declared-not-stored"], weights.declared_not_stored),
    Control(PITFALLS["packed-halved-again"], weights.packed_halved_again),
    Control(PITFALLS["one-card-of-several"], weights.one_card_of_several),
    Control(PITFALLS["mean-per-event"], times.mean_per_event),
    Control(PITFALLS["first-pass"], times.first_pass),
    Control(PITFALLS["not-synchronized"], times.not_synchronized),
    Control(PITFALLS["dropout-while-timing"], times.dropout_while_timing),
    Control(PITFALLS["better-than-reference"], scoring.better_than_reference),
)

__all__ = ["CONTROLS", "EMBEDDED", "TINY", "Bench", "Control", "Shown"]
