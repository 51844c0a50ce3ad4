"""Prefill and decode of quantized models: ours, bitsandbytes', torchao's and optimum-quanto's, in turns."""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.report import markup
from studies import pages
from studies.performance.engine import kept, text
from studies.performance.peers import Unable, Worker, embedded, interleaved, middle

REPETITIONS = 7
TOKENS = 8  # of a turn's decode
PROMPT = 128  # tokens of a prefill
MEBIBYTES = 512  # that the memory's pace is measured on
SUBJECTS = (  # kind, subject, dtype
    ("harness", "fp32", "fp32"),
    ("harness", "bf16", "bf16"),
    ("harness", "absmax-int8", "fp32"),
    ("harness", "absmax-int8:compute=bf16", "fp32"),
    ("harness", "absmax-int8:compute=fused", "fp32"),
    ("harness", "absmax-int8-w8a8", "fp32"),
    ("harness", "zeropoint-int8", "fp32"),
    ("harness", "bnb-int8", "fp32"),
    ("torchao", "int8", "fp32"),
    ("torchao", "int8-activations", "fp32"),
    ("quanto", "int8", "fp32"),
    ("harness", "nf4", "fp32"),
    ("harness", "nf4:compute=bf16", "fp32"),
    ("harness", "nf4:compute=fused", "fp32"),
    ("harness", "linear-int4", "fp32"),
    ("harness", "linear-int4:compute=fused", "fp32"),
    ("harness", "bnb-nf4", "fp32"),
)
PERPLEXITIES = (  # the first one multiplies many rows by the dequantized weight in fp32
    "absmax-int8", "absmax-int8:compute=bf16", "absmax-int8:compute=fused", "absmax-int8-w8a8"
)  # fmt: skip
PROFILED = (
    ("fp32", "prefill"),
    ("fp32", "decode"),
    ("absmax-int8", "prefill"),
    ("absmax-int8", "decode"),
    ("absmax-int8:compute=bf16", "prefill"),
    ("absmax-int8:compute=bf16", "decode"),
    ("absmax-int8:compute=fused", "prefill"),
    ("absmax-int8:compute=fused", "decode"),
    ("absmax-int8-w8a8", "prefill"),
    ("nf4", "prefill"),
    ("nf4", "decode"),
    ("nf4:compute=fused", "prefill"),
    ("nf4:compute=fused", "decode"),
    ("linear-int4", "decode"),
)
PEERS = ("bnb-int8", "torchao int8", "quanto int8")
FIGURES = (  # of what, over what, kind of work, at least
    *((ours, "fp32", work, least) for ours in PERPLEXITIES for work, least in (("prefill", 2.0), ("decode", 1.3))),
    *(("absmax-int8", peer, work, 1.0) for peer in PEERS for work in ("prefill", "decode")),
    *(
        (ours, "fp32", work, least)
        for ours in ("nf4", "nf4:compute=fused", "linear-int4", "linear-int4:compute=fused")
        for work, least in (("prefill", 1 / 1.5), ("decode", 1.0))
    ),
)


def named(kind: str, subject: str) -> str:
    """As the tables say it."""
    return subject if kind == "harness" else f"{kind} {subject}"


def perplexities(workers: Mapping[str, Worker]) -> dict[str, float]:
    """Perplexity of the beginning of the text."""
    found = {}
    with tempfile.TemporaryDirectory() as home:
        path = text(Path(home))
        for name in [name for name in PERPLEXITIES if name in workers]:
            workers[name].ask("read", text=str(path), protocol="chunk:512")
            found[name] = math.exp(float(np.mean(workers[name].ask("nll"))))
    return found


def measure(models: Sequence[str]) -> dict[str, Any]:
    """Every subject on the embedded model; one that cannot run is told, not hidden."""
    folder, workers, unable = embedded(), {}, {}
    for kind, subject, dtype in SUBJECTS:
        try:
            workers[named(kind, subject)] = Worker(kind, subject, folder, dtype)
            workers[named(kind, subject)].ask("decode")
        except Unable as error:
            unable[named(kind, subject)] = str(error)
            workers.pop(named(kind, subject), None)
    requests: dict[str, dict[str, Any]] = {"prefill": {"do": "prefill"}, "decode": {"do": "decode", "tokens": TOKENS}}
    times = {
        work: interleaved({name: (worker, request) for name, worker in workers.items()}, REPETITIONS)
        for work, request in requests.items()
    }
    limits = interleaved(
        {
            "products": (workers["fp32"], {"do": "products", "rows": PROMPT, "scored": 1}),
            "reading": (workers["fp32"], {"do": "reading", "mebibytes": MEBIBYTES}),
        },
        REPETITIONS,
    )
    storage = {name: worker.ask("storage") for name, worker in workers.items()}
    quality = perplexities(workers)
    profiles = [(name, work, workers[name].ask("profile", work=work)) for name, work in PROFILED if name in workers]
    for worker in workers.values():
        worker.close()
    told = {"storage": storage, "quality": quality, "unable": unable, "profiles": profiles}
    return {"int8": {"times": times, "limits": limits, **told}}


def render(results: Mapping[str, Any]) -> str:
    """The tables."""
    found = results["int8"]
    middles = {work: {name: middle(found["times"][work][name]) for name in found["storage"]} for work in found["times"]}
    rows = [
        [
            f"`{name}`",
            *(f"{1e3 * middles[work][name]:.1f}" for work in ("prefill", "decode")),
            *(f"{middles[work]['fp32'] / middles[work][name]:.2f}" for work in ("prefill", "decode")),
            f"{found['storage'][name] / 2**20:.2f}",
            f"{1e3 * middle(found['limits']['reading']) * found['storage'][name] / 2**20 / MEBIBYTES:.1f}",
        ]
        for name in found["storage"]
    ]
    figures = []
    for ours, other, work, least in FIGURES:
        if ours in middles[work] and other in middles[work]:
            ratio = middles[work][other] / middles[work][ours]
            figures.append([f"`{ours}`", other, work, f"{ratio:.2f}", f"{least:.2f}", kept(ratio >= least)])
    exact = found["quality"]["absmax-int8"]
    quality = "; ".join(
        f"`{name}` {value:.3f} ({100 * (value / exact - 1):+.2f}%)" for name, value in found["quality"].items()
    )
    products = 1e3 * middle(found["limits"]["products"])
    unable = "".join(f"\n- {name} could not run: {why}" for name, why in found["unable"].items())
    profiles = [
        [f"`{name}`", work, ", ".join(f"{key} {100 * share:.0f}%" for key, share in shares)]
        for name, work, shares in found["profiles"]
    ]
    head = ["", "prefill(128) ms", "decode ms", "fp32 / it: prefill", "decode", "storage MiB", "to read it once, ms"]
    return (
        f"## int8 and 4-bit\n\nMedians of {REPETITIONS} turns, every model in a process of its own, fp32 activations "
        f"outside the products. A turn's decode is the mean of {TOKENS} tokens, behind one that is not timed: nobody "
        f"decodes a single one, and what other models left in the caches is not theirs to pay for. Limits of the "
        f"machine, in the same run: the linear layers of fp32's prefill alone take {products:.1f} ms; a token's decode "
        f"reads what is stored once, at the pace of a sum over {MEBIBYTES} MiB.\n\n"
        f"{markup.table(head, rows)}\n{unable}\n\n"
        f"{markup.table(['ours', 'against', 'work', 'times as fast', 'wanted', 'reached'], figures)}\n\n"
        f"Perplexity on the beginning of `lee`, against the weight dequantized in fp32: {quality}.\n\n"
        f"Where the time goes (share of one run's processor time):\n\n"
        f"{markup.table(['', 'work', 'operations'], profiles)}"
    )


if __name__ == "__main__":
    try:
        raise SystemExit(
            pages.run(
                pages.Document("int8", "Speed of int8 and 4-bit products", measure, render, script="performance.int8")
            )
        )
    except Unable as error:
        sys.exit(f"studies/performance/int8.py: {error}")
