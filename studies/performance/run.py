"""docs/studies/performance.md: engine, int8 and 4-bit products, loading, session, with peers and physical limits."""

from __future__ import annotations

import datetime
import functools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness.report import markup
from studies import pages
from studies.performance import engine, int8, loading, products, session, waiting, ways
from studies.performance.peers import PINS, ROOT

PARTS: Mapping[str, tuple[Callable[[], dict[str, Any]], Callable[[Mapping[str, Any]], str]]] = {
    "engine": (functools.partial(engine.measure, ()), engine.render),
    "beside": (functools.partial(engine.measure_beside, ()), engine.render_beside),
    "int8": (functools.partial(int8.measure, ()), int8.render),
    **{f"loading-{model}": (functools.partial(loading.measure, [model]), loading.render) for model in loading.METHODS},
    "session": (functools.partial(session.measure, ()), session.render),
    "main": (functools.partial(session.measure_main, ()), session.render_main),
    "waiting": (functools.partial(waiting.measure, ()), waiting.render),
    "products": (functools.partial(products.measure, ()), products.render),
    "ways": (functools.partial(ways.measure, ()), ways.render),
}


SHORT = """\
## What falls short, and why

The tables above say when each part was measured. Those of 2026-11-29 are of the time when threads slept between two
operations and models were frozen: `python -m studies.performance.second_opinion` shows how far such times lie from a
plain script's, and both are as in a plain script now.

- *The engine against lm-eval*: both run the model's own forward, of which the profile above shows what is no product:
  norms, rotary embedding, activation, residuals. Ours saves what lies behind it (whole logits, their copies), the
  waiting of threads for each other (two windows at a time), and on AMD's processors with AVX512 what MKL leaves
  unused there (oneDNN's product).
- *The mean NLL against lm-eval*: what is apart is lm-eval's log softmax, whose fp32 sums over the vocabulary lean to
  one side. With the softmax of the very same logits taken in fp64, ours agrees far within the figure and lm-eval's own
  answer is as far off as before: the last column of windows two at a time.
- *int8 and 4 bits at prefill* unpack a weight and multiply in fp32, which takes as long as with the model's own weight
  where both products are MKL's. On AMD's processors with AVX512 ours is oneDNN's. With AVX2 alone it is MKL's as well,
  but for wide results by several threads: there a prefill of ours takes as long as fp32's and the unpacking beside it.
- *Large weights* are unpacked part by part, which the cache still holds when they are multiplied: the table of
  products has what less and more at a time cost. `compute=fused` differs in half precision alone: few rows go by loops
  there too, and nothing is rounded.
- *An fp32 product that oneDNN rounds to bf16* is not used where the table has it quicker either: the setting is the
  process's, and a processor without bf16 products ignores it, so that figures would depend on the processor.
- *Activations in two or three int8 digits* (16 or 24 bits, sums exact): splitting and joining cost more than the
  products save.
- *4 bits*: loops look 32 levels up in registers and scale them there; in torch that is a look-up an element or a few
  (`index_select`), and one more pass through memory. What is left of a token's time is the model's own operations
  between the products, and the head, which no method of the table quantizes. Torch's own product
  (`_weight_int4pack_mm_for_cpu`) has no table of levels and wants another layout, which differs between processors.
- *Loading from the page cache*: reading is then little more than one copy, and what takes the time is memory that is
  new to the process, page by page (below the table), of which reading into one buffer needs none.
- *The session and the starts of commands*: what lies beside the work is nearly constant, most of it imports: the fork
  server loads torch, transformers, bitsandbytes and Numba once, pytest starts, plots are drawn at the end. So it weighs
  more the shorter a session is, and where the work is quick. `report` draws its plots anew, which is most of its time.
  `compare` of figures that moved also imports numpy, for their intervals. A command imports no other's needs.
- *CUDA*: not run on a card."""
JOINED = {"loading"}  # what several parts measure, a model each
KEPT = ROOT / "docs" / "studies" / "data" / "performance.json"


def measure(parts: Sequence[str]) -> dict[str, Any]:
    """All parts; where some are named (with --models, the pages' word for what to measure), the others stay as kept."""
    found: dict[str, Any] = dict(pages.read(KEPT)["results"]) if parts and KEPT.is_file() else {}
    made: dict[str, Any] = dict(found.get("made", {}))
    for part in parts or PARTS:
        print(f"studies/performance/run.py: {part}", file=sys.stderr, flush=True)
        before, start = os.getloadavg()[0], time.monotonic()
        measured = PARTS[part][0]()
        found |= measured | {key: found[key] | measured[key] for key in found.keys() & measured.keys() & JOINED}
        today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M")
        where = pages.world(time.monotonic() - start)
        made[part] = {"ended": today, "world": where, "load": [before, os.getloadavg()[0]]}
    return {**found, "made": made}


def render(results: Mapping[str, Any]) -> str:
    """Every part that was measured, one after another."""
    rows = [
        [
            part,
            made["ended"],
            pages.machine(made["world"]),
            f"{made['world']['minutes']:.1f}",
            ", ".join(f"{load:.1f}" for load in made["load"]),
        ]
        for part, made in results["made"].items()
    ]
    head = (
        "The command measures every part; `--models engine,int8` these alone and keeps the others, so that the minutes "
        "above may be the last part's. Ratios are of medians from one run of a part. Peers: "
        f"{', '.join(PINS)}, in an environment that the command makes. Load average of this two-core machine before "
        "and after each part: its own work keeps it at about 2, and what lies above is other work, which blurs every "
        "time below.\n\n" + markup.table(["part", "ended (UTC)", "on", "minutes", "load before, after"], rows)
    )
    if absent := [part for part in PARTS if part not in results["made"]]:
        head += f"\n\nNot measured yet: {', '.join(absent)}."
    shown = [render_part(results) for part, (_, render_part) in PARTS.items() if part in results["made"]]
    return "\n\n".join(dict.fromkeys([head, *shown, SHORT]))  # parts that share a table render it alike


DOCUMENT = pages.Document(
    "performance", "As fast as the hardware allows", measure, render, session.curve, script="performance.run"
)

if __name__ == "__main__":
    raise SystemExit(pages.run(DOCUMENT))
