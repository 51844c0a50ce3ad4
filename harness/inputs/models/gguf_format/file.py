"""Reads a GGUF file: metadata at once, tensors when asked for. No torch.

The gguf package's reader wraps every vocabulary entry in a memory-mapped array, which takes seconds for a vocabulary;
this one unpacks in place. Block formats are dequantized by the package. Layout: ggml's docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from numpy.typing import NDArray

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
        return np.asarray(dequantize(rows, GGMLQuantizationType[self.kind]), dtype=np.float32).reshape(self.shape)


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
        quantization = GGMLQuantizationType(kind)
        block, block_bytes = GGML_QUANT_SIZES[quantization]
        if not shape:
            raise ValueError("a tensor has no dimension")
        if shape[-1] % block:
            raise ValueError(f"a row of {shape[-1]} is no multiple of {quantization.name}'s block of {block}")
        size = math.prod(shape) // block * block_bytes
        if start + size > len(self._bytes):
            raise ValueError("it ends inside a tensor")
        return StoredTensor(quantization.name, shape, np.frombuffer(self._bytes, np.uint8, size, start))
