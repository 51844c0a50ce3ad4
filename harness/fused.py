"""Products with the codes as they lie (`compute=fused`): a weight is unpacked in the cache, not in memory.

A token's decode reads every weight once, so that bytes are time: a dequantized weight is written and read again, four
bytes an element. Here a row of a weight at a time is unpacked where it is multiplied. For more rows than
`products.FEW_ROWS` some rows of the weight at a time are unpacked, to the bits of the dequantized ones, and torch
multiplies them before they leave the cache. Activations are never rounded, sums are fp32. Other devices, and blocks
that do not divide a row, take the product that the method has otherwise. The loops are compiled by Numba, for this
processor, once: the harness's cache keeps them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # annotations only: methods are listed without torch
    import numpy as np
    from torch import Tensor

    Array = np.ndarray[Any, Any]

FUSED = "fused"  # a value of `compute`
SLAB = 2**19  # elements of a weight that are unpacked at a time: 2 MiB, which stays in the cache
ONE_AT_A_TIME = threading.Lock()  # not every threading layer of Numba takes calls from several threads


@dataclass(frozen=True)
class Loops:
    """What is run on a weight's codes where they lie, so that what is loaded into them later counts.

    Attributes:
        multiply: (x (M * in,) fp32, found (M * out,) fp32, threads) -> None: x W^T into `found`.
        unpack: (first, found (rows * in,) fp32, threads) -> None: W's rows from the first on into `found`.
    """

    multiply: Callable[[Array, Array, int], None]
    unpack: Callable[[int, Array, int], None]


def int8(stored: Mapping[str, Tensor], shape: tuple[int, int]) -> Loops:
    """The loops for int8 codes, W = (codes - zero point) scale; in products the scale comes behind the sum of a row.

    Args:
        stored: codes (out, in) int8, scale () or (out, 1) fp32, zero_point (out, 1) fp32 where there is one.
        shape: (out, in).
    """
    import numpy as np

    from harness import fused_loops

    zero = stored["zero_point"].numpy() if "zero_point" in stored else np.zeros(1, dtype=np.float32)
    weight = stored["codes"].numpy(), stored["scale"].numpy().reshape(-1), zero.reshape(-1)
    multiply, unpack = fused_loops.int8, fused_loops.unpack_int8
    return Loops(
        lambda x, found, threads: multiply(x, *weight, found, threads),
        lambda first, found, threads: unpack(*weight, first, found, threads),
    )


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
    import numpy as np

    from harness import fused_loops

    inputs = shape[1]
    if inputs % block:
        return None
    scale = stored["scale"].numpy()
    least = stored["minimum"].numpy() if "minimum" in stored else scale[:0]
    table = np.array(levels, dtype=np.float32)
    planes = np.ascontiguousarray(table.view(np.uint8).reshape(16, 4).T).reshape(-1)
    weight = stored["codes"].numpy(), scale, least, table, planes, inputs
    multiply, unpack = fused_loops.int4, fused_loops.unpack_int4
    return Loops(
        lambda x, found, threads: multiply(x, *weight, found, threads),
        lambda first, found, threads: unpack(*weight, first, found, threads),
    )


def multiply(x: Tensor, loops: Loops, outputs: int) -> Tensor:
    """Run a weight's product with as many threads as torch has: (..., in) fp32 contiguous -> (..., out) fp32."""
    import torch

    from harness import fused_loops

    found = torch.empty(*x.shape[:-1], outputs)
    with ONE_AT_A_TIME:
        loops.multiply(x.numpy().reshape(-1), found.numpy().reshape(-1), fused_loops.threads(torch.get_num_threads()))
    return found


def unpack(loops: Loops, first: int, found: Tensor) -> None:
    """Write rows of the weight, from the first on, into `found` (rows, in) fp32, with as many threads as torch has."""
    import torch

    from harness import fused_loops

    with ONE_AT_A_TIME:
        loops.unpack(first, found.numpy().reshape(-1), fused_loops.threads(torch.get_num_threads()))
