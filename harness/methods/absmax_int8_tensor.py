"""Symmetric int8, one scale a tensor: s = max|w| / 127, q = round(w / s) in -127..127, w' = q s.

One outlier coarsens the whole tensor, which is what the per-channel scale of absmax-int8 is for. Ties round to even.
Weights only: the product is that of absmax-int8, `compute=bf16` included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.methods.quantizing import fused
from harness.methods.quantizing.codes import dequantize_int8, divide, product_int8
from harness.methods.quantizing.weight_method import weight_method

if TYPE_CHECKING:
    from torch import Tensor


def quantize(weight: Tensor) -> dict[str, Tensor]:
    """(out, in) fp32 -> codes (out, in) int8, scale () fp32."""
    scale = weight.abs().amax() / 127
    codes = divide(weight, scale).round_().clamp_(-127, 127).char()
    return {"codes": codes, "scale": scale}


dequantize, product = dequantize_int8, product_int8

METHOD = weight_method(
    name="absmax-int8-tensor",
    summary="symmetric int8, one scale a tensor",
    bits=8,
    quantize=quantize,
    dequantize=dequantize,
    product=product,
    computes=True,
    fused=fused.int8,
)
