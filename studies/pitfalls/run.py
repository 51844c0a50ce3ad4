"""docs/studies/pitfalls.md: each control beside its right counterpart, on the embedded model and on a tiny one."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.core.options import Declared
from harness.core.specification import parse
from harness.core.text import NOTHING, number, perplexity
from harness.inputs.models import checkpoints
from harness.inputs.texts import corpora
from harness.report import markup
from studies import pages
from studies.pitfalls import CONTROLS, Bench, Control

MODELS = ("smollm2-135m", "tiny-gpt2")
TINY_WIDTH, TINY_CHARACTERS = (
    64,
    16,
)  # lines of 24 words in 72 characters: four windows' worth of padding, a cut that cuts
INTRODUCTION = """\
Perplexities that are infinite, or of millions, or of 20,000; a selection that changes nothing; a quantized model that
beats its reference: reports print such figures, and each has a cause that can be built on purpose. Below, each fault
runs beside the right version, on the same weights and text: the fault must bear its mark, the right version must not.
`studies/tests/test_pitfalls.py` runs them on the tiny models, and those that need a model trained on prose on the
embedded one; `studies/tests/test_pages.py` holds the figures on this page to their marks."""


def bench(model: str) -> Bench:
    """A model with the text that suits it."""
    declared = Declared(Path())
    checkpoint = checkpoints.materialise(parse(model), declared)
    if model.startswith("tiny"):
        corpus = corpora.read(parse("synthetic"), declared)
        return Bench(checkpoint, corpus, width=TINY_WIDTH, characters=TINY_CHARACTERS)
    return Bench(checkpoint, corpora.read(parse("lee"), declared))


def measure(models: Sequence[str]) -> dict[str, Any]:
    """Figures of every control on every model."""
    found: dict[str, Any] = {"models": {}, "controls": {control.name: {} for control in CONTROLS}}
    for model in models or MODELS:
        where = bench(model)
        found["models"][model] = {
            "text": where.corpus.name,
            "width": where.width,
            "tokens": where.plan.tokens,
            "vocabulary": len(where.tokenizer),
        }
        for control in CONTROLS:
            if model not in control.models:
                continue
            print(f"{model}: {control.name}", file=sys.stderr)
            shown = control.run(where)
            figures = {"fault": dict(shown.fault), "right": dict(shown.right), "beside": dict(shown.beside)}
            found["controls"][control.name][model] = {**figures, "note": shown.note}
    return found


def figure(name: str, value: float) -> str:
    """One figure: counts whole, perplexities to three decimals, the rest to four digits."""
    if isinstance(value, int):
        return f"{value:,}"
    return perplexity(value) if "perplexity" in name else number(value)


def section(control: Control, results: Mapping[str, Any]) -> str:
    """One control: what goes wrong, what it was reported as, and its figures on every model."""
    parts = [
        f"## {control.pitfall.title}",
        f"`{control.name}`" + (f". Reported: {control.pitfall.reported}." * bool(control.pitfall.reported)),
    ]
    marks = f"The mark: {control.pitfall.mark}. In somebody's table: {control.pitfall.tell}."
    parts += [inspect.cleandoc(control.run.__doc__ or ""), marks]
    for model, shown in results.items():
        pair = shown["fault"], shown["right"]
        words = ["yes" if control.pitfall.symptom(figures) else "no" for figures in pair]
        rows = [[name, *(figure(name, figures[name]) for figures in pair)] for name in shown["fault"]]
        rows += [["**bears the mark**", *words]]
        parts.append(markup.table([f"`{model}`", "fault", "right"], rows, words=(0,)))
        beside = [f"- {name}: {figure(name, value)}" for name, value in shown["beside"].items()]
        parts.append("\n".join([f"- {shown['note']}"] * bool(shown["note"]) + beside))
    return "\n\n".join(part for part in parts if part)


def overview(results: Mapping[str, Any]) -> str:
    """Every control in one line: its first figure on its first model, under the fault and under the right version."""
    rows = []
    first = next(iter(results["models"]))
    for control in CONTROLS:
        if not results["controls"][control.name]:
            continue
        model, shown = next(iter(results["controls"][control.name].items()))
        name = next(iter(shown["fault"]))
        pair = [figure(name, shown[version][name]) for version in ("fault", "right")]
        where = f" (`{model}`)" * (model != first)
        rows.append([f"`{control.name}`", name + where, *pair, control.pitfall.reported or NOTHING])
    return markup.table(["control", f"figure on `{first}`", "fault", "right", "reported"], rows, words=(0, 1, 4))


def render(results: Mapping[str, Any]) -> str:
    """The page."""
    models = [
        [f"`{name}`", facts["text"], f"{facts['tokens']:,}", str(facts["width"]), f"{facts['vocabulary']:,}"]
        for name, facts in results["models"].items()
    ]
    table = markup.table(["model", "text", "tokens", "window", "vocabulary"], models, words=(0, 1))
    found = results["controls"]
    sections = [section(control, found[control.name]) for control in CONTROLS if found[control.name]]
    return "\n\n".join([INTRODUCTION, table, overview(results), *sections])


DOCUMENT = pages.Document(
    "pitfalls", "Pitfalls: faults that reports' figures bear the marks of", measure, render, script="pitfalls.run"
)

if __name__ == "__main__":
    sys.exit(pages.run(DOCUMENT))
