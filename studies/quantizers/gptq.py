"""docs/studies/gptq.md: what calibration buys: `gptq-int4` beside `linear-int4`, the same grid and bytes."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.core.text import NOTHING
from harness.report import markup
from studies import pages

MODELS = {  # text, protocol, tokens
    "smollm2-135m": ("lee", "chunk:512", 4096),
    "tiny-gpt2": ("synthetic", "chunk:256", 16384),
    "tiny-olmo": ("synthetic", "chunk:256", 16384),
}
PLAIN, OURS = "linear-int4", "gptq-int4"
LEFT = f"{OURS}:act_order=no"  # from left to right
METHODS = (PLAIN, LEFT, OURS, f"{LEFT}:damp=0.1", f"{LEFT}:seed=1")
MORE = {"smollm2-135m": (f"{LEFT}:text=model",)}  # elsewhere the model's own text is the default


def measure(models: Sequence[str]) -> dict[str, Any]:
    """Every method on every model: bytes, perplexity, difference to the reference and to rounding to nearest."""
    return {name: one_model(name) for name in models or MODELS}


def one_model(name: str) -> dict[str, Any]:
    """One model's table."""
    from harness.core import catalog
    from harness.core.options import Declared
    from harness.core.specification import parse
    from harness.core.stats import paired_delta
    from harness.inputs.models import checkpoints
    from harness.inputs.texts import corpora, protocols
    from harness.methods.quantizing import arguments
    from harness.metrics.measuring import engine

    text, protocol, tokens = MODELS[name]
    here = Declared(Path())
    checkpoint = checkpoints.materialise(parse(name), here)
    tokenizer = checkpoints.tokenizer(checkpoint)
    form = protocols.parse(parse(protocol))
    plan = protocols.plan(corpora.read(parse(text), here), form, tokenizer, context=512, max_tokens=tokens)
    spans = protocols.window_slices(plan)
    losses = {"fp32": engine.score(checkpoints.open_model(checkpoint, "fp32", "cpu"), plan.windows, device="cpu")}
    rows: dict[str, Any] = {}
    for text_of in METHODS + MORE.get(name, ()):
        method = catalog.methods()[parse(text_of).name]
        start = time.monotonic()
        model: Any = method.load(checkpoint, arguments.resolve(parse(text_of), method, "cpu"), "cpu")
        seconds = time.monotonic() - start
        losses[text_of] = engine.score(model, plan.windows, device="cpu")
        delta, gain = (paired_delta(losses[text_of], losses[other], spans) for other in ("fp32", PLAIN))
        rows[text_of] = {
            "bytes": sum(weight.storage for weight in method.quantized(model)),
            "perplexity": math.exp(losses[text_of].astype("float64").mean()),
            "delta": [delta.value, delta.low, delta.high],
            "gain": [gain.value, gain.low, gain.high],
            "seconds": round(seconds, 1),
            "calibration": getattr(model, "calibration", {}),
        }
        print(name, text_of, rows[text_of], file=sys.stderr, flush=True)
    reference = math.exp(losses["fp32"].astype("float64").mean())
    facts = {"text": text, "protocol": protocol, "tokens": plan.tokens, "note": checkpoint.note}
    return {**facts, "perplexity": reference, "methods": rows}


def span(found: Sequence[float]) -> str:
    """A difference with its interval."""
    value, low, high = found
    return f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"


def verdict(name: str, gain: Sequence[float]) -> str:
    """What the interval over rounding allows one to say of a method."""
    _, low, high = gain
    if high < 0:
        return f"`{name}` is better than `{PLAIN}`"
    return f"`{name}` is worse than `{PLAIN}`" if low > 0 else f"`{name}` cannot be told from `{PLAIN}`"


def sample(calibration: Mapping[str, Any]) -> str:
    """What a method looked at."""
    if not calibration:
        return NOTHING
    size = f"{calibration['windows']} x {calibration['tokens_a_window']} tokens"
    return f"`{calibration['text']}`, {size}, seed {calibration['seed']}, ids {calibration['token_sha256'][:12]}"


def render(results: Mapping[str, Any]) -> str:
    """The page."""
    parts = [
        f"""\
GPTQ (Frantar et al. 2022, arXiv:2210.17323) rounds the columns of a matrix one after another and lets those still to
come make up for what is lost, as the inputs of a calibration text weigh it. `gptq-int4` keeps the grid and the bytes of
`{PLAIN}` (symmetric int4 in blocks of 64, an fp32 step each), so the two differ in nothing but the choice of codes.
It calibrates on `lee-50`, 50 news articles of which none is among the 300 of `lee`, where the model's tokenizer reads
English, and else on a text that the model writes itself, with a seed; a text that shares a line with the measured one
is refused. By default columns go by falling strength of their inputs, with `act_order=no` from left to right; that
default was chosen in view of these tables. All intervals are of 95%, over windows."""
    ]
    for name, found in results.items():
        rows = [
            [
                f"`{method}`",
                f"{row['bytes']:,}",
                f"{row['perplexity']:.3f}",
                span(row["delta"]),
                NOTHING if method == PLAIN else span(row["gain"]),
                sample(row["calibration"]),
            ]
            for method, row in found["methods"].items()
        ]
        about = f"`{found['text']}`, `{found['protocol']}`, {found['tokens']:,} tokens; fp32 {found['perplexity']:.3f}."
        parts += [
            f"## {name}\n\n{about}" + (f" Note: {found['note']}." if found["note"] else ""),
            markup.table(
                ["method", "bytes of codes and steps", "perplexity", "over fp32, nat", f"over `{PLAIN}`, nat", "text"],
                rows,
            ),
            "; ".join(verdict(method, row["gain"]) for method, row in found["methods"].items() if method != PLAIN)
            + ".",
        ]
    return "\n\n".join(parts)


DOCUMENT = pages.Document("gptq", "What calibration buys", measure, render, script="quantizers.gptq")

if __name__ == "__main__":
    sys.exit(pages.run(DOCUMENT))
