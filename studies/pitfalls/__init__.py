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
from studies.pitfalls import scoring, sink, weights
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
    Control(PITFALLS["padding-scored"], scoring.padding_scored),
    Control(PITFALLS["labels-not-shifted"], scoring.labels_not_shifted),
    Control(PITFALLS["texts-cut"], scoring.texts_cut),
    Control(PITFALLS["empty-scope"], weights.empty_scope),
    Control(PITFALLS["dequantize-every-call"], weights.dequantize_every_call),
    Control(PITFALLS["sentence-average"], scoring.sentence_average),
    Control(PITFALLS["missing-bos"], scoring.missing_bos, models=(EMBEDDED,)),
    Control(PITFALLS["missing-bos-made"], sink.missing_bos_made, models=("tiny-gpt2",)),
    Control(PITFALLS["tied-head-twice"], weights.tied_head_twice, models=(EMBEDDED, "tiny-gpt2")),
    Control(PITFALLS["better-than-reference"], scoring.better_than_reference),
)

__all__ = ["CONTROLS", "EMBEDDED", "TINY", "Bench", "Control", "Shown"]
