"""What checks share: relative differences, and figures that hold within a limit or to the last bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from harness.core.records import Figure


def relative(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted| in Frobenius norm, fp64; shapes equal."""
    a, b = found.double(), wanted.double()
    return float((a - b).norm() / b.norm())


def within(value: float, limit: float, **detail: Any) -> Figure:
    """A figure that must not exceed its limit; a value that is not finite does."""
    return Figure(value, "", detail={"holds": value <= limit, "limit": f"at most {limit:g}", **detail})


def equal(found: Tensor, wanted: Tensor, **detail: Any) -> Figure:
    """The relative difference of two outputs that must have equal bits."""
    holds = torch.equal(found, wanted)
    return Figure(0.0 if holds else relative(found, wanted), "", detail={"holds": holds, "limit": "0", **detail})
