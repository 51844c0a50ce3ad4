"""Bytes of a model, counted on the meta device: its anatomy, a report's convention, and the search for an unknown one.

bytes = sum over tensors of elements * width  +  4 * output channels of scaled tensors
        + a copied head + mask buffers + rotary buffers

What a card's allocator hands out is counted block by block (`block`).

Where a memory figure has no known rule, every width is tried for every kind of tensor. Kinds are a model's parameters
with layer numbers and the split of vectors folded away; the space is every assignment of 1, 2 or 4 bytes an element to
the kinds, with or without the mask buffers of older transformers, with the tied head not counted again or counted
again at 1, 2 or 4 bytes. Behind that stands a search over single tensors (`by_tensor`): whether any choice of whole
tensors at 1 byte, the others at 4, gives the figure. It is a question of reachable sums, so 2^148 choices are settled
by 148 shifts of a long integer.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np

from harness.core import catalog
from harness.core.specification import parse
from harness.inputs.models import names
from harness.methods.quantizing.arguments import resolve
from harness.published.claims import MASKS, REMAINDERS, UNITS, Claim, Convention, Publication, TensorGroup

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SCALE_BYTES = 4  # fp32
WIDTHS = (1, 2, 4)  # bytes an element: int8, fp16, fp32
CLOSEST = 3  # shown where nothing hits
BLOCK = 512  # bytes that torch's allocator rounds to
SEGMENT, LARGE, SPLIT = 2 << 20, 10 << 20, 1 << 20  # of torch's allocator: `block`
GROUP, TABLE = 64, 64  # weights under one absmax; bytes of sixteen fp32 levels


@dataclass(frozen=True)
class Tensor:
    """One parameter: elements, output channels of its module (0 outside matrices), and the part it plays."""

    name: str
    elements: int
    channels: int
    role: str  # 'projection', 'head', 'embedding', 'tied' (embedding and head in one), 'vector'


@dataclass(frozen=True)
class Anatomy:
    """A model as far as its configuration fixes it."""

    tensors: tuple[Tensor, ...]
    layers: int
    positions: int
    vocabulary: int
    rotary_elements: int  # inverse frequencies of one rotary module, 0 without one
    modules: Mapping[str, int]  # class name -> how many
    buffer_bytes: int  # of all buffers as transformers registers them today, in fp32


@dataclass(frozen=True)
class Truth:
    """What a method of ours holds, predicted: bytes, and how they are made up."""

    storage: int
    parameters: int
    codes: int  # bytes of the codes alone
    state: int  # bytes of scales, zero points and tables


def config_of(model: str, architecture: str) -> PretrainedConfig:
    """The configuration of a known name, or the one that a claims file gives as JSON."""
    if not architecture:
        return names.config_of(model)
    from transformers import AutoConfig

    return AutoConfig.for_model(**json.loads(architecture))


def anatomy_of(report: Publication) -> Anatomy:
    """The architecture that a report speaks of."""
    return anatomy(report.model, report.architecture)


def truth_of(claim: Claim) -> Truth:
    """What the claim's method of ours holds."""
    return truth(claim.report.model, claim.specification, claim.report.architecture)


@functools.cache
def anatomy(model: str, architecture: str = "") -> Anatomy:
    """Read an architecture in fp32; UnknownName for a name that is none and has no configuration."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from harness.inputs.models import checkpoints

    config = config_of(model, architecture)
    sketch = checkpoints.sketch_model(config, "fp32")
    embedding, head = sketch.get_input_embeddings(), sketch.get_output_embeddings()  # type: ignore[operator]
    tensors = []
    for name, parameter in sketch.named_parameters():
        owner = sketch.get_submodule(name.rpartition(".")[0])
        roles = {id(embedding.weight): "embedding", id(head.weight): "head"}
        if embedding.weight is head.weight:
            roles[id(head.weight)] = "tied"
        matrix = parameter.dim() == 2
        role = roles.get(id(parameter), "projection" if isinstance(owner, (nn.Linear, Conv1D)) else "embedding")
        channels = parameter.shape[1 if isinstance(owner, Conv1D) else 0] if matrix else 0
        tensors.append(Tensor(name, parameter.numel(), channels, role if matrix else "vector"))
    rotary = [buffer.numel() for name, buffer in sketch.named_buffers() if name.endswith(".inv_freq")]
    return Anatomy(
        tensors=tuple(tensors),
        layers=config.num_hidden_layers,
        positions=config.max_position_embeddings,
        vocabulary=config.vocab_size,
        rotary_elements=max(rotary, default=0),
        modules=Counter(type(module).__name__ for module in sketch.modules()),
        buffer_bytes=sum(buffer.numel() * buffer.element_size() for buffer in sketch.buffers()),
    )


@functools.cache
def truth(model: str, specification: str, architecture: str = "") -> Truth:
    """Predict the bytes of an architecture under one of our methods."""
    from harness.inputs.models import sizes

    parsed = parse(specification)
    method = catalog.methods()[parsed.name]
    arguments = resolve(parsed, method, "cpu")
    predicted = sizes.predict(config_of(model, architecture), method, arguments)
    elements = int(predicted["linear_elements"])
    codes = int(elements * method.bits / 8)
    state = round(predicted["bits_per_weight"] * elements / 8) - codes if elements else 0
    return Truth(int(predicted["memory.storage"]), int(predicted["memory.parameters"]), codes, state)


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


def covers(group: TensorGroup, name: str) -> bool:
    """Whether a group takes a parameter, whose decoder layer is the first number of its name."""
    layer = layer_of(name)
    if group.layers is not None and (layer is None or not group.layers[0] <= layer <= group.layers[1]):
        return False
    return any(fnmatchcase(name, pattern) for pattern in group.tensors)


def block(size: int) -> int:
    """Bytes that torch's allocator hands out on a card for a tensor of so many.

    Sizes are rounded up to 512 bytes. One of 10 MiB or more gets a segment of its own, rounded up to 2 MiB, and keeps
    all of it where no more than 1 MiB would be left over.
    """
    rounded = -(-size // BLOCK) * BLOCK
    if rounded < LARGE:
        return rounded
    segment = -(-rounded // SEGMENT) * SEGMENT
    return segment if segment - rounded <= SPLIT else rounded


def layer_of(name: str) -> int | None:
    """The decoder layer of a parameter: the first number of its name."""
    number = re.search(r"\.(\d+)\.", name)
    return int(number[1]) if number else None


def held(anatomy: Anatomy, convention: Convention) -> list[Tensor]:
    """The tensors that are counted: all, or of a spread model what lies on its first card."""
    if convention.holds is None:
        return list(anatomy.tensors)
    first, last = convention.holds
    kept = []
    for tensor in anatomy.tensors:
        layer = layer_of(tensor.name)
        if (first <= layer <= last) if layer is not None else tensor.role in ("embedding", "tied"):
            kept.append(tensor)
    return kept


def scale_bytes(tensor: Tensor, convention: Convention) -> list[int]:
    """Sizes of the tensors that one quantized weight carries beside its codes."""
    if convention.scales == "fp32 per 64 and a table":
        return [tensor.elements // GROUP * SCALE_BYTES, TABLE]
    if convention.scales == "none":
        return []
    alone = convention.scales.endswith("one a vector") and tensor.role == "vector"
    return [SCALE_BYTES * (tensor.channels or alone)]


def count(anatomy: Anatomy, convention: Convention) -> Count:
    """Count a model's bytes as a report does; ValueError where a group takes no tensor or bits do not fill a byte."""
    width, kept = REMAINDERS[convention.remainder], held(anatomy, convention)
    taken: set[int] = set()
    codes: list[int] = []
    rest: list[int] = []
    scales: list[int] = []
    for tensor in kept:
        group = next((index for index, group in enumerate(convention.quantized) if covers(group, tensor.name)), None)
        if group is None:
            rest.append(tensor.elements * width)
            continue
        taken.add(group)
        bits = tensor.elements * convention.quantized[group].bits
        if bits % 8:
            raise ValueError(f"{tensor.name}: {bits} bits do not fill a byte")
        codes.append(int(bits) // 8)
        scales += scale_bytes(tensor, convention)
    if len(taken) < len(convention.quantized):
        missed = next(group for index, group in enumerate(convention.quantized) if index not in taken)
        raise ValueError(f"no parameter is called {' or '.join(missed.tensors)}")
    tied = next((tensor for tensor in kept if tensor.role == "tied"), None)
    head_copy = 0
    if tied is not None and convention.head == "copied at 8 bits":  # beside the embedding that it was tied to
        head_copy = tied.elements + sum(scale_bytes(tied, convention))
    elif tied is not None and convention.head == "copied at 32 bits":
        head_copy = 4 * tied.elements
    layers = anatomy.layers if convention.holds is None else convention.holds[1] - convention.holds[0] + 1
    rotary = layers * (convention.rotary != "none") + convention.rotary.endswith("one more")
    size: Callable[[int], int] = block if convention.allocated else int
    return Count(
        quantized=sum(map(size, codes)),
        remainder=sum(map(size, rest)),
        scales=sum(map(size, scales)),
        head_copy=head_copy,
        masks=anatomy.layers * (anatomy.positions**2 + 4) if convention.masks != "none" else 0,
        rotary=rotary * size(anatomy.rotary_elements * 4),
    )


def describe(convention: Convention) -> str:
    """A convention in words, for a table."""
    if convention.per_layer or convention.named:
        return f"{convention.per_layer} a layer and {convention.more} more" if convention.per_layer else "by its class"
    if convention.whole_tensors:
        return "whole tensors at 1 byte, the others at 4, nobody says which"
    parts = []
    for group in convention.quantized:
        layers = f" in layers {group.layers[0]}-{group.layers[1]}" if group.layers else ""
        parts.append(f"{' and '.join(group.tensors)}{layers} at {group.bits:g} bits")
    parts.append(f"{'the rest' if parts else 'everything'} in {convention.remainder}")
    parts.append(
        {"none": "no scales" if convention.quantized else ""}.get(convention.scales, f"{convention.scales} scales")
    )
    parts.append(f"the tied head {convention.head}" if convention.head != "shared" else "")
    parts.append("causal masks counted" if convention.masks != "none" else "")
    parts.append("a rotary buffer a layer counted" if convention.rotary != "none" else "")
    parts.append("what fp32 takes beyond that" if convention.only == "saved" else "")
    parts.append(f"the {convention.only} part only" if convention.only in ("int8", "fp32") else "")
    if convention.holds is not None:
        parts.append(f"layers {convention.holds[0]}-{convention.holds[1]} and the embedding only")
    parts.append("in blocks of a card's allocator" if convention.allocated else "")
    return ", ".join(part for part in parts if part)


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


def search(claim: Claim) -> Search:
    """Try the whole space for what prints as the claim's figure."""
    about, unit = anatomy_of(claim.report), int(UNITS[claim.unit])
    sizes = kinds(about)
    totals = np.zeros(1, dtype=np.int64)
    for elements in sizes.values():
        totals = (totals[:, None] + elements * np.array(WIDTHS)).ravel()  # (3 ** kinds,), first kind slowest
    head = next((tensor.elements for tensor in about.tensors if tensor.role == "tied"), 0)
    masks = count(about, Convention(masks=MASKS[1])).masks
    extras = [(with_masks, again) for with_masks in (False, True) for again in (0, *WIDTHS)]
    space = np.concatenate([totals + masks * with_masks + head * again for with_masks, again in extras])
    distance = np.abs(space - float(claim.value) * unit)
    window = distance <= unit * 10.0**-claim.digits  # a printed step each side, then held to the printed digits
    hits = [index for index in np.flatnonzero(window) if claim.printed(int(space[index])) == claim.value]
    nearest: dict[int, int] = {}
    for index in np.argsort(distance, kind="stable")[: 64 * CLOSEST]:  # several assignments share a total
        nearest.setdefault(int(space[index]), int(index))

    def hit(index: int) -> Hit:
        extra, rest = divmod(index, len(totals))
        digits = np.unravel_index(rest, (len(WIDTHS),) * len(sizes))
        widths = {kind: WIDTHS[int(digit)] for kind, digit in zip(sizes, digits, strict=True)}
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


@dataclass(frozen=True)
class WholeTensors:
    """Whether whole tensors at 1 byte and the others at 4 can give a figure: by what else is counted, which fits."""

    tensors: int
    step: int  # elements: every tensor is a multiple of it
    tried: tuple[str, ...]
    fits: tuple[str, ...]


def reachable(sizes: Sequence[int]) -> int:
    """The sums that any choice of the sizes gives: bit n is set where n is one."""
    sums = 1
    for size in sizes:
        sums |= sums << size
    return sums


def by_tensor(claim: Claim) -> WholeTensors:
    """Try every choice of whole tensors at 1 byte, the others at 4, for what prints as the claim's figure."""
    about, unit = anatomy_of(claim.report), Decimal(UNITS[claim.unit])
    step = int(np.gcd.reduce([tensor.elements for tensor in about.tensors]))
    sums = reachable([tensor.elements // step for tensor in about.tensors])
    elements = sum(tensor.elements for tensor in about.tensors)
    masks, scalars = about.layers * about.positions**2, 4 * about.layers
    head = next((tensor.elements for tensor in about.tensors if tensor.role == "tied"), 0)
    half = unit * Decimal(5).scaleb(-claim.digits - 1)
    low, high = int(claim.value * unit - half), int(claim.value * unit + half) + 1
    also = {"no masks": 0, "bool masks": masks + scalars, "fp32 masks": 4 * masks + scalars}
    heads = {"": 0, " and the head again in fp16": 2 * head, " and the head again in fp32": 4 * head}
    tried, fits = [], []
    for name, more in ((mask + again, size + copy) for mask, size in also.items() for again, copy in heads.items()):
        tried.append(name)
        base = elements + more  # every tensor at 1 byte; `step` elements at 4 instead add 3 * step
        first, last = -((base - low) // (3 * step)), (high - base) // (3 * step)
        hits = [count for count in range(max(first, 0), last + 1) if sums >> count & 1]
        if any(claim.printed(base + 3 * step * hit) == claim.value for hit in hits):
            fits.append(name)
    return WholeTensors(len(about.tensors), step, tuple(tried), tuple(fits))
