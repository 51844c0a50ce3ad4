"""Products with a quantized weight: few rows by compiled loops, many by the weight, unpacked whole or by slabs."""

from __future__ import annotations

import math
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
SLAB = 2**22  # elements that are unpacked at a time: 16 MiB, which stay in the cache; fewer make slow products


def multiply(x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
    """Few rows by loops over the codes, many dequantized: slab by slab where the weight is large.

    In half precision the weight is dequantized whole for any rows, as on every device, but for `compute=fused`.

    Args:
        x: (..., in), rounded only where `compute` asks for bf16.
        weight: (out, in), as it is stored.
        bias: (out,) or None.

    Returns:
        (..., out) in x's dtype.
    """
    compute = weight.recipe.compute
    loops = None if torch.is_grad_enabled() and x.requires_grad else weight.loops()
    if loops is None:
        return dequantized(x, weight.dequantize(), bias, compute)
    if by_loops(x, weight):
        return of_few_rows(x.bfloat16().float() if compute == BF16 else x, loops, bias)
    if math.prod(weight.matrix) <= SLAB or (x.dtype != torch.float32 and compute != FUSED):
        return dequantized(x, loops.decode(), bias, compute)
    return in_slabs(x, loops, bias, compute)


def by_loops(x: Tensor, weight: StoredWeight) -> bool:
    """Whether x has so few rows that loops over the codes multiply them, where there are such for the weight."""
    wanted = weight.recipe.compute == FUSED or x.dtype == torch.float32
    return wanted and few_rows(x, weight.matrix[1]) and weight.loops() is not None


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


def few_rows(x: Tensor, inputs: int) -> bool:
    """Whether x (..., in) has so few rows that loops are the quicker product."""
    return x.numel() <= FEW_ROWS * inputs


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


def in_slabs(x: Tensor, loops: Loops, bias: Tensor | None, compute: str) -> Tensor:
    """The dequantized product with some rows of the weight at a time, which the cache still holds when they multiply.

    Args:
        x: (..., in), any float dtype.
        loops: of the weight.
        bias: (out,) or None.
        compute: as of `dequantized`.

    Returns:
        (..., out) in x's dtype.
    """
    outputs, inputs = loops.shape
    rows = x.reshape(-1, inputs)  # (M, in)
    result = x.new_empty(rows.shape[0], outputs)
    count = math.ceil(outputs * inputs / SLAB)  # of slabs, all alike
    slab = torch.empty(math.ceil(outputs / count), inputs)
    for first in range(0, outputs, len(slab)):
        part = slab[: outputs - first]
        loops.unpack(first, part)
        columns = slice(first, first + len(part))
        result[:, columns] = dequantized(rows, part, None if bias is None else bias[columns], compute)
    return result.view(*x.shape[:-1], outputs)


def rounded(rows: Tensor, weight: Tensor) -> Tensor:
    """The product of bf16 matrices, summed in fp32 and rounded to bf16 on every processor."""
    if rows.device.type != "cpu" or cpu.native(torch.bfloat16):
        return F.linear(rows, weight)
    return cpu.linear(rows.float(), weight.float(), None).bfloat16()


def finished(x: Tensor, sums: Tensor, bias: Tensor | None) -> Tensor:
    """Add the bias in fp32 and give back x's shape and dtype: (M, out) or (..., out) fp32."""
    if bias is not None:
        sums += bias
    shaped = sums.view(*x.shape[:-1], sums.shape[-1])
    return shaped if x.dtype == torch.float32 else shaped.to(x.dtype)  # a token's 200 layers would feel the call
