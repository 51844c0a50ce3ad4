"""Products of few rows with the codes as they lie (`compute=fused`): a weight is unpacked in the cache, not in memory.

A token's decode reads every weight once, so that bytes are time: a dequantized weight is written and read again, four
bytes an element. Here a row of a weight at a time is unpacked where it is multiplied. Activations are never rounded,
sums are fp32, and the scale comes behind the sum of its row or block. For more rows than `products.FEW_ROWS` the weight
is dequantized as ever, 4-bit codes by a loop of here, to the same bits. Other devices, and blocks that do not divide a
row, take the product that the method has otherwise. The loops are compiled by Numba, for this processor, once: the
harness's cache keeps them.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # annotations only: methods are listed without torch
    import numpy as np
    from torch import Tensor

    Array = np.ndarray[Any, Any]

FUSED = "fused"  # a value of `compute`
ONE_AT_A_TIME = threading.Lock()  # not every threading layer of Numba takes calls from several threads


@dataclass(frozen=True)
class Loops:
    """What is run on a weight's codes where they lie, so that what is loaded into them later counts.

    Attributes:
        multiply: (x (M, in) fp32, found (M, out) fp32, threads) -> None: x W^T into `found`.
        unpack: (found (out, in) fp32, threads) -> None: W into `found`, to the bits of the dequantized weight; None
            where torch is as quick.
    """

    multiply: Callable[[Array, Array, int], None]
    unpack: Callable[[Array, int], None] | None = None


def int8(stored: Mapping[str, Tensor], shape: tuple[int, int]) -> Loops:
    """The loop for int8 codes, W = (codes - zero point) scale.

    Args:
        stored: codes (out, in) int8, scale () or (out, 1) fp32, zero_point (out, 1) fp32 where there is one.
        shape: (out, in).
    """
    import numpy as np

    from harness import fused_loops

    zero = stored["zero_point"].numpy() if "zero_point" in stored else np.zeros(1, dtype=np.float32)
    loop, codes, scale = fused_loops.int8, stored["codes"].numpy(), stored["scale"].numpy().reshape(-1)
    zero = zero.reshape(-1)
    return Loops(lambda x, found, threads: loop(x, codes, scale, zero, found, threads))


def int4(stored: Mapping[str, Tensor], shape: tuple[int, int], block: int, levels: tuple[float, ...]) -> Loops | None:
    """The loops for 4-bit codes in blocks of a flattened weight, W = levels[code] scale (+ minimum).

    Args:
        stored: codes (out * in / 2,) uint8, scale (out * in / block,) fp32, minimum alike where there is one.
        shape: (out, in).
        block: weights that share a scale.
        levels: 16, in the order of the codes.

    Returns:
        None where blocks do not divide a row.
    """
    from harness import fused_loops

    outputs, inputs = shape
    if inputs % block:
        return None
    blocks = inputs // block
    loop, whole, pairs = fused_loops.int4, fused_loops.unpack_int4, _pairs(levels)
    codes = stored["codes"].numpy().reshape(outputs, inputs // 2)
    scale = stored["scale"].numpy().reshape(outputs, blocks)
    least = stored["minimum"].numpy().reshape(outputs, blocks) if "minimum" in stored else scale[:, :0]

    def run(x: Array, found: Array, threads: int) -> None:
        parts = x.reshape(-1, blocks, block)
        sums = parts.sum(axis=2) if least.size else parts[:, :0, 0]
        loop(parts, sums, codes, scale, least, pairs, found, threads)

    return Loops(run, lambda found, threads: whole(codes, scale, least, pairs, found, threads))


def multiply(x: Tensor, loops: Loops, outputs: int) -> Tensor:
    """Run a weight's product with as many threads as torch has: (M, in) fp32 contiguous -> (M, out) fp32."""
    import torch

    from harness import fused_loops

    found = torch.empty(x.shape[0], outputs)
    with ONE_AT_A_TIME:
        loops.multiply(x.numpy(), found.numpy(), fused_loops.threads(torch.get_num_threads()))
    return found


def unpacked(loops: Loops, shape: tuple[int, int]) -> Tensor | None:
    """The weight (out, in) fp32 by a loop, with as many threads as torch has; None where there is no such loop."""
    import torch

    from harness import fused_loops

    if loops.unpack is None:
        return None
    found = torch.empty(shape)
    with ONE_AT_A_TIME:
        loops.unpack(found.numpy(), fused_loops.threads(torch.get_num_threads()))
    return found


@functools.lru_cache(maxsize=16)
def _pairs(levels: tuple[float, ...]) -> Array:
    """Both levels of every byte as one element of 8 bytes: (256,) int64, the high nibble's first."""
    import numpy as np

    table = np.array(levels, dtype=np.float32)
    both = np.stack((table.repeat(16), np.tile(table, 16)), axis=1)
    return both.view(np.int64).reshape(-1)
