"""Reads a GGUF file, metadata at once and tensors when asked for, and its block formats as torch tensors.

The gguf package's reader wraps every vocabulary entry in a memory-mapped array, which takes seconds for a vocabulary;
this one unpacks in place. Layout: ggml's docs/gguf.md, versions 2 and 3.

The package dequantizes whole arrays of the host; `dequantize` here takes bytes on any device, as a model holds them. A
row of a matrix is a run of blocks of 32 weights (little-endian, ggml's `ggml-common.h`): an fp16 step d, for Q4_1 and
Q5_1 an fp16 minimum m, for Q5_0 and Q5_1 the codes' 32 high bits, then int8 codes q or 16 bytes of nibbles, weight
i < 16 in the low nibble of byte i, weight i + 16 in the high one. F32 and F16 rows are plain numbers. Quantizing is the
gguf package's affair; a test holds what is read here to that package, bit for bit.
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
            self.metadata: dict[str, Any] = {}
            for _ in range(pairs):
                name = self._string()
                self.metadata[name] = self._value(*self._unpack("I"))
            entries = [self._entry() for _ in range(tensors)]
            alignment = self.metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
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
        name = gguf.GGMLQuantizationType(kind).name
        if not shape:
            raise ValueError("a tensor has no dimension")
        size = math.prod(shape[:-1]) * row_bytes(name, shape[-1])
        if start + size > len(self._bytes):
            raise ValueError("it ends inside a tensor")
        return StoredTensor(name, shape, np.frombuffer(self._bytes, np.uint8, size, start))


def row_bytes(kind: str, columns: int) -> int:
    """Bytes of a row of `columns` weights; ValueError where blocks do not divide it."""
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if columns % weights:
        raise ValueError(f"a row of {columns} weights is no multiple of {kind}'s block of {weights}")
    return int(columns // weights * size)


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


FORMATS: Mapping[str, Callable[[Tensor], Tensor]] = {  # how a block is read: (..., bytes) uint8 -> (..., weights) fp32
    "F32": lambda raw: raw.contiguous().view(torch.float32).clone(),
    "F16": _half,
    "Q8_0": lambda raw: raw[..., 2:].contiguous().view(torch.int8).float() * _half(raw[..., :2]),
    "Q5_1": lambda raw: (
        (_nibbles(raw[..., 8:]) + _high_bits(raw[..., 4:8])) * _half(raw[..., :2]) + _half(raw[..., 2:4])
    ),
    "Q5_0": lambda raw: (_nibbles(raw[..., 6:]) + _high_bits(raw[..., 2:6]) - 16) * _half(raw[..., :2]),
    "Q4_1": lambda raw: _nibbles(raw[..., 4:]) * _half(raw[..., :2]) + _half(raw[..., 2:4]),
    "Q4_0": lambda raw: (_nibbles(raw[..., 2:]) - 8) * _half(raw[..., :2]),
}


def dequantize(raw: Tensor, kind: str) -> Tensor:
    """(rows, bytes a row) uint8 -> (rows, columns) fp32, a tensor of its own."""
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return FORMATS[kind](raw.view(raw.shape[0], -1, size)).flatten(1)  # of (rows, blocks, bytes)
