"""Bytes of a model, counted on the meta device: its anatomy, a report's convention, and the search for an unknown one.

bytes = sum over tensors of elements * width  +  4 * output channels of scaled tensors
        + a copied head + mask buffers + rotary buffers

Where a memory figure has no known rule, every width is tried for every kind of tensor. Kinds are a model's parameters
with layer numbers and the split of vectors folded away; the space is every assignment of 1, 2 or 4 bytes an element to
the kinds, with or without the mask buffers of older transformers, with the tied head not counted again or counted
again at 1, 2 or 4 bytes.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from harness.core import catalog
from harness.core.specification import parse
from harness.inputs.models import names
from harness.methods.quantizing.arguments import resolve
from harness.published.claims import MASKS, REMAINDERS, UNITS, Claim, Convention, TensorGroup

SCALE_BYTES = 4  # fp32
WIDTHS = (1, 2, 4)  # bytes an element: int8, fp16, fp32
CLOSEST = 3  # shown where nothing hits


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


@functools.cache
def anatomy(model: str) -> Anatomy:
    """Read a known architecture in fp32; UnknownName for another."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from harness.inputs.models import checkpoints

    config = names.config_of(model)
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
def truth(model: str, specification: str) -> Truth:
    """Predict the bytes of a known architecture under one of our methods."""
    from harness.inputs.models import sizes

    parsed = parse(specification)
    method = catalog.methods()[parsed.name]
    arguments = resolve(parsed, method, "cpu")
    predicted = sizes.predict(names.config_of(model), method, arguments)
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
    number = re.search(r"\.(\d+)\.", name)
    if group.layers is not None and not (number and group.layers[0] <= int(number[1]) <= group.layers[1]):
        return False
    return any(fnmatchcase(name, pattern) for pattern in group.tensors)


def count(anatomy: Anatomy, convention: Convention) -> Count:
    """Count a model's bytes as a report does; ValueError where a group takes no tensor or bits do not fill a byte."""
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
    tied = next((tensor for tensor in anatomy.tensors if tensor.role == "tied"), None)
    head_copy = 0
    if tied is not None and convention.head != "shared":  # in int8, beside the embedding that it was tied to
        head_copy = tied.elements + (SCALE_BYTES * tied.channels if convention.scales != "none" else 0)
    return Count(
        quantized=quantized,
        remainder=remainder,
        scales=scales,
        head_copy=head_copy,
        masks=anatomy.layers * (anatomy.positions**2 + 4) if convention.masks != "none" else 0,
        rotary=anatomy.layers * anatomy.rotary_elements * 4 if convention.rotary != "none" else 0,
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
    about, unit = anatomy(claim.report.model), int(UNITS[claim.unit])
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
