"""fp32 products by MKL (`F.linear`) and by oneDNN, and quantized ones by how much of a weight is unpacked at a time."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from harness.core.specification import parse
from harness.methods import absmax_int8, nf4
from harness.methods.quantizing import arguments, products
from harness.report import markup
from studies import pages

# (in, out) of the layers of SmolLM2-135M, gpt2, OLMo-1B and Phi-3-mini that are alike in shape
SHAPES = (
    (576, 1536), (1536, 576), (576, 576), (768, 3072), (3072, 768), (768, 2304), (768, 768),
    (2048, 8192), (8192, 2048), (2048, 2048), (3072, 16384), (8192, 3072), (3072, 3072),
)  # fmt: skip
LARGE = ((768, 3072), (2048, 8192), (8192, 2048), (3072, 16384), (8192, 3072))
ROWS = (128, 512)
SLABS = (2**18, 2**20, 2**22, 2**24, 2**62)  # elements at a time; the last: whole
METHODS = {"absmax-int8": absmax_int8.METHOD, "nf4": nf4.METHOD}
OPERATIONS = 2e10  # a shape's repetitions together, about
Work = Callable[[], object]


def medians(works: Mapping[str, Work], operations: int) -> dict[str, float]:
    """Seconds of each, taken in turns whose order alternates, behind two runs that do not count."""
    repetitions = max(7, min(40, int(OPERATIONS / operations)))
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(-2, repetitions):
        for name in list(works)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            works[name]()
            if turn >= 0:
                found[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in found.items()}


def plain(rows: int, inputs: int, outputs: int) -> dict[str, float]:
    """Seconds of both fp32 products."""
    x, weight = torch.randn(1, rows, inputs), torch.randn(outputs, inputs)
    works: dict[str, Work] = {
        "MKL": lambda: nn.functional.linear(x, weight),
        "oneDNN": lambda: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""),
    }
    return medians(works, 2 * rows * inputs * outputs)


def quantized(rows: int, inputs: int, outputs: int) -> dict[str, dict[str, float]]:
    """Seconds of a method's layer by slab, and of the fp32 layer that it stands for."""
    layer, x = nn.Linear(inputs, outputs, bias=False), torch.randn(1, rows, inputs)
    found = {}
    for name, method in METHODS.items():
        holder = nn.Module()
        holder.layers = nn.ModuleList([layer])
        method.sketch(holder, arguments.resolve(parse(name), method, "cpu"))
        ours = holder.layers[0]

        def sliced(slab: int, ours: nn.Module = ours) -> None:
            with patch.object(products, "SLAB", slab):
                ours(x)

        works: dict[str, Work] = {"fp32": lambda: layer(x)}
        works |= {str(slab): (lambda slab=slab: sliced(slab)) for slab in SLABS}  # type: ignore[misc]
        found[name] = medians(works, 2 * rows * inputs * outputs)
    return found


def measure(models: Sequence[str]) -> dict[str, Any]:
    """All shapes, the plain ones also with one thread."""
    cores, singles, slabs = len(os.sched_getaffinity(0)), [], []
    with torch.inference_mode():
        for threads in dict.fromkeys((cores, 1)):
            torch.set_num_threads(threads)
            for rows in ROWS:
                for inputs, outputs in SHAPES:
                    seconds = plain(rows, inputs, outputs)
                    singles.append({"threads": threads, "rows": rows, "shape": [inputs, outputs], "seconds": seconds})
        torch.set_num_threads(cores)
        for rows in ROWS:
            slabs += [{"rows": rows, "shape": list(shape), "seconds": quantized(rows, *shape)} for shape in LARGE]
    return {"products": singles, "slabs": slabs}


def render(results: Mapping[str, Any]) -> str:
    """Both tables."""
    plains = []
    for one in results["products"]:
        (inputs, outputs), seconds = one["shape"], one["seconds"]
        rates = [2e-9 * one["rows"] * inputs * outputs / seconds[name] for name in ("MKL", "oneDNN")]
        plains.append(
            [str(one["threads"]), str(one["rows"]), f"{inputs} to {outputs}", *(f"{rate:.0f}" for rate in rates),
             f"{rates[1] / rates[0]:.2f}"]
        )  # fmt: skip
    sliced = [
        [str(one["rows"]), "{} to {}".format(*one["shape"]), f"`{name}`",
         *(f"{seconds[str(slab)] / seconds['fp32']:.2f}" for slab in SLABS)]
        for one in results["slabs"]
        for name, seconds in one["seconds"].items()
    ]  # fmt: skip
    sizes = [f"{4 * slab // 2**20} MiB" for slab in SLABS[:-1]]
    return (
        "## Whose fp32 product, and how much of a weight at a time\n\n"
        "Evaluations and our dequantized products take oneDNN's where `quantizing/cpu.py` says so: on AMD's processors "
        "with AVX512 everywhere, on those with AVX2 alone where several threads make a result wider than its input. A "
        "timed reference keeps `F.linear`, which is MKL's on these processors. Thousands of millions of operations a "
        "second, medians of interleaved runs:\n\n"
        + markup.table(["threads", "rows", "in to out", "MKL", "oneDNN", "oneDNN / MKL"], plains)
        + "\n\nA quantized layer's time over that of the fp32 layer it stands for, by how much of the weight is "
        f"unpacked before it is multiplied; in use is {4 * products.SLAB // 2**20} MiB:\n\n"
        + markup.table(["rows", "in to out", "method", *sizes, "whole"], sliced)
    )


if __name__ == "__main__":
    raise SystemExit(
        pages.run(pages.Document("products", "fp32 products", measure, render, script="performance.products"))
    )
