"""The perplexity engine against lm-evaluation-harness and against its own matrix products: tokens a second."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.metrics.measuring.engine import PASS_TOKENS
from harness.report import markup
from studies import pages
from studies.performance.peers import Unable, Worker, Works, embedded, interleaved, middle

CHARACTERS, WINDOW, REPETITIONS = 4_500, 512, 5  # some 1,000 tokens: two windows, and a run of two minutes
SWEEP = {64: (1, 4, 8, 0), 128: (1, 2, 4, 0), 256: (1, 2, 0), 512: (1, 2, 0)}  # window -> batches; 0: auto
BESIDE = (512, 128)  # windows that run two at a time
SWEPT = 7  # repetitions of a sweep's point


def text(folder: Path) -> Path:
    """The beginning of the embedded text, as a file."""
    from harness.core.options import Declared
    from harness.core.specification import parse
    from harness.inputs.texts import corpora

    whole = corpora.read(parse("lee"), Declared(Path())).documents[0]
    path = folder / "text.txt"
    path.write_text(whole[:CHARACTERS], encoding="utf-8")
    return path


def compared(ours: Worker, peer: Worker) -> dict[str, Any]:
    """NLL of every token and of the whole text, ours against the peer's, and both against the peer's logits in fp64."""
    here, there, exact = np.array(ours.ask("nll")), np.array(peer.ask("nll")), np.array(peer.ask("nll", wide=True))
    return {
        "exact": {name: abs(float((values - exact).mean())) for name, values in (("ours", here), ("lm-eval", there))},
        "mean": abs(float(here.mean() - there.mean())),
        "token": float(np.abs(here - there).max()),
        "answer": abs(float(here.sum()) - peer.ask("total")) / len(here),
    }


def measured(dtype: str, folder: Path, path: Path) -> dict[str, Any]:
    """One dtype: ours, lm-eval, the products alone."""
    ours, peer = Worker("harness", dtype, folder), Worker("lm-eval", "-", folder, dtype)
    tokens = ours.ask("read", text=str(path), protocol=f"rolling:{WINDOW}")
    assert tokens == peer.ask("read", text=str(path), protocol=f"rolling:{WINDOW}")
    works: Works = {
        "ours": (ours, {"do": "score"}),
        "lm-eval": (peer, {"do": "score"}),
        "linear": (ours, {"do": "products", "rows": WINDOW, "scored": WINDOW}),
        "products": (ours, {"do": "products", "rows": WINDOW, "scored": WINDOW, "attention": True}),
    }
    seconds = interleaved(works, REPETITIONS)
    windows = -(-tokens // WINDOW)  # the last one is extended to the left: as much work as any
    for name in ("linear", "products"):
        seconds[name] = [value * windows for value in seconds[name]]
    rates = {name: tokens / middle(values) for name, values in seconds.items()}
    found = {"dtype": dtype, "tokens": tokens, "rates": rates, "seconds": seconds, **compared(ours, peer)}
    found["profile"] = ours.ask("profile", work="score", operations=12, beside=False)
    peer.close()
    found["peaks"] = {}
    found["sweep"] = []
    for window, batches in SWEEP.items():
        ours.ask("read", text=str(path), protocol=f"chunk:{window}")
        points = interleaved({str(batch): (ours, {"do": "score", "batch": batch}) for batch in batches}, SWEPT)
        found["sweep"].append([window, {batch: tokens / middle(values) for batch, values in points.items()}])
        found["peaks"][str(window)] = ours.ask("peak", batch=0)
    ours.close()
    return found


def measure(models: Sequence[str]) -> dict[str, Any]:
    """Both dtypes on the embedded model and text."""
    folder = embedded()
    with tempfile.TemporaryDirectory() as home:
        path = text(Path(home))
        try:
            found = [measured(dtype, folder, path) for dtype in ("fp32", "bf16")]
            return {"engine": found, "pass": PASS_TOKENS, "engine_beside": True}
        except Unable as error:
            sys.exit(f"studies/performance/engine.py: {error}")


def measure_beside(models: Sequence[str]) -> dict[str, Any]:
    """fp32: windows two at a time, one at a time, and lm-eval; tokens a second by window."""
    folder, found = embedded(), []
    with tempfile.TemporaryDirectory() as home:
        path = text(Path(home))
        ours, peer = Worker("harness", "fp32", folder), Worker("lm-eval", "-", folder, "fp32")
        for window in BESIDE:
            tokens = ours.ask("read", text=str(path), protocol=f"rolling:{window}")
            assert tokens == peer.ask("read", text=str(path), protocol=f"rolling:{window}")
            works: Works = {
                "beside": (ours, {"do": "score"}),
                "alone": (ours, {"do": "score", "beside": False}),
                "lm-eval": (peer, {"do": "score"}),
            }
            seconds = interleaved(works, REPETITIONS)
            rates = {name: tokens / middle(values) for name, values in seconds.items()}
            found.append(
                {"window": window, "tokens": tokens, "rates": rates, "seconds": seconds, **compared(ours, peer)}
            )
        ours.close()
        peer.close()
    return {"beside": found}


def render_beside(results: Mapping[str, Any]) -> str:
    """The table."""
    rows = [
        [
            str(one["window"]),
            *(f"{one['rates'][name]:.0f}" for name in ("beside", "alone", "lm-eval")),
            f"{one['rates']['beside'] / one['rates']['alone']:.2f}",
            f"{times:.2f} ({kept(times >= 1.3)})",
            f"{one['mean']:.1e} ({kept(one['mean'] <= 1e-5)}), {one['token']:.1e} ({kept(one['token'] <= 1e-4)})",
            f"{one['exact']['ours']:.1e} ({kept(one['exact']['ours'] <= 1e-5)}), {one['exact']['lm-eval']:.1e}",
        ]
        for one in results["beside"]
        for times in (one["rates"]["beside"] / one["rates"]["lm-eval"],)
    ]
    heads = [
        "window", "two at a time, tokens/s", "one at a time", "lm-eval 0.4.13", "two / one",
        "two / lm-eval, at least 1.3", "NLL apart from lm-eval, at most 1e-5 in the mean and 1e-4 a token (nat)",
        "mean apart from lm-eval's logits with softmax in fp64: ours, lm-eval's own",
    ]  # fmt: skip
    return (
        "## Two windows at a time\n\n"
        "Threads that share a small product wait for each other at every operation. Under methods whose forward keeps "
        f"no state, windows of up to {PASS_TOKENS} tokens therefore run two at a time, each on half of the threads. "
        "On AMD's processors with AVX512 linear layers go by oneDNN's product, where MKL takes its AVX2 kernels. "
        f"`rolling:W` in fp32 over the first {results['beside'][0]['tokens']:,} tokens of `lee`, batch 1, medians of "
        f"{REPETITIONS} interleaved runs. lm-eval's log softmax is torch's in fp32; the last column takes it of "
        f"the same logits in fp64.\n\n{markup.table(heads, rows)}"
    )


def render(results: Mapping[str, Any]) -> str:
    """The tables."""
    rows, sweep, profiles = [], [], []
    for one in results["engine"]:
        ours, peer, linear, limit = (one["rates"][name] for name in ("ours", "lm-eval", "linear", "products"))
        wanted = {"fp32": 1.3, "bf16": 1.5}[one["dtype"]]
        rows.append(
            [
                one["dtype"], f"{ours:.0f}", f"{peer:.0f}", f"{linear:.0f}, {limit:.0f}",
                f"{ours / peer:.2f} (at least {wanted}: {kept(ours / peer >= wanted)})",
                f"{100 * ours / linear:.0f}%, {100 * ours / limit:.0f}% (at least 80%: {kept(ours / limit >= 0.8)})",
                f"{one['mean']:.1e}, {one['token']:.1e}, {one['answer']:.1e}",
                ", ".join(f"{window}: {bytes_ / 2**20:.0f}" for window, bytes_ in one["peaks"].items()),
            ]
        )  # fmt: skip
        shares = ", ".join(f"{key} {100 * share:.0f}%" for key, share in one["profile"])
        profiles.append([one["dtype"], shares])
        for window, points in one["sweep"]:
            best = max(points.values())
            cells = ", ".join(f"{batch}: {rate:.0f}" for batch, rate in points.items() if batch != "0")
            share, auto = points["0"] / best, f"{points['0']:.0f} (batch {results['pass'] // window})"
            sweep.append([one["dtype"], str(window), cells, auto, f"{100 * share:.0f}%: {kept(share >= 0.95)}"])
    before = "" if results.get("engine_beside") else "; measured one window at a time, before two ran beside each other"
    head = [
        "dtype", "ours, tokens/s", "lm-eval 0.4.13", "linear layers alone, with attention's products",
        "ours / lm-eval", "of those rates",
        "NLL apart: mean, a token, lm-eval's own sum (nat/token)", "peak over the model by window, MiB",
    ]  # fmt: skip
    return (
        "## The perplexity engine\n\n"
        f"`rolling:{WINDOW}` over the first {results['engine'][0]['tokens']:,} tokens of `lee`, batch 1, "
        f"medians of {REPETITIONS} interleaved runs{before}.\n\n{markup.table(head, rows)}\n\n"
        "Where the time of one run of ours goes, by torch's operations (`mm`, `addmm`: linear layers, the head's too); "
        "what is not a product is the model's own norms, rotary embedding, activation and residuals, and softmax over "
        f"the vocabulary:\n\n{markup.table(['dtype', 'operations'], profiles)}\n\n"
        "Sweep of batch and window (`chunk:W`), tokens/s by batch. `--batch-size auto` runs as many windows together "
        f"as hold {results['pass']} tokens; the default is batch 1, which recorded figures were measured with. Auto "
        "was timed as a batch of its own: how far it lies from the same batch beside it is how far two measurements of "
        "one thing lie apart here.\n\n"
        f"{markup.table(['dtype', 'window', 'batch: tokens/s', 'auto', 'auto / best, at least 95%'], sweep)}"
    )


def kept(yes: bool) -> str:
    """A figure's verdict."""
    return "yes" if yes else "**no**"


if __name__ == "__main__":
    raise SystemExit(
        pages.run(
            pages.Document("engine", "The perplexity engine's speed", measure, render, script="performance.engine")
        )
    )
