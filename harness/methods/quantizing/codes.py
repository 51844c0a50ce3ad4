"""Tensor maths of codes: blocks, packing two codes to a byte, rounding to a table of levels.

Everything works on the meta device too, so that sizes are predicted by the code that makes them. Blocks run over
the flattened row-major (out, in) weight, as in bitsandbytes; the last one may be partial.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from harness.core.contracts import Parameter

if TYPE_CHECKING:  # annotations only: methods are listed without torch
    from torch import Tensor

# 64: the block of QLoRA and bitsandbytes; powers of two, so that a block never splits a byte
BLOCK = Parameter(int, 64, "weights that share a scale", choices=(16, 32, 64, 128, 256, 512, 1024, 2048, 4096))


def divide(weight: Tensor, scale: Tensor) -> Tensor:
    """Divide, where a scale of 0 (a row of zeros, or one too small for fp32) becomes 1."""
    return weight / scale.masked_fill(scale == 0, 1.0)


def quantize_rows(weight: Tensor) -> dict[str, Tensor]:
    """Symmetric int8 a row: (out, in) fp32 -> codes (out, in) int8, scale (out, 1) fp32 = max|row| / 127."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return {"codes": divide(weight, scale).round_().clamp_(-127, 127).char(), "scale": scale}


def dequantize_int8(stored: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """Multiply int8 codes by their scale, one for all or one a row: (out, in) fp32."""
    return stored["codes"].float().mul_(stored["scale"])


def product_int8(
    x: Tensor, stored: Mapping[str, Tensor], shape: tuple[int, int], bias: Tensor | None, compute: str = "dtype"
) -> Tensor:
    """The product with them, as `products.of_codes` has it: (..., in) -> (..., out)."""
    from harness.methods.quantizing import products

    return products.of_codes(x, stored, lambda: dequantize_int8(stored, shape), bias, compute)


def blocks(weight: Tensor, block: int) -> Tensor:
    """Cut a weight into rows of `block`; the last value fills up a partial block, which moves no extremum.

    Args:
        weight: any shape, n elements.
        block: weights a block.

    Returns:
        (ceil(n / block), block), a view where n divides.
    """
    import torch

    flat = weight.reshape(-1)
    missing = -flat.numel() % block
    if missing:
        flat = torch.cat((flat, flat[-1:].expand(missing)))
    return flat.view(-1, block)


def pack(codes: Tensor, count: int) -> Tensor:
    """Pack 4-bit codes two to a byte, the first in the high nibble (bitsandbytes' order).

    Args:
        codes: uint8, values 0..15, at least `count` of them; what lies behind is filling and is dropped.
        count: codes to keep; an odd one leaves the last low nibble 0.

    Returns:
        (ceil(count / 2),) uint8.
    """
    import torch

    flat = codes.reshape(-1)[:count]
    if count % 2:
        flat = torch.cat((flat, flat.new_zeros(1)))
    return (flat[0::2] << 4) | flat[1::2]


def unpack(packed: Tensor, levels: Tensor, count: int) -> Tensor:
    """Look up the level of each 4-bit code: (ceil(count / 2),) uint8, (16,) fp32 -> (count,) fp32, freshly allocated.

    Levels travel in one element as wide as several: four of two bytes where the count allows, else two of one byte.
    Gathering rows of floats, or splitting the nibbles first, takes several times as long on a CPU.
    """
    import torch

    if packed.device.type == "cpu" and count % 4 == 0:
        wide = _quads(tuple(levels.tolist())).index_select(0, packed.view(torch.uint16).int())  # (count / 4,)
        return torch.view_as_real(wide).view(torch.float32).view(-1)
    chosen = _pairs(levels).view(torch.int64).view(-1).index_select(0, packed.int())  # (ceil(count / 2),)
    return chosen.view(torch.float32)[:count]


def _pairs(levels: Tensor) -> Tensor:
    """Both levels of every byte: (16,) -> (256, 2), the high nibble's first."""
    import torch

    return torch.stack((levels.repeat_interleave(16), levels.repeat(16)), dim=1)


@functools.lru_cache(maxsize=16)  # a megabyte each, one a table of levels
def _quads(levels: tuple[float, ...]) -> Tensor:
    """All four levels of every two bytes, as 16 bytes of complex128: (65536,), in the order of the bytes in memory."""
    import torch

    with torch.inference_mode(False):
        both = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.uint8).view(-1, 2).long()
        four = _pairs(torch.tensor(levels, dtype=torch.float32))[both].view(-1, 4)  # (65536, 4)
        return torch.view_as_complex(four.view(torch.float64))


def rescale(values: Tensor, block: int, scale: Tensor, minimum: Tensor | None = None) -> Tensor:
    """Compute values * scale (+ minimum), block by block and in place.

    Args:
        values: (n,) fp32.
        block: values that share a scale.
        scale: (ceil(n / block),) fp32.
        minimum: the same shape, or None for 0.

    Returns:
        `values`.
    """
    whole = values.numel() // block
    head = values[: whole * block].view(whole, block)
    tail = values[whole * block :]
    head.mul_(scale[:whole, None])
    tail.mul_(scale[whole:])  # (0,) * (0,) where n divides
    if minimum is not None:
        head.add_(minimum[:whole, None])
        tail.add_(minimum[whole:])
    return values


def nearest(values: Tensor, levels: Sequence[float]) -> Tensor:
    """Code of the level nearest to each value: the number of midpoints below it, put in the table's own order.

    A value on a midpoint takes the lower level. Where a table spells 0 twice (FP4: codes 0 and 8), values at or just
    under 0 take the first spelling and values just above it the second; both stand for 0.

    Args:
        values: fp32, any shape.
        levels: 16 levels in the order of their codes.

    Returns:
        uint8 codes, same shape.
    """
    import torch

    order = sorted(range(len(levels)), key=levels.__getitem__)
    ascending = torch.tensor([levels[code] for code in order], dtype=torch.float32)  # (16,)
    midpoints = (ascending[:-1] + ascending[1:]) / 2  # (15,)
    if values.is_cuda:  # one kernel instead of thirty
        rank = torch.bucketize(values, midpoints.to(values.device), out_int32=True)
    else:
        rank, above = torch.zeros_like(values), torch.empty_like(values)
        for midpoint in midpoints.tolist():  # six times as fast as bucketize, which searches one value after another
            rank += torch.gt(values, midpoint, out=above)
    if order == sorted(order):
        return rank.byte()
    codes = torch.tensor(order, dtype=torch.uint8, device=values.device)
    return codes.index_select(0, rank.view(-1).int()).view(rank.shape)


def quantize_to_levels(weight: Tensor, levels: Sequence[float], block: int) -> dict[str, Tensor]:
    """Blockwise absmax onto a table of levels in [-1, 1]: w ~ levels[code] * absmax(block).

    Args:
        weight: (out, in) fp32, n elements.
        levels: 16 levels in the order of their codes.
        block: weights that share an absmax.

    Returns:
        codes (ceil(n / 2),) uint8, scale (ceil(n / block),) fp32: the absmax of each block.
    """
    rows = blocks(weight, block)  # (blocks, block)
    scale = rows.abs().amax(dim=1)  # (blocks,)
    codes = nearest(divide(rows, scale[:, None]), levels)
    return {"codes": pack(codes, weight.numel()), "scale": scale}


def dequantize_levels(stored: Mapping[str, Tensor], shape: tuple[int, int], block: int) -> Tensor:
    """Undo `quantize_to_levels`, reading the table from stored["levels"]: (out, in) fp32."""
    values = unpack(stored["codes"], stored["levels"], shape[0] * shape[1])
    return rescale(values, block, stored["scale"]).view(shape)
