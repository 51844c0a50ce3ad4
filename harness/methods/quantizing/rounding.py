"""Quantizing by compiled loops: to the bits of a method's own `quantize`, in one pass over a weight as it lies.

A method is defined in torch, by some ten operations a weight, between which threads wait for the interpreter. Loading
a model on a CPU takes these instead where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # annotations only: methods are listed without torch
    import numpy as np
    from torch import Tensor

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Rounding:
    """How a weight is turned into codes.

    Attributes:
        found: room for the whole weight's codes and scale.
        unit: weights that share a scale, all in one row.
        loop: (bits (units, unit), codes, scale) -> None, where `found` has a line for each unit.
    """

    found: dict[str, Tensor]
    unit: int
    loop: Callable[[Array, Array, Array], None]

    def fill(self, start: int, rows: Tensor) -> None:
        """Quantize rows of the weight, from `start` on: (rows, in) fp32 or bf16, contiguous."""
        import torch

        bits = rows.view(torch.uint32 if rows.dtype == torch.float32 else torch.uint16).view(-1, self.unit)
        first = start * rows.shape[1] // self.unit
        codes, scale = self.found["codes"], self.found["scale"].view(-1)
        lines = codes.view(len(scale), -1)[first : first + len(bits)], scale[first : first + len(bits)]
        self.loop(bits.numpy(), *(line.numpy() for line in lines))


def int8(shape: tuple[int, int]) -> Rounding:
    """As `codes.quantize_rows`."""
    import torch

    from harness.methods.quantizing import rounding_loops

    found = {"codes": torch.empty(shape, dtype=torch.int8), "scale": torch.empty(shape[0], 1)}
    return Rounding(found, shape[1], rounding_loops.int8)


def int4(shape: tuple[int, int], block: int) -> Rounding | None:
    """As the method linear-int4; None where blocks do not divide a row, or cut a byte."""
    from harness.methods.quantizing import rounding_loops

    return None if shape[1] % block or block % 2 else Rounding(_room(shape, block), block, rounding_loops.int4)


def to_levels(shape: tuple[int, int], block: int, levels: tuple[float, ...]) -> Rounding | None:
    """As `codes.quantize_to_levels`; None where blocks do not divide a row, or cut a byte."""
    import numpy as np

    from harness.methods.quantizing import rounding_loops

    if shape[1] % block or block % 2:
        return None
    order = sorted(range(len(levels)), key=levels.__getitem__)
    ascending = np.array([levels[code] for code in order], dtype=np.float32)
    tables = (ascending[:-1] + ascending[1:]) / np.float32(2), np.array(order, dtype=np.uint8)
    return Rounding(
        _room(shape, block), block, lambda bits, codes, scale: rounding_loops.levels(bits, *tables, codes, scale)
    )


def _room(shape: tuple[int, int], block: int) -> dict[str, Tensor]:
    import torch

    count = shape[0] * shape[1]
    return {"codes": torch.empty(count // 2, dtype=torch.uint8), "scale": torch.empty(count // block)}
