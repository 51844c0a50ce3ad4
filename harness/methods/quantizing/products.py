"""Products with int8 codes as they lie, without a dequantized weight in fp32: activations in bf16, or in int8.

An int8 code is a whole number below 2^8, so bf16 holds it exactly, and a product of bf16 matrices sums in fp32: what
is rounded is the activation, and each sum once, to 8 bits of significand. Where activations are in bf16, processors
without bf16 products in tiles (AMX) keep the dequantized weight: there the detour is slower, and figures recorded there
stay what they are. `compute=bf16` asks for these roundings on every processor, whatever the activations are in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.core.contracts import AS_MODEL
from harness.methods.quantizing import cpu, fused

TILES = frozenset({"amx_bf16"})
TINY = 2.0**-126  # smallest normal fp32: a row of zeros keeps its zeros
STEP = 16  # channels that torch 2.13's kernel reads at a time: where they do not divide `in`, it reads past the row
TURING = (7, 5)  # the first CUDA devices with int8 products in tensor cores; torch._int_mm asks for more than 16 rows
FEW_ROWS = 8  # rows up to which reading codes as they lie surely beats unpacking them: studies/performance/ways.py


def quick(x: Tensor) -> bool:
    """Whether x is in bf16 already, where products of it in tiles are the quicker ones; fp32 is never rounded."""
    return x.dtype == torch.bfloat16 and tiled(x)


def tiled(x: Tensor) -> bool:
    """Whether bf16 products run in tiles where x lies."""
    return x.device.type == "cpu" and bool(TILES & cpu.cpu_flags())


def dequantized(x: Tensor, weight: Tensor, bias: Tensor | None, compute: str = AS_MODEL) -> Tensor:
    """Compute x weight^T + bias; weight (out, in) fp32.

    Args:
        x: (..., in).
        weight: rounded to the dtype of the product.
        bias: (out,) or None.
        compute: `weightmethod.COMPUTE`; where it asks for bf16 and x is not, x is rounded, sums are rounded once.

    Returns:
        (..., out) in x's dtype.
    """
    if compute == AS_MODEL or x.dtype == torch.bfloat16:
        return cpu.linear(x, weight.to(x.dtype), bias)
    return _finished(x, _rounded_product(x.bfloat16(), weight.bfloat16()).float(), bias)


def plain(x: Tensor, compute: str) -> bool:
    """Whether the product is asked for in fp32, of fp32, and without a gradient: only its sums' order may differ."""
    return x.dtype == torch.float32 and compute == AS_MODEL and not x.requires_grad


def few(x: Tensor, inputs: int) -> bool:
    """Whether x (..., in) has so few rows that `fused` is the quicker product."""
    return x.numel() <= FEW_ROWS * inputs


def of_few_rows(x: Tensor, loops: fused.Loops, bias: Tensor | None) -> Tensor:
    """The product by the loops of `fused`.

    Args:
        x: (..., in), any float dtype, never rounded.
        loops: of the weight.
        bias: (out,) or None.

    Returns:
        (..., out) in x's dtype, summed in fp32.
    """
    rows = x if x.dtype == torch.float32 and x.is_contiguous() else x.float().contiguous()
    found = fused.multiply(rows, loops)
    if bias is not None:
        found += bias
    return found if x.dtype == torch.float32 else found.to(x.dtype)


def in_slabs(x: Tensor, loops: fused.Loops, bias: Tensor | None) -> Tensor:
    """The product with some rows of the weight at a time, which the cache still holds when they are multiplied.

    Args:
        x: (..., in), any float dtype: the weight is rounded to it.
        loops: of the weight.
        bias: (out,) or None.

    Returns:
        (..., out) in x's dtype.
    """
    outputs, inputs = loops.shape
    rows = x.reshape(-1, inputs)  # (M, in)
    found = x.new_empty(rows.shape[0], outputs)
    slab = torch.empty(min(outputs, max(1, fused.SLAB // inputs)), inputs)
    for first in range(0, outputs, len(slab)):
        part = slab[: outputs - first]
        fused.unpack(loops, first, part)
        cpu.into_columns(rows, part.to(x.dtype), bias, found, first)
    return found.view(*x.shape[:-1], outputs)


def _rounded_product(rows: Tensor, weight: Tensor) -> Tensor:
    """The product of bf16 matrices, summed in fp32 and rounded to bf16 on every processor."""
    if rows.device.type != "cpu" or cpu.native(torch.bfloat16):
        return F.linear(rows, weight)
    return F.linear(rows.float(), weight.float()).bfloat16()


def _finished(x: Tensor, sums: Tensor, bias: Tensor | None) -> Tensor:
    """Add the bias in fp32 and give back x's shape and dtype: (M, out) or (..., out) fp32."""
    if bias is not None:
        sums += bias
    shaped = sums.view(*x.shape[:-1], sums.shape[-1])
    return shaped if x.dtype == torch.float32 else shaped.to(x.dtype)  # a token's 200 layers would feel the call


@functools.lru_cache(maxsize=64)  # widths that a model has: some bytes each
def _ones(count: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(count, dtype=torch.bfloat16)


def of_codes(
    x: Tensor, stored: Mapping[str, Tensor], weight: Callable[[], Tensor], bias: Tensor | None, compute: str
) -> Tensor:
    """The product of symmetric int8: in bf16 with the codes where that is asked for or quick, else dequantized.

    Args:
        x: (..., in).
        stored: codes (out, in) int8, scale.
        weight: gives the dequantized weight (out, in) fp32.
        bias: (out,) or None.
        compute: `weightmethod.COMPUTE`.

    Returns:
        (..., out) in x's dtype.
    """
    if quick(x) or compute != AS_MODEL:
        return in_bf16(x, stored["codes"], stored["scale"], bias)
    return dequantized(x, weight(), bias)


def in_bf16(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x (codes scale)^T + bias with activations in bf16: quick where products in tiles are.

    Args:
        x: (..., in), rounded to bf16.
        codes: (out, in) int8.
        scale: fp32, one for all or one an output channel.
        bias: (out,) or None.

    Returns:
        (..., out) in x's dtype.
    """
    outputs, inputs = codes.shape
    rows = x.reshape(-1, inputs).bfloat16()  # (M, in)
    if rows.shape[0] <= FEW_ROWS and inputs % STEP == 0 and tiled(x):
        sums = torch._weight_int8pack_mm(rows, codes, _ones(outputs))  # (M, out) bf16: the scale comes after, in fp32
    else:
        sums = _rounded_product(rows, codes.bfloat16())  # (M, out) bf16
    return _finished(x, torch.mul(sums, scale.view(-1)), bias)  # (M, out) fp32


def multiplies_int8(rows: Tensor, codes: Tensor) -> bool:
    """Whether `torch._int_mm` takes rows (M, in) and codes (out, in) where they lie, in hardware."""
    if not rows.is_cuda:
        return bool(cpu.cpu_flags() & cpu.INT8_FLAGS)
    (count, inputs), outputs = rows.shape, len(codes)
    return torch.cuda.get_device_capability(rows.device) >= TURING and count > 16 and inputs % 8 == outputs % 8 == 0


def in_int8(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The same with each row of activations rounded to int8 by its own absmax: whole-number products, summed exactly.

    s = max|row| / 127, a = round(row / s): |row - a s| <= s / 2. No row depends on another. Exact sums make the
    figures alike on every processor, up to the roundings of s and of the result.
    """
    rows = x.reshape(-1, x.shape[-1]).float()  # (M, in)
    step = rows.abs().amax(dim=1, keepdim=True).div_(127)  # (M, 1)
    whole = torch.div(rows, step.clamp_min_(TINY)).round_().char()  # (M, in)
    product = torch._int_mm if multiplies_int8(whole, codes) else cpu.int8_product
    sums = product(whole, codes.t())  # (M, out) int32
    return _finished(x, torch.mul(sums, step).mul_(scale.view(-1)), bias)  # (M, out) fp32
