"""The loops of `harness.fused`, compiled by Numba at their first call; imported where `compute=fused` is asked for.

Rows of the weight are shared out between threads, so that no figure depends on how many there are. Sums may be taken
in any order, which lets them run in vector registers: the order is that of the processor's width.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import njit, prange

from harness.files import cache_dir

# beside converted checkpoints, unless NUMBA_CACHE_DIR says where: this file's own folder may be read-only
numba.config.CACHE_DIR = numba.config.CACHE_DIR or str(cache_dir() / "numba")

SUMS = {"reassoc", "contract"}  # LLVM's fast-math flags that sums need; without the others not a number stays so
Array = np.ndarray[Any, Any]


def threads(wanted: int) -> int:
    """Have as many threads run the loops, of those Numba started with: how many they are."""
    found: int = max(1, min(wanted, numba.config.NUMBA_NUM_THREADS))
    if numba.get_num_threads() != found:
        numba.set_num_threads(found)
    return found


@njit(parallel=True, nogil=True, fastmath=SUMS, cache=True)  # type: ignore[untyped-decorator]
def int8(x: Array, codes: Array, scale: Array, zero: Array, found: Array, threads: int) -> None:
    """Of x (M, in) and codes (out, in) int8, scale and zero (out,), or (1,) for all; found (M, out); else fp32."""
    outputs, inputs = codes.shape
    each = (outputs + threads - 1) // threads
    for thread in prange(threads):
        for i in range(thread * each, min(outputs, (thread + 1) * each)):
            row, step, offset = codes[i], scale[min(i, len(scale) - 1)], zero[min(i, len(zero) - 1)]
            for m in range(x.shape[0]):
                total = np.float32(0)
                for j in range(inputs):
                    total += x[m, j] * (np.float32(row[j]) - offset)
                found[m, i] = total * step


@njit(parallel=True, nogil=True, fastmath=SUMS, cache=True)  # type: ignore[untyped-decorator]
def int4(
    x: Array, sums: Array, codes: Array, scale: Array, least: Array, pairs: Array, found: Array, threads: int
) -> None:
    """Of x (M, blocks, block) and codes (out, in / 2) uint8, with what belongs to a block: scale (out, blocks).

    Where a block has a least level, least (out, blocks) and sums (M, blocks) of x, else (out, 0). pairs (256,) int64.
    """
    outputs, half = codes.shape
    rows, blocks, block = x.shape
    each = (outputs + threads - 1) // threads
    for thread in prange(threads):
        wide = np.empty(half, np.int64)  # one row's levels, two an element
        levels = wide.view(np.float32)
        for i in range(thread * each, min(outputs, (thread + 1) * each)):
            for j in range(half):
                wide[j] = pairs[np.uintp(codes[i, j])]
            for m in range(rows):
                total = np.float32(0)
                for b in range(blocks):
                    part = np.float32(0)
                    for j in range(block):
                        part += x[m, b, j] * levels[b * block + j]
                    total += part * scale[i, b]
                for b in range(least.shape[1]):
                    total += sums[m, b] * least[i, b]
                found[m, i] = total


@njit(parallel=True, nogil=True, cache=True)  # type: ignore[untyped-decorator]
def unpack_int4(codes: Array, scale: Array, least: Array, pairs: Array, found: Array, threads: int) -> None:
    """The weight itself into found (out, in), as `int4` takes it, rounded as the dequantized one: without SUMS."""
    outputs, half = codes.shape
    block = 2 * half // scale.shape[1]
    each = (outputs + threads - 1) // threads
    for thread in prange(threads):
        wide = np.empty(half, np.int64)
        levels = wide.view(np.float32)
        for i in range(thread * each, min(outputs, (thread + 1) * each)):
            for j in range(half):
                wide[j] = pairs[np.uintp(codes[i, j])]
            for b in range(scale.shape[1]):
                for j in range(b * block, (b + 1) * block):
                    found[i, j] = levels[j] * scale[i, b]
            for b in range(least.shape[1]):
                for j in range(b * block, (b + 1) * block):
                    found[i, j] += least[i, b]
