"""Symmetric int8, one scale an output channel.

s = max|w| / 127, q = round(w / s) in -127..127, w' = q s (LLM.int8's weights, arXiv 2208.07339, section 2.1). Ties
round to even. |w - w'| <= s / 2.

Weights only (w8a16). In bf16 (`dtype=bf16`), on a processor with bf16 products in tiles (AMX), the product reads the
codes as they lie: sums are rounded to bf16 once. Elsewhere, in fp32 and in fp16, the weight is dequantized at every
call and the product is that of the activations' dtype: fp32 activations are never rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from harness.codes import quantize_rows
from harness.weightmethod import weight_method

if TYPE_CHECKING:
    from torch import Tensor


def quantize(weight: Tensor) -> dict[str, Tensor]:
    """(out, in) fp32 -> codes (out, in) int8, scale (out, 1) fp32."""
    return quantize_rows(weight)


def dequantize(stored: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """(out, in) fp32."""
    return stored["codes"].float().mul_(stored["scale"])


def product(x: Tensor, stored: Mapping[str, Tensor], shape: tuple[int, int], bias: Tensor | None) -> Tensor:
    """(..., in) -> (..., out)."""
    from harness import products

    if products.quick(x):
        return products.in_bf16(x, stored["codes"], stored["scale"], bias)
    return products.dequantized(x, dequantize(stored, shape), bias)


METHOD = weight_method(
    name="absmax-int8",
    summary="symmetric int8, one scale an output channel",
    bits=8,
    quantize=quantize,
    dequantize=dequantize,
    product=product,
)
