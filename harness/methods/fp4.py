"""FP4 as bitsandbytes defines it: absmax blocks onto a 4-bit float of sign, two bits of exponent, one of mantissa.

w' = level[q] max|block|. Magnitudes over 12: 0, 1/16 (the one subnormal, 0.0052083), 2, 3, 4, 6, 8, 12; the sign is bit
8. Its two zeros (codes 0 and 8) stand for the same value: bitsandbytes spells small values differently by version and
device, ours as its CPU code of 0.50 does.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from harness.methods.quantizing import fused, rounding
from harness.methods.quantizing.codes import BLOCK, dequantize_levels, quantize_to_levels
from harness.methods.quantizing.weight_method import weight_method

if TYPE_CHECKING:
    from torch import Tensor

MAGNITUDES = tuple(twelfths / 12 for twelfths in (0, 0.0625, 8, 12, 4, 6, 2, 3))  # in the order of the codes
LEVELS = (*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES))


def quantize(weight: Tensor, block: int) -> dict[str, Tensor]:
    """(out, in) fp32, n elements -> codes (ceil(n / 2),) uint8, scale (ceil(n / block),) fp32: the absmax."""
    return quantize_to_levels(weight, LEVELS, block)


def dequantize(stored: Mapping[str, Tensor], shape: tuple[int, int], block: int) -> Tensor:
    """(out, in) fp32."""
    return dequantize_levels(stored, shape, block)


METHOD = weight_method(
    name="fp4",
    summary="4-bit float in blocks, absmax scale",
    bits=4,
    quantize=quantize,
    dequantize=dequantize,
    fused=functools.partial(fused.int4, levels=LEVELS),
    compiled=functools.partial(rounding.to_levels, levels=LEVELS),
    grain="block",
    parameters={"block": BLOCK},
    tables={"levels": LEVELS},
)
