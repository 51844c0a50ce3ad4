"""The search behind a memory figure that has no known rule: every width for every kind of tensor.

Kinds are a model's parameters with layer numbers and the split of vectors folded away; the space is every assignment
of 1, 2 or 4 bytes an element to the kinds, with or without the mask buffers of older transformers, with the tied head
not counted again or counted again at 1, 2 or 4 bytes.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

from harness.published.anatomy import Anatomy, anatomy
from harness.published.claims import MASKS, Claim, Convention
from harness.published.conventions import count

WIDTHS = (1, 2, 4)  # bytes an element: int8, fp16, fp32
CLOSEST = 3  # shown where nothing hits


@dataclass(frozen=True)
class Hit:
    """One assignment and the bytes it gives."""

    bytes: int
    widths: Mapping[str, int]
    masks: bool
    head_again: int  # bytes an element of a second head, 0 for none

    def __str__(self) -> str:
        groups = [
            f"{width} B: {', '.join(kind for kind, chosen in self.widths.items() if chosen == width)}"
            for width in WIDTHS
            if width in self.widths.values()
        ]
        groups += ["masks counted"] if self.masks else []
        groups += [f"head again at {self.head_again} B"] if self.head_again else []
        return "; ".join(groups)


@dataclass(frozen=True)
class Search:
    """What was searched and what was found: `hits` print as the claim does, `closest` are the nearest other totals."""

    kinds: tuple[str, ...]
    size: int
    hits: tuple[Hit, ...]
    closest: tuple[Hit, ...]


def kinds(model: Anatomy) -> dict[str, int]:
    """Kinds of tensor and their elements: matrices by name, the biases of matrices together, norms by name's end."""
    found: Counter[str] = Counter()
    projections = {tensor.name.rpartition(".")[0] for tensor in model.tensors if tensor.role == "projection"}
    for tensor in model.tensors:
        owner, _, last = tensor.name.rpartition(".")
        if tensor.role == "vector":
            found[f"{'projection' if owner in projections else 'norm'} {last}es".replace("weightes", "weights")] += (
                tensor.elements
            )
        else:
            found[re.sub(r"^(transformer|model)\.|\b(h|layers)\.\d+\.", "", owner)] += tensor.elements
    return dict(found)


@functools.cache
def search(model: str, published: Decimal, unit_bytes: int, digits: int) -> Search:
    """Try the whole space for a figure printed with `digits` decimals of a unit of `unit_bytes`."""
    about = anatomy(model)
    sizes = kinds(about)
    totals = np.zeros(1, dtype=np.int64)
    for elements in sizes.values():
        totals = (totals[:, None] + elements * np.array(WIDTHS)).ravel()  # (3 ** kinds,), first kind slowest
    head = next((tensor.elements for tensor in about.tensors if tensor.role == "tied"), 0)
    masks = count(about, Convention(masks=MASKS[1])).masks
    extras = [(with_masks, again) for with_masks in (False, True) for again in (0, *WIDTHS)]
    space = np.concatenate([totals + masks * with_masks + head * again for with_masks, again in extras])
    distance = np.abs(space - float(published) * unit_bytes)
    window = distance <= unit_bytes * 10.0**-digits  # a printed step each side, then held to the printed digits
    step = Decimal(1).scaleb(-digits)
    hits = [
        index
        for index in np.flatnonzero(window)
        if (Decimal(int(space[index])) / unit_bytes).quantize(step) == published
    ]
    nearest: dict[int, int] = {}
    for index in np.argsort(distance, kind="stable")[: 64 * CLOSEST]:  # several assignments share a total
        nearest.setdefault(int(space[index]), int(index))

    def hit(index: int) -> Hit:
        extra, rest = divmod(index, len(totals))
        digits_of = np.unravel_index(rest, (len(WIDTHS),) * len(sizes))
        widths = {kind: WIDTHS[int(digit)] for kind, digit in zip(sizes, digits_of, strict=True)}
        return Hit(int(space[index]), widths, *extras[extra])

    closest = tuple(hit(index) for index in list(nearest.values())[:CLOSEST])
    return Search(tuple(sizes), len(space), tuple(hit(int(index)) for index in hits), closest)


def explain(found: Search, claim: Claim) -> str:
    """The search in words."""
    space = (
        f"{found.size:,} counts searched: 1, 2 or 4 bytes for each of {len(found.kinds)} kinds of tensor "
        f"({', '.join(found.kinds)}), mask buffers or not, the head counted again or not"
    )
    if found.hits:
        return f"{space}; {len(found.hits)} give it, first: {found.hits[0]}"
    near = "; ".join(f"{float(hit.bytes) / 2**20:.2f} MiB ({hit})" for hit in found.closest)
    return f"{space}; none gives {claim.published} {claim.unit}; closest: {near}"
