"""Products on a CPU that stand in for torch's where those are slow there, to the same numbers.

Half precision without half products in hardware, int8 without int8 ones, and wide fp32 results on AMD's processors.
Evaluations run within these; timed cases time what the model itself does.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from harness.core.environment import cpu_facts

NATIVE = {  # instruction sets with products in a half precision; without them torch's half GEMM is 5 to 10 times slower
    torch.float16: frozenset({"avx512_fp16", "amx_fp16", "asimdhp"}),
    torch.bfloat16: frozenset({"avx512_bf16", "amx_bf16", "bf16"}),
}
INT8_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})  # int8 dot products in hardware
INT8_DEPTH = 1023  # products of int8 that fp32 sums exactly: 1023 * 128 * 128 < 2^24
WIDE = 1024  # columns of a result from which blocks of them are the quicker ones, by one thread
WIDEST = 8192  # by several: below, waking them at every block takes what it saves
BLOCK = 512  # columns at a time: 256 to 1024 are alike, one thread or two
ROWS = 32  # from so many on


def cpu_flags() -> frozenset[str]:
    """The processor's instruction sets as Linux names them; empty where it does not say."""
    facts = cpu_facts()
    return frozenset(facts.get("flags", facts.get("Features", "")).split())  # x86, ARM


def amd() -> bool:
    """Whether AMD made the processor."""
    return cpu_facts().get("vendor_id") == "AuthenticAMD"


def native(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of the dtype in hardware; fp32 always."""
    return dtype not in NATIVE or bool(NATIVE[dtype] & cpu_flags())


def linear_in_fp32(module: Any, x: Tensor) -> Tensor:
    """The nn.Linear x W^T + b: half inputs, fp32 products and sums, one rounding.

    A half GEMM rounds exact products of half inputs once, after an fp32 sum; so does this, so the numbers agree but
    for the order of the sum, at the speed of fp32.
    """
    if x.dtype != module.weight.dtype:
        return nn.Linear.forward(module, x)
    bias = None if module.bias is None else module.bias.float()
    return linear(x.float(), module.weight.float(), bias).to(x.dtype)


def linear_in_blocks(module: Any, x: Tensor) -> Tensor:
    """The nn.Linear x W^T + b of a wide fp32 weight, in blocks of its columns."""
    if x.dtype != module.weight.dtype:
        return nn.Linear.forward(module, x)
    return linear(x, module.weight, module.bias)


def wide(weight: Tensor) -> bool:
    """Whether many rows times this (out, in) may sooner be had with some columns of the result at a time.

    MKL does not know AMD's caches: a wide fp32 result takes longer in one call (`docs/studies/performance.md`).
    """
    return weight.dtype == torch.float32 and len(weight) >= WIDE and weight.device.type == "cpu" and amd()


def in_blocks(rows: int, weight: Tensor) -> bool:
    """Whether so many rows are sooner multiplied in blocks by the threads that torch has here."""
    return rows >= ROWS and wide(weight) and (len(weight) >= WIDEST or torch.get_num_threads() == 1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x W^T + b, in blocks of columns where that is quicker: the same sums either way.

    Args:
        x: (..., in).
        weight: (out, in), of x's dtype.
        bias: (out,) or None.

    Returns:
        (..., out).
    """
    if not in_blocks(x.shape[:-1].numel(), weight):
        return functional.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])  # (M, in)
    result = x.new_empty(len(rows), len(weight))
    into_columns(rows, weight, bias, result)
    return result.view(*x.shape[:-1], len(weight))


def into_columns(rows: Tensor, weight: Tensor, bias: Tensor | None, result: Tensor, first: int = 0) -> None:
    """Write the product with some rows of a weight into the columns of `result` that they make.

    Args:
        rows: (M, in).
        weight: (n, in), those rows.
        bias: (out,), the whole weight's, or None.
        result: (M, out).
        first: column of the first of them.
    """
    count = len(weight) // BLOCK if in_blocks(len(rows), weight) else 1
    ends = [BLOCK * index for index in range(count)] + [len(weight)]  # no narrow rest: a column alone sums otherwise
    for start, end in itertools.pairwise(ends):
        part, columns = weight[start:end], slice(first + start, first + end)
        if bias is None:
            torch.mm(rows, part.t(), out=result[:, columns])
        else:
            torch.addmm(bias[columns], rows, part.t(), out=result[:, columns])


def conv1d_in_fp32(module: Any, x: Tensor) -> Tensor:
    """The Conv1D of transformers, x W + b with W (in, out), in the same way."""
    if x.dtype != module.weight.dtype:
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    weight: Tensor = module.weight.float()  # (in, out)
    sums: Tensor = x.float() @ weight + module.bias.float()  # (..., out)
    return sums.to(x.dtype)


@contextmanager
def quick_products(model: nn.Module) -> Iterator[None]:
    """Within, plain linear layers on a CPU take the quicker product: in fp32 (half precision), in blocks (fp32).

    Quantized and otherwise special modules are left alone, and the model is untouched afterwards.
    """
    from transformers.pytorch_utils import Conv1D

    in_fp32 = {nn.Linear: linear_in_fp32, Conv1D: conv1d_in_fp32}
    changed: list[nn.Module] = []
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module) not in in_fp32 or not isinstance(weight, Tensor) or weight.device.type != "cpu":
            continue
        product = in_fp32[type(module)]
        if native(weight.dtype):
            if type(module) is Conv1D or not wide(weight):
                continue
            product = linear_in_blocks
        if "forward" not in vars(module):  # otherwise a hook of another library owns this module's forward
            module.forward = types.MethodType(product, module)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """`torch._int_mm` through fp32, equal to the last bit: (M, K) int8 @ (K, N) int8 -> (M, N) int32.

    An fp32 sum of INT8_DEPTH products of int8 is exact, since 1023 * 128^2 < 2^24; longer rows are summed in int32.
    """
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], INT8_DEPTH):
        part = slice(start, start + INT8_DEPTH)
        total += (a[:, part].float() @ b[part].float()).to(torch.int32)
    return total


@contextmanager
def quick_int8_products() -> Iterator[None]:
    """Within, a CPU without int8 dot products takes `torch._int_mm` through fp32: the same integers, some 20x sooner.

    LLM.int8 spends nearly all of an evaluation there on such processors. Timed cases never come through here except
    `latency.evaluation`, which times this very pass.
    """
    if cpu_flags() & INT8_FLAGS or not cpu_flags():
        yield
        return
    library = torch._int_mm

    def product(a: Tensor, b: Tensor) -> Tensor:
        return int8_product(a, b) if a.device.type == "cpu" else library(a, b)

    torch._int_mm = product  # type: ignore[assignment]
    try:
        yield
    finally:
        torch._int_mm = library
