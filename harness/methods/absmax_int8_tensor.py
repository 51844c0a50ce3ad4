"""Symmetric int8, one scale a tensor: s = max|w| / 127, q = round(w / s) in -127..127, w' = q s.

One outlier coarsens the whole tensor, which is what the per-channel scale of absmax-int8 is for. Ties round to even.
Weights only: the product is that of absmax-int8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from harness.codes import divide
from harness.weightmethod import weight_method

if TYPE_CHECKING:
    from torch import Tensor


def quantize(weight: Tensor) -> dict[str, Tensor]:
    """(out, in) fp32 -> codes (out, in) int8, scale () fp32."""
    scale = weight.abs().amax() / 127
    codes = divide(weight, scale).round_().clamp_(-127, 127).char()
    return {"codes": codes, "scale": scale}


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
    name="absmax-int8-tensor",
    summary="symmetric int8, one scale a tensor",
    bits=8,
    quantize=quantize,
    dequantize=dequantize,
    product=product,
)
