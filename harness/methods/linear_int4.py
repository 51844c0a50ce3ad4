"""Symmetric int4 in blocks: s = max|w| / 7, q = round(w / s) in -7..7, w' = q s; stored as q + 8, two to a byte.

The code -8 stays unused, so that the grid is symmetric. Ties round to even. |w - w'| <= s / 2.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

from harness.methods.quantizing import fused, rounding
from harness.methods.quantizing.codes import BLOCK, blocks, divide, pack, rescale, unpack
from harness.methods.quantizing.weight_method import weight_method

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = tuple(float(code) for code in range(-8, 8))  # of the codes, before their step


def quantize(weight: Tensor, block: int) -> dict[str, Tensor]:
    """(out, in) fp32, n elements -> codes (ceil(n / 2),) uint8, scale (ceil(n / block),) fp32."""
    rows = blocks(weight, block)  # (blocks, block)
    scale = rows.abs().amax(dim=1) / 7
    codes = divide(rows, scale[:, None]).round_().clamp_(-7, 7).add_(8).byte()
    return {"codes": pack(codes, weight.numel()), "scale": scale}


def dequantize(stored: Mapping[str, Tensor], shape: tuple[int, int], block: int) -> Tensor:
    """(out, in) fp32."""
    import torch

    levels = torch.arange(-8.0, 8.0, device=stored["codes"].device)  # LEVELS, made where they are needed
    values = unpack(stored["codes"], levels, shape[0] * shape[1])
    return rescale(values, block, stored["scale"]).view(shape)


METHOD = weight_method(
    name="linear-int4",
    summary="symmetric int4 in blocks, absmax scale",
    bits=4,
    quantize=quantize,
    dequantize=dequantize,
    fused=functools.partial(fused.int4, levels=LEVELS),
    compiled=rounding.int4,
    grain="block",
    parameters={"block": BLOCK},
)
