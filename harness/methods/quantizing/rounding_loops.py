"""The loops of `rounding`, compiled by Numba at their first call.

Weights come as bits, uint32 of fp32 or uint16 of bf16, which are the upper half of fp32's. An absmax is taken of them
as whole numbers: their order is the same, and a NaN is the largest. All that a loop calls stands in this file: Numba's
cache sees a change only in the file of the loop.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from harness.methods.quantizing.loops import compiled

Array = np.ndarray[Any, Any]
MAGNITUDE = np.uint32(0x7FFFFFFF)  # of a float's bits: all but the sign


@compiled(inline="always")
def _unpacked(bits: Array, row: Array, scale: Array, i: int, most: float) -> Any:
    """Write the floats of bits to row and max|row| / most to scale[i]; gives what to divide by: that, or 1 for 0."""
    whole, largest, shift = row.view(np.uint32), np.uint32(0), np.uint32(32 - 8 * bits.itemsize)
    for j in range(len(bits)):
        whole[j] = np.uint32(bits[j]) << shift
        largest = max(largest, whole[j] & MAGNITUDE)
    scale.view(np.uint32)[i] = largest
    scale[i] /= np.float32(most)
    return scale[i] if scale[i] != 0 else np.float32(1)


@compiled(inline="always")
def _code(value: Any, step: float, most: int) -> Any:
    """The whole number nearest to value / step, an even one where two are, of those from -most to most."""
    return min(max(np.int32(np.rint(value / step)), -most), most)


@compiled(nogil=True, cache=True)
def int8(bits: Array, codes: Array, scale: Array) -> None:
    """Symmetric int8: bits (out, in) -> codes (out, in) int8, scale (out,) fp32."""
    row = np.empty(bits.shape[1], np.float32)
    for i in range(len(bits)):
        found, step = codes[i], _unpacked(bits[i], row, scale, i, 127)
        for j in range(len(row)):
            found[j] = _code(row[j], step, 127)


@compiled(nogil=True, cache=True)
def int4(bits: Array, codes: Array, scale: Array) -> None:
    """Symmetric int4: bits (blocks, block) -> codes (blocks, block / 2) uint8, scale (blocks,) fp32."""
    row, whole = np.empty(bits.shape[1], np.float32), np.empty(bits.shape[1], np.uint8)
    for i in range(len(bits)):
        found, step = codes[i], _unpacked(bits[i], row, scale, i, 7)
        for j in range(len(row)):
            whole[j] = _code(row[j], step, 7) + 8
        for j in range(len(found)):
            found[j] = whole[2 * j] << 4 | whole[2 * j + 1]


@compiled(nogil=True, cache=True)
def levels(bits: Array, midpoints: Array, order: Array, codes: Array, scale: Array) -> None:
    """The nearest levels: bits (blocks, block) -> codes (blocks, block / 2) uint8, scale (blocks,) fp32.

    midpoints: (15,) fp32, ascending; order: (16,) uint8, the code of each rank.
    """
    row, ranks = np.empty(bits.shape[1], np.float32), np.empty(bits.shape[1], np.int32)
    for i in range(len(bits)):
        found, step = codes[i], _unpacked(bits[i], row, scale, i, 1)
        for j in range(len(row)):
            ranks[j], row[j] = 0, row[j] / step
        for k in range(len(midpoints)):
            midpoint = midpoints[k]
            for j in range(len(row)):
                ranks[j] += row[j] > midpoint
        for j in range(len(found)):
            found[j] = order[ranks[2 * j]] << 4 | order[ranks[2 * j + 1]]
