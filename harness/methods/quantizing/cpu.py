"""Products on a CPU that stand in for torch's where those are slow there: as exact, and the same but for rounding.

Half precision without half products in hardware, int8 without int8 ones, and fp32 where oneDNN is quicker than MKL.
Evaluations and our own dequantized products run by these; a timed reference is what the model itself does.
"""

from __future__ import annotations

import functools
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
INT8_DEPTH = 2**10  # products of int8 that fp32 sums exactly: 2^10 128^2 = 2^24, up to which it holds whole numbers
INT8_WIDTH = 2**12  # rows of so many codes that are unpacked at a time: 16 MiB
MANY = 32  # rows from which the choice of a product was measured


def cpu_flags() -> frozenset[str]:
    """The processor's instruction sets as Linux names them; empty where it does not say."""
    facts = cpu_facts()
    return frozenset(facts.get("flags", facts.get("Features", "")).split())  # x86, ARM


@functools.cache
def has_onednn() -> bool:
    """Whether torch has oneDNN's fp32 product on one of AMD's processors, which MKL does not know."""
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    amd = cpu_facts().get("vendor_id") == "AuthenticAMD"
    return built and amd and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def by_onednn(weight: Tensor) -> bool:
    """Whether many rows times this (out, in) fp32 weight are sooner multiplied by oneDNN than by MKL (`F.linear`).

    MKL takes its AVX2 kernels on every processor of AMD's. With AVX512 oneDNN has up to twice its rate; with AVX2 alone
    it is quicker where several threads make a wide result, and slower elsewhere (`docs/studies/performance.md`).
    Other makers' processors keep MKL: nobody measured them.
    """
    if not has_onednn():
        return False
    return "avx512f" in cpu_flags() or (torch.get_num_threads() > 1 and weight.shape[0] > weight.shape[1])


def native(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of the dtype in hardware; fp32 always."""
    return dtype not in NATIVE or bool(NATIVE[dtype] & cpu_flags())


def linear_in_fp32(module: Any, x: Tensor) -> Tensor:
    """The nn.Linear x W^T + b: half inputs, fp32 products and sums, one rounding.

    A half GEMM rounds exact products of half inputs once, after an fp32 sum; so does this, at the speed of fp32. Its
    sum runs in another order, so that a result may be the neighbouring half number: on GPT-2's widths 2 to 4 in a
    thousand in fp16, fewer in bf16 (`tests/methods/test_half.py` holds both to torch's own). Losses are those of
    torch's product to some 1e-4, not to the bit.
    """
    if x.dtype != module.weight.dtype:
        return nn.Linear.forward(module, x)
    bias = None if module.bias is None else module.bias.float()
    return linear(x.float(), module.weight.float(), bias).to(x.dtype)


def linear_of_fp32(module: Any, x: Tensor) -> Tensor:
    """The nn.Linear x W^T + b of an fp32 weight."""
    if x.dtype != module.weight.dtype:
        return nn.Linear.forward(module, x)
    return linear(x, module.weight, module.bias)


def conv1d_of_fp32(module: Any, x: Tensor) -> Tensor:
    """The Conv1D of transformers, x W + b with W (in, out) fp32."""
    if x.dtype != module.weight.dtype:
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    return linear(x, module.weight.t(), module.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x W^T + b by the product that is the quickest on this processor; only the sums' order may differ.

    Args:
        x: (..., in).
        weight: (out, in), of x's dtype.
        bias: (out,) or None.

    Returns:
        (..., out).
    """
    if (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() >= MANY * weight.shape[1]
        and (bias is None or (bias.is_contiguous() and len(bias) == len(weight)))  # it reads a bias as it lies
        and not torch.is_grad_enabled()  # it has no gradient
        and by_onednn(weight)
    ):
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result
    return functional.linear(x, weight, bias)


def conv1d_in_fp32(module: Any, x: Tensor) -> Tensor:
    """The Conv1D of transformers, x W + b with W (in, out), in the same way."""
    if x.dtype != module.weight.dtype:
        return type(module).forward(module, x)  # type: ignore[no-any-return]
    sums: Tensor = linear(x.float(), module.weight.float().t(), None) + module.bias.float()  # (..., out)
    return sums.to(x.dtype)


@contextmanager
def quick_products(model: nn.Module) -> Iterator[None]:
    """Within, plain linear layers on a CPU take the quicker product: in fp32 (half precision), by oneDNN (fp32).

    Quantized and otherwise special modules are left alone, and the model is untouched afterwards.
    """
    from transformers.pytorch_utils import Conv1D

    products = {nn.Linear: (linear_in_fp32, linear_of_fp32), Conv1D: (conv1d_in_fp32, conv1d_of_fp32)}
    changed: list[nn.Module] = []
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module) not in products or not isinstance(weight, Tensor) or weight.device.type != "cpu":
            continue
        if type(weight) not in (Tensor, nn.Parameter):  # a library's subclass multiplies in its own way
            continue
        in_fp32, of_fp32 = products[type(module)]
        if native(weight.dtype) and not (weight.dtype == torch.float32 and has_onednn()):
            continue
        if "forward" not in vars(module):  # otherwise a hook of another library owns this module's forward
            product = of_fp32 if weight.dtype == torch.float32 else in_fp32
            module.forward = types.MethodType(product, module)
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def int8_product(a: Tensor, b: Tensor) -> Tensor:
    """`torch._int_mm` through fp32, equal to the last bit: (M, K) int8 @ (K, N) int8 -> (M, N) int32."""
    return whole_sums(a.float(), b.t()).to(torch.int32)


def whole_sums(rows: Tensor, codes: Tensor) -> Tensor:
    """Exact sums of whole numbers by fp32 products, of INT8_DEPTH at a time; int32 sums those.

    Args:
        rows: (M, in), whole numbers of -128..127 in fp32.
        codes: (out, in) int8.

    Returns:
        (M, out), fp32 where one sum of it holds a row, else int32.
    """
    parts = [slice(start, start + INT8_DEPTH) for start in range(0, rows.shape[1], INT8_DEPTH)]
    exact = torch.float32 if len(parts) == 1 else torch.int32
    total = rows.new_zeros(len(rows), len(codes), dtype=exact)
    for part in parts:
        for first in range(0, len(codes), INT8_WIDTH):  # the cache still holds these rows when they are multiplied
            columns = slice(first, first + INT8_WIDTH)
            total[:, columns] += linear(rows[:, part], codes[columns, part].float(), None).to(exact)
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
