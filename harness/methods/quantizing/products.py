"""Products with a quantized weight: by compiled loops, by slabs, or dequantized."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.methods.quantizing import cpu
from harness.methods.quantizing.codes import BF16, FUSED

if TYPE_CHECKING:
    from harness.methods.quantizing.compiled import Loops
    from harness.methods.quantizing.stored import StoredWeight

TILES = frozenset({"amx_bf16"})
FEW_ROWS = 8  # rows up to which reading codes as they lie surely beats unpacking them: studies/performance/ways.py
SLAB = 2**20  # elements of a weight that are unpacked at a time: 4 MiB, which stay in the cache


def multiply(x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
    """Few rows by loops, many dequantized; `compute=fused` takes few rows of any dtype so, and more slab by slab.

    Args:
        x: (..., in), rounded only where `compute` asks for bf16.
        weight: (out, in), as it is stored.
        bias: (out,) or None.

    Returns:
        (..., out) in x's dtype.
    """
    compute = weight.recipe.compute
    loops = weight.loops()
    if loops is not None and (compute == FUSED or plain(x, compute)):
        if few(x, weight):
            return of_few_rows(x, loops, bias)
        if compute == FUSED:
            return in_slabs(x, loops, bias)
    return dequantized(x, weight.dequantize() if loops is None else loops.decode(), bias, compute)


def quick(x: Tensor) -> bool:
    """Whether x is in bf16 already, where products of it in tiles are the quicker ones; fp32 is never rounded."""
    return x.dtype == torch.bfloat16 and tiled(x)


def tiled(x: Tensor) -> bool:
    """Whether bf16 products run in tiles where x lies."""
    return x.device.type == "cpu" and bool(TILES & cpu.cpu_flags())


def dequantized(x: Tensor, weight: Tensor, bias: Tensor | None, compute: str) -> Tensor:
    """Compute x weight^T + bias; weight (out, in) fp32.

    Args:
        x: (..., in).
        weight: rounded to the dtype of the product.
        bias: (out,) or None.
        compute: `codes.COMPUTE`; where it asks for bf16 and x is not, x is rounded, sums are rounded once.

    Returns:
        (..., out) in x's dtype.
    """
    if compute != BF16 or x.dtype == torch.bfloat16:
        return cpu.linear(x, weight.to(x.dtype), bias)
    return finished(x, rounded(x.bfloat16(), weight.bfloat16()).float(), bias)


def plain(x: Tensor, compute: str) -> bool:
    """Whether the product is asked for in fp32, of fp32, and without a gradient: only its sums' order may differ."""
    return x.dtype == torch.float32 and compute != BF16 and not x.requires_grad


def few(x: Tensor, weight: StoredWeight) -> bool:
    """Whether x (..., in) has so few rows that loops are the quicker product."""
    return x.numel() <= FEW_ROWS * weight.matrix[1]


def of_few_rows(x: Tensor, loops: Loops, bias: Tensor | None) -> Tensor:
    """The product by loops.

    Args:
        x: (..., in), any float dtype, never rounded.
        loops: of the weight.
        bias: (out,) or None.

    Returns:
        (..., out) in x's dtype, summed in fp32.
    """
    rows = x if x.dtype == torch.float32 and x.is_contiguous() else x.float().contiguous()
    result = loops.multiply(rows)
    if bias is not None:
        result += bias
    return result if x.dtype == torch.float32 else result.to(x.dtype)


def in_slabs(x: Tensor, loops: Loops, bias: Tensor | None) -> Tensor:
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
    result = x.new_empty(rows.shape[0], outputs)
    slab = torch.empty(min(outputs, max(1, SLAB // inputs)), inputs)
    for first in range(0, outputs, len(slab)):
        part = slab[: outputs - first]
        loops.unpack(first, part)
        cpu.into_columns(rows, part.to(x.dtype), bias, result, first)
    return result.view(*x.shape[:-1], outputs)


def rounded(rows: Tensor, weight: Tensor) -> Tensor:
    """The product of bf16 matrices, summed in fp32 and rounded to bf16 on every processor."""
    if rows.device.type != "cpu" or cpu.native(torch.bfloat16):
        return F.linear(rows, weight)
    return F.linear(rows.float(), weight.float()).bfloat16()


def finished(x: Tensor, sums: Tensor, bias: Tensor | None) -> Tensor:
    """Add the bias in fp32 and give back x's shape and dtype: (M, out) or (..., out) fp32."""
    if bias is not None:
        sums += bias
    shaped = sums.view(*x.shape[:-1], sums.shape[-1])
    return shaped if x.dtype == torch.float32 else shaped.to(x.dtype)  # a token's 200 layers would feel the call
