"""What a model's architecture fixes, read off a model on the meta device: no weights, nothing allocated."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from harness.core import catalog
from harness.core.specification import parse
from harness.inputs.models import architectures
from harness.methods.quantizing.arguments import resolve


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

    @property
    def elements(self) -> int:
        """Parameters, tied ones once."""
        return sum(tensor.elements for tensor in self.tensors)


@dataclass(frozen=True)
class Truth:
    """What a method of ours holds, predicted: bytes, and how they are made up."""

    storage: int
    footprint: int
    parameters: int
    linear_elements: int
    codes: int  # bytes of the codes alone
    bits_per_weight: float

    @property
    def state(self) -> int:
        """Bytes of scales, zero points and tables."""
        return round(self.bits_per_weight * self.linear_elements / 8) - self.codes if self.linear_elements else 0


@functools.cache
def anatomy(model: str) -> Anatomy:
    """Read a known architecture in fp32; UnknownName for another."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from harness.inputs.models import checkpoints

    config = architectures.config_of(model)
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
    predicted = sizes.predict(architectures.config_of(model), method, arguments)
    elements = int(predicted["linear_elements"])
    return Truth(
        storage=int(predicted["memory.storage"]),
        footprint=int(predicted["memory.footprint"]),
        parameters=int(predicted["memory.parameters"]),
        linear_elements=elements,
        codes=int(elements * method.bits / 8),
        bits_per_weight=predicted["bits_per_weight"],
    )
