"""Reads a GGUF file, metadata at once and tensors when asked for, and its block formats as torch tensors.

The gguf package's reader wraps every vocabulary entry in a memory-mapped array, which takes seconds for a vocabulary;
this one unpacks in place. Layout: ggml's docs/gguf.md, versions 2 and 3.

The package dequantizes whole arrays of the host; `dequantize` here takes bytes on any device, as a model holds them. A
row of a matrix is a run of blocks of 32 weights; layouts (little-endian, ggml's `ggml-common.h`):

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

import math
import mmap
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from harness.core.errors import BadFile

MAGIC = b"GGUF"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct formats
STRING, ARRAY = 8, 9
DEFAULT_ALIGNMENT = 32  # bytes; of the tensor data, where the file states none


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the file: its type's name, its shape in torch's order, its bytes."""

    kind: str
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

    def dequantize(self) -> NDArray[np.float32]:
        """The values in fp32, in `shape`."""
        rows = self.data.reshape(*self.shape[:-1], -1)  # (..., bytes a row)
        return np.asarray(gguf.dequantize(rows, gguf.GGMLQuantizationType[self.kind]), np.float32).reshape(self.shape)


class GgufFile:
    """A GGUF file's `metadata` and `tensors`; BadFile, in one line, where it cannot be read as one."""

    def __init__(self, path: Path) -> None:
        self._at = len(MAGIC)
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if self._bytes[: self._at] != MAGIC:
                raise ValueError("its first bytes are not 'GGUF'")
            version, tensors, pairs = self._unpack("IQQ")
            if version not in (2, 3):
                raise ValueError(f"its version is {version}, and 2 and 3 are read")
            self.metadata = dict(self._pair() for _ in range(pairs))
            entries = [self._entry() for _ in range(tensors)]
            alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
            if type(alignment) is not int or alignment < 1:
                raise ValueError(f"its tensors are aligned to {alignment!r:.20}")
            start = -(-self._at // alignment) * alignment
            self.tensors = {name: self._stored(kind, shape, start + at) for name, shape, kind, at in entries}
        except (struct.error, KeyError, ValueError, OverflowError, MemoryError, RecursionError) as error:
            raise BadFile(f"{path} cannot be read as GGUF ({error}): copy or download it again") from error

    def _unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + form, self._bytes, self._at)
        self._at += struct.calcsize("<" + form)
        return values

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        start, self._at = self._at, self._at + length
        if self._at > len(self._bytes):
            raise ValueError("it ends inside a string")
        return self._bytes[start : self._at].decode()

    def _pair(self) -> tuple[str, Any]:
        name = self._string()
        return name, self._value(*self._unpack("I"))

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._unpack(SCALARS[kind])[0]
        inner, count = self._unpack("IQ")
        if inner in SCALARS:
            return list(self._unpack(f"{count}{SCALARS[inner]}"))
        return [self._value(inner) for _ in range(count)]

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (dimensions,) = self._unpack("I")
        shape = self._unpack(f"{dimensions}Q")[::-1]  # the file names the fastest-running dimension first
        return name, shape, *self._unpack("IQ")

    def _stored(self, kind: int, shape: tuple[int, ...], start: int) -> StoredTensor:
        quantization = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
        if not shape:
            raise ValueError("a tensor has no dimension")
        if shape[-1] % block:
            raise ValueError(f"a row of {shape[-1]} is no multiple of {quantization.name}'s block of {block}")
        size = math.prod(shape) // block * block_bytes
        if start + size > len(self._bytes):
            raise ValueError("it ends inside a tensor")
        return StoredTensor(quantization.name, shape, np.frombuffer(self._bytes, np.uint8, size, start))


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
class BlockFormat:
    """One block format: weights and bytes of a block, bits of a code, and how a block is read."""

    weights: int
    bytes: int
    bits: float  # of a code, scales not counted
    read: Callable[[Tensor], Tensor]  # (..., bytes) uint8 -> (..., weights) fp32


FORMATS: Mapping[str, BlockFormat] = {
    "F32": BlockFormat(1, 4, 32, lambda raw: raw.contiguous().view(torch.float32).clone()),
    "F16": BlockFormat(1, 2, 16, _half),
    "Q8_0": BlockFormat(BLOCK, 34, 8, _q8_0),
    "Q5_1": BlockFormat(BLOCK, 24, 5, _q5_1),
    "Q5_0": BlockFormat(BLOCK, 22, 5, _q5_0),
    "Q4_1": BlockFormat(BLOCK, 20, 4, _q4_1),
    "Q4_0": BlockFormat(BLOCK, 18, 4, _q4_0),
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
