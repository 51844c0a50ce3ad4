"""Bytes of a model under a report's convention: which tensors at which width, and what else was counted.

bytes = sum over tensors of elements * width  +  4 * output channels of scaled tensors
        + a copied head + mask buffers + rotary buffers
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from harness.published.anatomy import Anatomy, Tensor
from harness.published.claims import REMAINDERS, Convention, Group

SCALE_BYTES = 4  # fp32


@dataclass(frozen=True)
class Count:
    """Bytes by what they are; `total` is what the report adds up."""

    quantized: int
    remainder: int
    scales: int = 0
    head_copy: int = 0
    masks: int = 0
    rotary: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.quantized + self.remainder + self.scales + self.head_copy + self.masks + self.rotary

    @property
    def by_dtype(self) -> Mapping[str, int]:
        """Codes apart from everything in floating point."""
        return {"int8": self.quantized, "fp32": self.total - self.quantized}


def layer_of(name: str) -> int | None:
    """The decoder layer in a parameter's name: its first number."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def covers(group: Group, name: str) -> bool:
    """Whether a group takes a parameter."""
    layer = layer_of(name)
    if group.layers is not None and (layer is None or not group.layers[0] <= layer <= group.layers[1]):
        return False
    return any(fnmatchcase(name, pattern) for pattern in group.tensors)


def count(anatomy: Anatomy, convention: Convention) -> Count:
    """Count a model's bytes as a report does.

    Raises:
        ValueError: a group that takes no tensor, or bits that do not fill a byte.
    """
    width = REMAINDERS[convention.remainder]
    quantized = remainder = scales = 0
    taken: set[int] = set()
    for tensor in anatomy.tensors:
        group = next((index for index, group in enumerate(convention.quantized) if covers(group, tensor.name)), None)
        if group is None:
            remainder += tensor.elements * width
            continue
        taken.add(group)
        bits = tensor.elements * convention.quantized[group].bits
        if bits % 8:
            raise ValueError(f"{tensor.name}: {bits} bits do not fill a byte")
        quantized += int(bits) // 8
        scales += SCALE_BYTES * tensor.channels if convention.scales != "none" else 0
    if len(taken) < len(convention.quantized):
        missed = next(group for index, group in enumerate(convention.quantized) if index not in taken)
        raise ValueError(f"no parameter is called {' or '.join(missed.tensors)}")
    return Count(
        quantized=quantized,
        remainder=remainder,
        scales=scales,
        head_copy=_head_copy(anatomy, convention),
        masks=anatomy.layers * (anatomy.positions**2 + 4) if convention.masks != "none" else 0,
        rotary=anatomy.layers * anatomy.rotary_elements * 4 if convention.rotary != "none" else 0,
    )


def _tied(anatomy: Anatomy) -> Tensor | None:
    return next((tensor for tensor in anatomy.tensors if tensor.role == "tied"), None)


def _head_copy(anatomy: Anatomy, convention: Convention) -> int:
    """An int8 copy of a tied head, beside the embedding it was tied to."""
    tied = _tied(anatomy)
    if convention.head == "shared" or tied is None:
        return 0
    return tied.elements + (SCALE_BYTES * tied.channels if convention.scales != "none" else 0)


def read_by_a_pass(anatomy: Anatomy, convention: Convention) -> int:
    """Bytes of weights that one forward pass cannot do without: all but tables of which it reads a few rows.

    A head that was copied is read in place of the embedding it was tied to. Buffers are not counted.
    """
    counted = count(anatomy, convention)
    dropped = {"embedding"} | ({"tied"} if counted.head_copy else set())
    rows = tuple(tensor for tensor in anatomy.tensors if tensor.role in dropped)
    if not rows:
        return counted.quantized + counted.remainder + counted.scales
    wanted = tuple(group for group in convention.quantized if any(covers(group, row.name) for row in rows))
    tables = count(replace(anatomy, tensors=rows), replace(convention, quantized=wanted, head="shared"))
    return (
        counted.quantized
        + counted.remainder
        + counted.scales
        + counted.head_copy
        - tables.total
        + tables.masks
        + tables.rotary
    )


def describe(convention: Convention) -> str:
    """A convention in words, for a table."""
    if convention.per_layer or convention.named:
        return f"{convention.per_layer} a layer and {convention.more} more" if convention.per_layer else "by its class"
    parts = []
    for group in convention.quantized:
        layers = f" in layers {group.layers[0]}-{group.layers[1]}" if group.layers else ""
        parts.append(f"{' and '.join(group.tensors)}{layers} at {group.bits:g} bits")
    parts.append(f"{'the rest' if parts else 'everything'} in {convention.remainder}")
    parts.append(
        {"none": "no scales" if convention.quantized else ""}.get(convention.scales, f"{convention.scales} scales")
    )
    parts.append("the tied head copied at 8 bits" if convention.head != "shared" else "")
    parts.append("causal masks counted" if convention.masks != "none" else "")
    parts.append("a rotary buffer a layer counted" if convention.rotary != "none" else "")
    parts.append(f"the {convention.only} part only" if convention.only else "")
    return ", ".join(part for part in parts if part)
