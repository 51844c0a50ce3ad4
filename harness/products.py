"""Products with int8 codes as they lie, without a dequantized weight in fp32: activations in bf16, or in int8.

An int8 code is a whole number below 2^8, so bf16 holds it exactly, and a product of bf16 matrices sums in fp32: what
is rounded is the activation, and each sum once, to 8 bits of significand. Processors without bf16 products in tiles
(AMX) keep the dequantized weight in fp32: there the detour is slower, and figures recorded there stay what they are.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import engine

TILES = frozenset({"amx_bf16"})
TINY = 2.0**-126  # smallest normal fp32: a row of zeros keeps its zeros
STEP = 16  # channels that torch 2.13's kernel reads at a time: where they do not divide `in`, it reads past the row
FEW_ROWS = 4  # rows up to which reading the codes once beats unpacking them: crossing between 4 and 8 on one Xeon


def quick(x: Tensor) -> bool:
    """Whether x is in bf16 already, where products of it in tiles are the quicker ones; fp32 is never rounded."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and bool(TILES & engine.cpu_flags())


def dequantized(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x weight^T + bias in x's dtype; weight (out, in) fp32."""
    return F.linear(x, weight.to(x.dtype), bias)


@functools.lru_cache(maxsize=64)  # widths that a model has: some bytes each
def _ones(count: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones(count, dtype=torch.bfloat16)


def in_bf16(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x (codes scale)^T + bias with activations in bf16, on a processor that is `quick`.

    Args:
        x: (..., in), bf16.
        codes: (out, in) int8.
        scale: fp32, one for all or one an output channel.
        bias: (out,) or None.

    Returns:
        (..., out) in x's dtype.
    """
    outputs, inputs = codes.shape
    rows = x.reshape(-1, inputs).bfloat16()  # (M, in)
    if rows.shape[0] <= FEW_ROWS and inputs % STEP == 0:
        sums = torch._weight_int8pack_mm(rows, codes, _ones(outputs))  # (M, out) bf16: the scale comes after, in fp32
    else:
        sums = F.linear(rows, codes.bfloat16())  # (M, out) bf16
    found = torch.mul(sums, scale.view(-1))  # (M, out) fp32
    if bias is not None:
        found += bias
    return found.view(*x.shape[:-1], outputs).to(x.dtype)


def in_int8(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The same with each row of activations rounded to int8 by its own absmax: whole-number products, summed exactly.

    s = max|row| / 127, a = round(row / s): |row - a s| <= s / 2. No row depends on another. Exact sums make the
    figures alike on every processor, up to the roundings of s and of the result.
    """
    rows = x.reshape(-1, x.shape[-1]).float()  # (M, in)
    step = rows.abs().amax(dim=1, keepdim=True).div_(127)  # (M, 1)
    whole = torch.div(rows, step.clamp_min_(TINY)).round_().char()  # (M, in)
    known = not x.is_cuda and bool(engine.cpu_flags() & engine.INT8_FLAGS)
    sums = torch._int_mm(whole, codes.t()) if known else engine.int8_product(whole, codes.t())  # (M, out) int32
    found = torch.mul(sums, step).mul_(scale.view(-1))  # (M, out) fp32
    if bias is not None:
        found += bias
    return found.view(*x.shape[:-1], codes.shape[0]).to(x.dtype)
