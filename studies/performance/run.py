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
from studies.performance import engine, int8, loading, session, waiting, ways
from studies.performance.peers import PINS, ROOT

PARTS: Mapping[str, tuple[Callable[[], dict[str, Any]], Callable[[Mapping[str, Any]], str]]] = {
    "engine": (functools.partial(engine.measure, ()), engine.render),
    "beside": (functools.partial(engine.measure_beside, ()), engine.render_beside),
    "int8": (functools.partial(int8.measure, ()), int8.render),
    **{f"loading-{model}": (functools.partial(loading.measure, [model]), loading.render) for model in loading.METHODS},
    "session": (functools.partial(session.measure, ()), session.render),
    "main": (functools.partial(session.measure_main, ()), session.render_main),
    "waiting": (functools.partial(waiting.measure, ()), waiting.render),
    "ways": (functools.partial(ways.measure, ()), ways.render),
}


SHORT = """\
## What falls short, and why

- *The engine against lm-eval*: both run the model's own forward, of which the profile above shows what is no product:
  norms, rotary embedding, activation, residuals. Ours saves what lies behind it (whole logits, their copies), the
  waiting of threads for each other (two windows at a time), and on AMD's processors what MKL wastes on wide results
  (blocks of columns: the table above has runs with and without them, which lie no further apart than runs do). Its rate
  lies beside that of the products alone, one at a time, or above: what is left to save is another forward. The two
  parts measured it at different hours of a noisy machine, and say so by their difference.
- *The mean NLL against lm-eval*: what is apart is lm-eval's log softmax, whose fp32 sums over the vocabulary lean to
  one side. With the softmax of the very same logits taken in fp64, ours agrees far within the figure and lm-eval's own
  answer is as far off as before: the last column of windows two at a time.
- *int8 at prefill*: a product in fp32 takes as long with an unpacked weight as with the model's own, and it is most of
  a prefill (`mm`): no method that rounds no activation is twice as quick on a processor without products of its own for
  bf16 or int8, and none is much quicker than torchao's, which ends in the same product. AVX2's int8 products take three
  instructions for 32 pairs where fp32 takes four, and saturate. `compute=bf16` and w8a8 are quicker where a processor
  has products of its own for them, and say what they round. Threads that sleep between operations weigh more the
  quicker these are: see how threads wait.
- *int8 at decode* of fp32 activations reads codes as they lie, by loops that Numba compiles. `compute=fused` unpacks in
  the cache at prefill too, 4 MiB at a time, and leaves the product to torch: quicker where weights are large, which
  the embedded model's are not, and torch may then sum in another order, so that it is not the default. Tried there:
  slabs of 0.5, 1 and 2 MiB (no quicker: every slab wakes sleeping threads twice), one thread that unpacks (slower),
  threads that each unpack and multiply a part of their own (quicker on layers alone, no quicker in the model), and
  blocks of columns (no quicker by two threads).
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
