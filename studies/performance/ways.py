"""Ways to multiply by quantized weights with what torch has: one token's and one prompt's products of a whole model."""

from __future__ import annotations

import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.methods.quantizing import int4, int8, products
from harness.methods.quantizing.codes import Codes
from harness.methods.quantizing.compiled import Loops
from harness.report import markup
from studies import pages

# of SmolLM2-135M: 30 layers of q, o, k, v, gate, up, down as (out, in); 106M weights, none of them in the cache twice
SHAPES = ((576, 576), (576, 576), (192, 576), (192, 576), (1536, 576), (1536, 576), (576, 1536)) * 30
ROWS = (1, 2, 4, 8, 16, 128)
REPETITIONS = 5
BLOCK = 64
Way = Callable[[int, Tensor], Tensor]


def loops_of(lying: Codes, shape: tuple[int, int], *block: int, **stored: Tensor) -> Loops:
    """The compiled loops, without which most ways of this page are not there."""
    loops = lying.loops(stored, shape, *block)
    assert loops is not None, "install numba"
    return loops


class Weights:
    """Random weights of SHAPES in every form that a way wants."""

    def __init__(self) -> None:
        made = torch.Generator().manual_seed(0)
        self.int8 = [torch.randint(-127, 128, shape, dtype=torch.int8, generator=made) for shape in SHAPES]
        self.fp32 = [weight.float() for weight in self.int8]
        self.bf16 = [weight.bfloat16() for weight in self.int8]
        self.scale = [torch.rand(shape[0], 1, generator=made) for shape in SHAPES]
        self.packed = [
            torch.randint(0, 256, (weight.numel() // 2,), dtype=torch.uint8, generator=made) for weight in self.int8
        ]
        self.absmax = [torch.rand(weight.numel() // BLOCK, generator=made) for weight in self.int8]
        self.levels = torch.randn(16, generator=made)

        self.loops8 = [
            loops_of(int8.Rows8(), shape, codes=codes, scale=scale)
            for codes, scale, shape in zip(self.int8, self.scale, SHAPES, strict=True)
        ]
        self.loops4 = [  # blocks divide every row of these
            loops_of(int4.Blocks4(tuple(self.levels.tolist())), shape, BLOCK, codes=packed, scale=absmax)
            for packed, absmax, shape in zip(self.packed, self.absmax, SHAPES, strict=True)
        ]

    def four_bit(self, index: int, unpack: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
        """A 4-bit weight by one of two look-ups, its blocks scaled."""
        shape = SHAPES[index]
        values = unpack(self.packed[index], self.levels, shape[0] * shape[1])
        return int4.rescale(values, BLOCK, self.absmax[index]).view(shape)


@functools.cache
def ones(count: int, dtype: torch.dtype) -> Tensor:
    return torch.ones(count, dtype=dtype)


def pairs_of_levels(packed: Tensor, levels: Tensor, count: int) -> Tensor:
    """One byte looked up at a time: what `int4.unpack` does where the count is no multiple of four."""
    pairs = torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=1).view(torch.int64).view(-1)
    return pairs.index_select(0, packed.int()).view(torch.float32)[:count]


def digits(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A fixed-point x as `count` int8 digits to the base 256, most significant first: (count M, in), (M, 1)."""
    step = x.abs().amax(1, keepdim=True) / (127 * 256 ** (count - 1))
    rest, found = (x / step).round_().int(), []
    for _ in range(count - 1):
        low = rest.to(torch.int8)  # wraps: -128..127
        found.append(low)
        rest = rest.sub_(low) >> 8
    return torch.cat([rest.to(torch.int8), *reversed(found)]), step


def by_digits(count: int, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    rows, step = digits(x, count)
    sums = torch._int_mm(rows, weight.t()).view(count, len(x), -1)
    total = sums[0].double()
    for low in sums[1:]:
        total = total.mul_(256).add_(low)
    return total.float().mul_(step).mul_(scale.view(-1))


def by_loops(x: Tensor, loops: Loops) -> Tensor:
    """As a layer has it: few rows while codes are read, more with the unpacked weight."""
    return loops.multiply(x) if len(x) <= products.FEW_ROWS else F.linear(x, loops.decode())


def rounded_inside(x: Tensor, weight: Tensor) -> Tensor:
    """An fp32 product that oneDNN rounds to bf16 by itself."""
    settings: Any = torch.backends.mkldnn
    before = settings.matmul.fp32_precision
    settings.matmul.fp32_precision = "bf16"
    try:
        return F.linear(x, weight.float())
    finally:
        settings.matmul.fp32_precision = before


def ways(kept: Weights) -> dict[str, Way]:
    """Every way by what it is; those marked are in use."""
    eight, scale = kept.int8, kept.scale
    return {
        "fp32 weights": lambda i, x: F.linear(x, kept.fp32[i]),
        "bf16 weights and activations": lambda i, x: F.linear(x.bfloat16(), kept.bf16[i]),
        "int8 by compiled loops (used up to 8 rows)": lambda i, x: by_loops(x, kept.loops8[i]),
        "int8 dequantized to fp32 (used for more)": lambda i, x: F.linear(x, eight[i].float().mul_(scale[i])),
        "int8 to fp32, scale behind the product": lambda i, x: F.linear(x, eight[i].float()).mul_(scale[i].view(-1)),
        "int8 to bf16, bf16 product, scale behind": lambda i, x: torch.mul(
            F.linear(x.bfloat16(), eight[i].bfloat16()), scale[i].view(-1)
        ),
        "`_weight_int8pack_mm` in bf16, scale behind": lambda i, x: torch.mul(
            torch._weight_int8pack_mm(x.bfloat16(), eight[i], ones(len(eight[i]), torch.bfloat16)), scale[i].view(-1)
        ),
        "`compute=bf16` (one of the two above)": lambda i, x: int8.in_bf16(x, eight[i], scale[i], None),
        "`_weight_int8pack_mm` in fp32": lambda i, x: torch._weight_int8pack_mm(x, eight[i], scale[i].view(-1)),
        "int8 to fp32, rounded to bf16 by oneDNN": lambda i, x: rounded_inside(x, eight[i]),
        "activations in one int8 digit (w8a8, used)": lambda i, x: int8.in_int8(x, eight[i], scale[i], None),
        "activations in two int8 digits": lambda i, x: by_digits(2, x, eight[i], scale[i]),
        "activations in three int8 digits": lambda i, x: by_digits(3, x, eight[i], scale[i]),
        "4 bits, two codes a look-up": lambda i, x: F.linear(x, kept.four_bit(i, pairs_of_levels)),
        "4 bits by compiled loops (used)": lambda i, x: by_loops(x, kept.loops4[i]),
        "4 bits, four codes a look-up": lambda i, x: F.linear(x, kept.four_bit(i, int4.unpack)),
        "4 bits by loops, bf16 product (`compute=bf16`)": lambda i, x: products.dequantized(
            x, kept.loops4[i].decode(), None, "bf16"
        ),
    }


def milliseconds(way: Way, rows: Mapping[int, Tensor]) -> float:
    """Median over repetitions of all of a model's products, one behind the other."""
    found = []
    for repetition in range(-1, REPETITIONS):
        start = time.perf_counter()
        for index, (_, inputs) in enumerate(SHAPES):
            way(index, rows[inputs])
        if repetition >= 0:
            found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found)


def measure(models: Sequence[str]) -> dict[str, Any]:
    """All ways at all rows."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    kept, found = Weights(), dict[str, Any]()
    with torch.inference_mode():
        for name, way in ways(kept).items():
            found[name] = {}
            for count in ROWS:
                rows = {width: torch.randn(count, width) for width in {inputs for _, inputs in SHAPES}}
                try:
                    found[name][str(count)] = milliseconds(way, rows)
                except (RuntimeError, AttributeError) as error:
                    print(f"studies/performance/ways.py: {name}: {error}", file=sys.stderr)
                    break
    return {"ways": found}


def render(results: Mapping[str, Any]) -> str:
    """The table."""
    counts = list(next(iter(results["ways"].values())))
    rows = [
        [name, *(f"{times[count]:.1f}" if count in times else "-" for count in counts)]
        for name, times in results["ways"].items()
    ]
    return (
        "## Ways to multiply, and what was not used\n\n"
        f"All {len(SHAPES)} products of the embedded model's layers, one behind the other, on random codes: "
        f"milliseconds, medians of {REPETITIONS}; no attention, norms or head. fp32 activations in, fp32 out.\n\n"
        + markup.table(["way", *(f"{count} row{'s' * (count != '1')}" for count in counts)], rows)
    )


if __name__ == "__main__":
    raise SystemExit(pages.run(pages.Document("ways", "Ways to multiply", measure, render, script="performance.ways")))
