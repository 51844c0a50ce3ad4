"""Symmetric int4 codes in blocks of a row, kept for methods that choose their codes by looking at inputs.

The bytes are those of `linear-int4`: two codes a byte, an fp32 step a block. Which codes, is the method's affair: it
hands over finished tensors, or none where only room is wanted (predicted bytes).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from harness import quantized
from harness.codes import pack, rescale, unpack
from harness.errors import HarnessError

LOWEST = -8  # of a code


def room(weight: Tensor, block: int, method: str) -> dict[str, Tensor]:
    """(out, in) -> tensors of the shapes and dtypes that are stored; HarnessError where blocks do not divide a row."""
    if weight.shape[1] % block:
        raise HarnessError(f"a row of {weight.shape[1]} weights is no multiple of {block}: write {method}:block=N")
    codes = torch.empty((weight.numel() + 1) // 2, dtype=torch.uint8, device=weight.device)
    return {"codes": codes, "scale": torch.zeros(weight.numel() // block, device=weight.device)}


def stored(codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Codes -8..7 (out, in) and steps (out, in / block) as they are kept."""
    return {"codes": pack((codes - LOWEST).byte(), codes.numel()), "scale": scale.float().flatten().contiguous()}


def dequantize(kept: Mapping[str, Tensor], shape: tuple[int, int], block: int) -> Tensor:
    """(out, in) fp32."""
    levels = torch.arange(-8.0, 8.0, device=kept["codes"].device)
    values = unpack(kept["codes"], levels, shape[0] * shape[1])
    return rescale(values, block, kept["scale"]).view(shape)


def recipe(method: str, block: int, kept: Mapping[str, Tensor] | None = None) -> quantized.Recipe:
    """How `harness.quantized` holds a matrix: these tensors, or room for them."""

    def take(weight: Tensor, block: int) -> dict[str, Tensor]:
        sized = room(weight, block, method)  # refuses what does not divide
        return sized if kept is None else dict(kept)

    return quantized.Recipe(method, take, dequantize, values={"block": block})
