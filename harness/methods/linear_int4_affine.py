"""Asymmetric int4 in blocks: s = (max - min) / 15, q = round((w - min) / s) in 0..15, w' = q s + min.

The zero point is kept as the block's minimum in fp32: a whole-number zero point would move the grid, this one hits
min and max exactly and reproduces any affine 4-bit grid of the same blocks (GGUF's Q4_1: w = q d + m) that uses its
end codes. Ties round to even. |w - w'| <= s / 2.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from harness.methods.quantizing import fused
from harness.methods.quantizing.codes import BLOCK, blocks, divide, pack, rescale, unpack
from harness.methods.quantizing.weight_method import weight_method

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = tuple(float(code) for code in range(16))  # of the codes, before their step


def quantize(weight: Tensor, block: int) -> dict[str, Tensor]:
    """(out, in) fp32, n elements -> codes (ceil(n / 2),) uint8, scale and minimum (ceil(n / block),) fp32."""
    rows = blocks(weight, block)  # (blocks, block)
    minimum = rows.amin(dim=1)
    scale = (rows.amax(dim=1) - minimum) / 15  # 0 in a constant block, whose codes are 0 then
    codes = divide(rows - minimum[:, None], scale[:, None]).round_().clamp_(0, 15).byte()
    return {"codes": pack(codes, weight.numel()), "scale": scale, "minimum": minimum}


def dequantize(stored: Mapping[str, Tensor], shape: tuple[int, int], block: int) -> Tensor:
    """(out, in) fp32."""
    import torch

    levels = torch.arange(0.0, 16.0, device=stored["codes"].device)  # LEVELS, made where they are needed
    values = unpack(stored["codes"], levels, shape[0] * shape[1])
    return rescale(values, block, stored["scale"], stored["minimum"]).view(shape)


METHOD = weight_method(
    name="linear-int4-affine",
    summary="asymmetric int4 in blocks, minimum and step",
    bits=4,
    quantize=quantize,
    dequantize=dequantize,
    fused=functools.partial(fused.int4, levels=LEVELS),
    grain="block",
    parameters={"block": BLOCK},
    grid="affine4:32",  # with block=32: lossless where the weights were stored so; other blocks straddle that grid
)
