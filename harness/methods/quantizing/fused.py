"""Products with the codes as they lie, on a CPU: a weight is unpacked in registers or in the cache, not in memory.

A token's decode reads every weight once, so that bytes are time: a dequantized weight is written and read again, four
bytes an element. Here a row of a weight at a time is unpacked where it is multiplied: up to `products.FEW_ROWS` rows of
fp32 go this way. For more the whole weight is unpacked, to the bits of the method's `dequantize`. `compute=fused` takes
few rows of any dtype so, and for more unpacks some rows of the weight at a time, which torch multiplies before they
leave the cache: quicker where weights are large; torch may sum a part's products in another order. Activations are
never rounded, sums are fp32. Other devices, and blocks that do not divide a row, take the product that the method has
otherwise. The loops are compiled by Numba, for this processor, once: the harness's cache keeps them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # annotations only: methods are listed without torch
    import numpy as np
    from torch import Tensor

    Array = np.ndarray[Any, Any]

FUSED = "fused"  # a value of `compute`
SLAB = 2**20  # elements of a weight that are unpacked at a time: 4 MiB, which stay in the cache
ALONE = 2**20  # elements of a product that one thread is done with about when others would have woken
SOON = 2**18  # elements to unpack, likewise: fewer, as the product of the slab waits for them
ONE_AT_A_TIME = threading.Lock()  # not every threading layer of Numba takes calls from several threads


@dataclass(frozen=True)
class Loops:
    """What is run on a weight's codes where they lie, so that what is loaded into them later counts.

    Attributes:
        weight: what the loops take.
        shape: (out, in).
        multiply: x W^T by one thread, and shared out.
        unpack: W's rows by one thread, and shared out.
    """

    weight: tuple[Any, ...]
    shape: tuple[int, int]
    multiply: tuple[Callable[..., None], Callable[..., None]]
    unpack: tuple[Callable[..., None], Callable[..., None]]


def int8(stored: Mapping[str, Tensor], shape: tuple[int, int]) -> Loops:
    """The loops for int8 codes, W = (codes - zero point) scale; in products the scale comes behind the sum of a row.

    Args:
        stored: codes (out, in) int8, scale () or (out, 1) fp32, zero_point (out, 1) fp32 where there is one.
        shape: (out, in).
    """
    import numpy as np

    from harness.methods.quantizing import loops as loops

    zero = stored["zero_point"].numpy() if "zero_point" in stored else np.zeros(1, dtype=np.float32)
    weight = stored["codes"].numpy(), stored["scale"].numpy().reshape(-1), zero.reshape(-1)
    return Loops(weight, shape, (loops.int8, loops.int8_shared), (loops.unpack_int8, loops.unpack_int8_shared))


def int4(stored: Mapping[str, Tensor], shape: tuple[int, int], block: int, levels: tuple[float, ...]) -> Loops | None:
    """The loops for 4-bit codes in blocks of a flattened weight, W = levels[code] scale (+ minimum).

    Args:
        stored: codes (out * in / 2,) uint8, scale (out * in / block,) fp32, minimum alike where there is one.
        shape: (out, in).
        block: weights that share a scale.
        levels: 16, in the order of the codes.

    Returns:
        None where blocks do not divide a row, or cut a byte.
    """
    import numpy as np

    from harness.methods.quantizing import loops as loops

    if shape[1] % block or block % 2:
        return None
    scale = stored["scale"].numpy()
    least = stored["minimum"].numpy() if "minimum" in stored else scale[:0]
    table = np.array(levels, dtype=np.float32)
    planes = np.ascontiguousarray(table.view(np.uint8).reshape(16, 4).T).reshape(-1)
    weight = stored["codes"].numpy(), scale, least, table, planes, shape[1]
    return Loops(weight, shape, (loops.int4, loops.int4_shared), (loops.unpack_int4, loops.unpack_int4_shared))


def preload() -> None:
    """Have Numba set itself up, half a second, which processes that are forked later find done. Starts no thread."""
    import numpy as np

    from harness.methods.quantizing import loops as fused_loops

    one = np.ones(1, dtype=np.float32)
    fused_loops.int8(one, (np.ones((1, 1), dtype=np.int8), one, one), one.copy(), 0, 1)


def multiply(x: Tensor, loops: Loops) -> Tensor:
    """Compute x W^T: (..., in) fp32 contiguous -> (..., out) fp32."""
    import torch

    outputs, inputs = loops.shape
    found = torch.empty(*x.shape[:-1], outputs)
    given = x.numpy().reshape(-1), loops.weight, found.numpy().reshape(-1)
    _run(loops.multiply, given, outputs, _threads() if outputs * inputs > ALONE else 1)
    return found


def unpack(loops: Loops, first: int, found: Tensor) -> None:
    """Write rows of the weight, from the first on, into `found` (rows, in) fp32."""
    given = loops.weight, first, found.numpy().reshape(-1)
    _run(loops.unpack, given, len(found), _threads() if found.numel() > SOON else 1)


def whole(loops: Loops) -> Tensor:
    """The dequantized weight, (out, in) fp32."""
    import torch

    found = torch.empty(loops.shape)
    unpack(loops, 0, found)
    return found


def _threads() -> int:
    """As many as torch has."""
    import torch

    from harness.methods.quantizing import loops as fused_loops

    return fused_loops.threads(torch.get_num_threads())


def _run(loop: tuple[Callable[..., None], Callable[..., None]], given: Sequence[Any], rows: int, threads: int) -> None:
    """Run a loop over rows, alone or shared out."""
    if threads == 1:
        loop[0](*given, 0, rows)
        return
    with ONE_AT_A_TIME:
        loop[1](*given, rows, threads)
