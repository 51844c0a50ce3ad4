"""GGUF's block formats as torch tensors: bytes in, fp32 weights out, on any device.

A row of a matrix is a run of blocks of 32 weights; layouts (little-endian, ggml's `ggml-common.h`):

| format | bytes a block | weights |
|---|---|---|
| Q8_0 | fp16 d, 32 int8 q | d q |
| Q5_1 | fp16 d, fp16 m, 32 high bits, 16 bytes of low nibbles | d q + m, q in 0..31 |
| Q5_0 | fp16 d, 32 high bits, 16 bytes of low nibbles | d (q - 16) |
| Q4_1 | fp16 d, fp16 m, 16 bytes of nibbles | d q + m, q in 0..15 |
| Q4_0 | fp16 d, 16 bytes of nibbles | d (q - 8) |

Weight i < 16 is the low nibble of byte i, weight i + 16 the high one. F32 and F16 rows are plain numbers. Quantizing is
the gguf package's affair; a test holds what is read here to that package, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32  # weights


def _half(raw: Tensor) -> Tensor:
    """(..., 2) bytes of one fp16 -> (..., 1) fp32."""
    return raw.contiguous().view(torch.float16).float()


def _nibbles(raw: Tensor) -> Tensor:
    """(..., 16) bytes -> (..., 32) fp32 in 0..15."""
    return torch.cat([raw & 15, raw >> 4], dim=-1).float()


def _high_bits(raw: Tensor) -> Tensor:
    """(..., 4) bytes, bit i of the whole -> (..., 32) fp32, 0 or 16."""
    shifts = torch.arange(8, dtype=torch.uint8, device=raw.device)
    bits = (raw[..., None] >> shifts) & 1  # (..., 4, 8)
    return bits.flatten(-2).float() * 16


def _q8_0(raw: Tensor) -> Tensor:
    return raw[..., 2:].contiguous().view(torch.int8).float() * _half(raw[..., :2])


def _q4_0(raw: Tensor) -> Tensor:
    return (_nibbles(raw[..., 2:]) - 8) * _half(raw[..., :2])


def _q4_1(raw: Tensor) -> Tensor:
    return _nibbles(raw[..., 4:]) * _half(raw[..., :2]) + _half(raw[..., 2:4])


def _q5_0(raw: Tensor) -> Tensor:
    return (_nibbles(raw[..., 6:]) + _high_bits(raw[..., 2:6]) - 16) * _half(raw[..., :2])


def _q5_1(raw: Tensor) -> Tensor:
    return (_nibbles(raw[..., 8:]) + _high_bits(raw[..., 4:8])) * _half(raw[..., :2]) + _half(raw[..., 2:4])


@dataclass(frozen=True)
class Format:
    """One block format: weights and bytes of a block, bits of a code, and how a block is read."""

    weights: int
    bytes: int
    bits: float  # of a code, scales not counted
    read: Callable[[Tensor], Tensor]  # (..., bytes) uint8 -> (..., weights) fp32


FORMATS: Mapping[str, Format] = {
    "F32": Format(1, 4, 32, lambda raw: raw.contiguous().view(torch.float32).clone()),
    "F16": Format(1, 2, 16, _half),
    "Q8_0": Format(BLOCK, 34, 8, _q8_0),
    "Q5_1": Format(BLOCK, 24, 5, _q5_1),
    "Q5_0": Format(BLOCK, 22, 5, _q5_0),
    "Q4_1": Format(BLOCK, 20, 4, _q4_1),
    "Q4_0": Format(BLOCK, 18, 4, _q4_0),
}


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of a row of `columns` weights; ValueError where blocks do not divide it."""
    form = FORMATS[kind]
    if columns % form.weights:
        raise ValueError(f"a row of {columns} weights is no multiple of {kind}'s block of {form.weights}")
    return columns // form.weights * form.bytes


def dequantize(raw: Tensor, kind: str) -> Tensor:
    """(rows, bytes a row) uint8 -> (rows, columns) fp32, a tensor of its own."""
    form = FORMATS[kind]
    blocks = raw.view(raw.shape[0], -1, form.bytes)  # (rows, blocks, bytes)
    return form.read(blocks).flatten(1)
