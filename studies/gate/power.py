"""Part 3 of the gate's bench: how often an error in the scales is seen, by its size."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from harness.core import catalog, stats
from harness.core.options import Declared
from harness.core.records import Case, Verdict
from harness.core.specification import parse
from harness.core.text import NOTHING
from harness.inputs.models import checkpoints
from harness.inputs.texts import protocols, synthetic
from harness.judge import bounds
from harness.judge.rules import RELIABLY, decide
from harness.methods.quantizing import arguments
from harness.methods.quantizing.stored import StoredWeight
from harness.metrics.measuring import engine, sequential
from harness.report import markup

SIZES = (0.0, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02)  # of every scale; 0 is how often nothing is called
TEXTS = 30  # of the same language, each with a seed of its own
WIDTH, WINDOWS = 256, 32  # 8,192 tokens a text
METHOD, MODELS = "absmax-int8", ("tiny-gpt2", "tiny-olmo")
ROOM = 2e-4  # nats above the recorded delta at which the bound of the two bound rules is set
FIRST_SEED = 1000  # past the seeds of the training text and of the text that is measured elsewhere
RULES = {
    "kl": "`divergence.kl` against its record, whole text",
    "fixed": "`perplexity` against its record, paired, whole text",
    "bound": "`perplexity.delta` against a bound, whole text",
    "early": "`perplexity.delta` against that bound, stopped early",
}
PLOT = "gate-power.svg"
COLOURS = {"kl": "#0072B2", "fixed": "#D55E00", "bound": "#009E73", "early": "#222222"}  # Okabe and Ito
MARKERS = {"kl": "o", "fixed": "s", "bound": "^", "early": "x"}
Losses = NDArray[np.float64]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """(windows * (WIDTH - 1), V) of every scored position."""
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=ids[:, :-1], use_cache=False).logits
    return found.flatten(0, 1).float()


def scaled(model: Any, size: float) -> None:
    """Every scale of a model larger by `size`; undone by 1 / (1 + size) - 1."""
    for module in model.modules():
        if isinstance(module, StoredWeight):
            module._buffers["scale"].mul_(1 + size)  # type: ignore[union-attr]


def judged(model: str, place: int, own: Any, reference: Any, tokenizer: Any) -> dict[str, list[Any]]:
    """One text: what each rule says at each size, and how much of the text the early rule read."""
    words = protocols.encode(tokenizer, synthetic.text(WIDTH * WINDOWS, FIRST_SEED + place))
    ids = torch.from_numpy(words).view(WINDOWS, WIDTH)
    targets = ids[:, 1:].flatten()
    theirs = logits(reference, ids)
    losses, kl = [], []
    for size in SIZES:
        scaled(own, size)
        ours = logits(own, ids)
        scaled(own, 1 / (1 + size) - 1)
        losses.append((-ours.log_softmax(-1).gather(-1, targets[:, None])[:, 0]).double().numpy())
        kl.append(float(engine.divergences(theirs, ours, targets)[0].double().mean()))
    base = (-theirs.log_softmax(-1).gather(-1, targets[:, None])[:, 0]).double().numpy()
    return verdicts(model, losses, base, kl)


def verdicts(model: str, losses: Sequence[Losses], base: Losses, kl: Sequence[float]) -> dict[str, list[Any]]:
    """The rules of the harness on losses (positions,) by size; size 0 is the record."""
    rules = bounds.packaged()
    loss, far = (Case(model, METHOD, "t", f"chunk:{WIDTH}", name, "cpu") for name in ("perplexity", "divergence.kl"))
    slices = [slice(start, start + WIDTH - 1) for start in range(0, len(base), WIDTH - 1)]
    recorded = stats.paired_delta(losses[0], base, slices)
    bound = recorded.value + ROOM
    found: dict[str, list[Any]] = {name: [] for name in (*RULES, "read", "change")}
    for nll, distance in zip(losses, kl, strict=True):
        change = stats.paired_delta(nll, losses[0], slices)
        word = decide(change, rules.floor(loss), 1, math.log(rules.allowance(loss)))
        room = max(rules.floor(far), kl[0] * (rules.allowance(far) - 1))
        state = early((nll - base).reshape(WINDOWS, -1).mean(1), recorded, bound)
        found["fixed"].append(word in (Verdict.WORSE, Verdict.BETTER))
        found["kl"].append(abs(distance - kl[0]) > room)
        found["bound"].append(float((nll - base).mean()) > bound)
        found["early"].append(state.decided == "above" or (state.decided == "end" and state.value > bound))
        found["read"].append(state.windows)
        found["change"].append(change.value)
    return found


def early(means: Losses, recorded: stats.Estimate, bound: float) -> sequential.Progress:
    """The sequence over windows in their seeded order, with the recorded variance."""
    counts = [WIDTH - 1] * len(means)
    v = sequential.variance_bound((recorded.low, recorded.high), recorded.count)
    drawn = sequential.order("power", counts).tolist()
    fresh = sequential.Sequential(v, bound, counts=counts)
    return sequential.read(fresh, drawn, lambda at: (float(means[at]), counts[at]))


def measure(texts: int = TEXTS) -> dict[str, Any]:
    """Both models."""
    found: dict[str, Any] = {}
    for model in MODELS:
        checkpoint = checkpoints.materialise(parse(model), Declared(Path()))
        tokenizer = checkpoints.tokenizer(checkpoint)
        opened = []
        for name in (METHOD, "fp32"):
            method = catalog.methods()[name]
            opened.append(method.load(checkpoint, arguments.resolve(parse(name), method, "cpu"), "cpu"))
        own, reference = opened
        results = [judged(model, place, own, reference, tokenizer) for place in range(texts)]
        print(f"power: {model}", file=sys.stderr)
        found[model] = over(results)
    return summary(found, texts)


def over(results: Sequence[Mapping[str, Sequence[Any]]]) -> dict[str, list[float]]:
    """Means over texts, by size."""
    return {
        name: [float(np.mean([result[name][at] for result in results])) for at in range(len(SIZES))]
        for name in (*RULES, "read", "change")
    }


def summary(found: Mapping[str, Any], texts: int) -> dict[str, Any]:
    """The results as kept."""
    tokens = WIDTH * WINDOWS
    return {"models": found, "sizes": list(SIZES), "texts": texts, "tokens": tokens, "room": ROOM, "windows": WINDOWS}


def reliable(detected: Sequence[float], sizes: Sequence[float]) -> float | None:
    """The smallest size that nine of ten texts see, and every larger one too."""
    seen = [size for at, size in enumerate(sizes) if size and min(detected[at:]) >= RELIABLY]
    return min(seen, default=None)


def plots(found: Mapping[str, Any]) -> dict[str, str]:
    """Detection against size, one panel a model."""
    import matplotlib
    from matplotlib.figure import Figure

    from harness.report.plots import STYLE

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        canvas = Figure(figsize=(9.0, 3.8), layout="constrained")
        panels = canvas.subplots(1, len(found["models"]), sharey=True, squeeze=False)[0]
        sizes = [100 * size for size in found["sizes"][1:]]
        for panel, (model, told) in zip(panels, found["models"].items(), strict=True):
            for shift, name in enumerate(RULES):
                label = RULES[name].replace("`", "")
                style = {"marker": MARKERS[name], "color": COLOURS[name], "markersize": 5 + 1.5 * (shift == 3)}
                style["linewidth"] = 4.0 if name == "bound" else 1.5  # the early rule often lies on it
                panel.plot(sizes, [100 * part for part in told[name][1:]], label=label, fillstyle="none", **style)
            panel.axhline(100 * RELIABLY, color="#8A8A8A", linewidth=0.8, linestyle="--")
            panel.set_xscale("log")
            panel.set_xticks(sizes, [f"{size:g}" for size in sizes])
            panel.minorticks_off()
            panel.set_title(model)
            panel.set_xlabel("error of every scale, percent")
        panels[0].set_ylabel(f"texts in which it is seen, percent of {found['texts']}")
        canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        return {PLOT: buffer.getvalue()}


def render(found: Mapping[str, Any]) -> str:
    """The section."""
    parts = [
        f"Every scale of `{METHOD}` too large by 0.02% to 2%, over {found['texts']} texts of "
        f"{found['tokens']:,} tokens in {found['windows']} windows, each held against its own record. Two rules ask "
        "whether a figure is still what was recorded; two whether the loss stays under a bound, here "
        f"{100 * math.expm1(found['room']):.2g}% above the recorded delta, with the whole text or with `--stop-early`. "
        f"*Seen reliably*: in {100 * RELIABLY:.0f}% of texts, at that size and every larger one.",
        f"![Detection against the size of a scale error]({PLOT})",
    ]
    for model, told in found["models"].items():
        lines = []
        for name, words in RULES.items():
            least = reliable(told[name], found["sizes"])
            seen = f"{100 * least:g}%" if least else f"none up to {100 * found['sizes'][-1]:g}%"
            lines.append([words, *(f"{100 * part:.0f}" for part in told[name]), seen])
        read = [f"{value:.1f}" for value in told["read"]]
        lines.append([f"windows read early, of {found['windows']} (mean)", *read, NOTHING])
        lines.append(["change of NLL, nat (mean)", *(f"{value:+.1e}" for value in told["change"]), NOTHING])
        headers = [f"`{model}`: percent of texts, error of", *(f"{100 * size:g}%" for size in found["sizes"])]
        parts.append(markup.table([*headers, "seen reliably from"], lines, words=(0,)))
    return "\n\n".join(parts)
