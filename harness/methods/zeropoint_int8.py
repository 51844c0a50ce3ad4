"""Asymmetric int8 with an integer zero point, one step an output channel.

s = (max - min) / (2^8 - 1), z = -128 - round(min / s), q = round(w / s) + z in -128..127, w' = (q - z) s. Both
roundings are to even. |w - w'| <= s / 2: where min and max both lie half a step off the grid, q of max is clipped, and
half a step off on its other side.

z keeps whole numbers in fp32: a row that lies far from 0 (a norm's weight) has a zero point beyond int8. A constant
row c has no spread; its step is |c|, which makes it exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from harness.methods.quantizing import fused
from harness.methods.quantizing.codes import divide
from harness.methods.quantizing.weight_method import weight_method

if TYPE_CHECKING:
    from torch import Tensor


def quantize(weight: Tensor) -> dict[str, Tensor]:
    """(out, in) fp32 -> codes (out, in) int8, scale and zero_point (out, 1) fp32."""
    minimum = weight.amin(dim=1, keepdim=True)
    step = (weight.amax(dim=1, keepdim=True) - minimum) / 255
    step = step.where(step != 0, minimum.abs())  # (out, 1)
    zero_point = -128 - divide(minimum, step).round_()
    codes = divide(weight, step).round_().add_(zero_point).clamp_(-128, 127).char()
    return {"codes": codes, "scale": step, "zero_point": zero_point}


def dequantize(stored: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """(out, in) fp32."""
    return stored["codes"].float().sub_(stored["zero_point"]).mul_(stored["scale"])


METHOD = weight_method(
    name="zeropoint-int8",
    summary="asymmetric int8 with a zero point, one step an output channel",
    bits=8,
    quantize=quantize,
    dequantize=dequantize,
    fused=fused.int8,
    grain="row",
)
