"""Bytes of a model, measured and predicted.

*Storage* is every byte the model needs to run: parameters, buffers and quantization state wherever it hangs, each
storage once. The walk below finds the state of libraries that keep it outside parameters and buffers (bitsandbytes on
its parameters and modules, others in dictionaries of a module or inside tensor subclasses), on real tensors and on
the meta device alike, so that a prediction is the same sum over a model without weights.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.contracts import Arguments, Method

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EXACT = ("memory.parameters", "memory.footprint", "memory.storage")
REGISTERED = frozenset({"_parameters", "_buffers", "_modules"})  # of a module: walked by their names instead
TRANSIENT = frozenset({("MatmulLtState", "idx")})  # bitsandbytes: outlier columns of the last input, not needed to run
OPAQUE = (nn.Module, type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType)
PLAIN = (str, bytes, int, float, complex, torch.dtype, torch.device, torch.Size)
BITS = {"fp32": 32.0, "bf16": 16.0, "fp16": 16.0}


def _children(holder: Any) -> Iterable[Any]:
    """What hangs on an object: items of containers, attributes of instances."""
    if isinstance(holder, dict):
        return list(holder.values())
    if isinstance(holder, (list, tuple, set, frozenset)):
        return list(holder)
    kind, attributes = type(holder).__name__, getattr(holder, "__dict__", None) or {}
    return [value for name, value in attributes.items() if name not in REGISTERED and (kind, name) not in TRANSIENT]


def tensors(*holders: Any) -> Iterator[torch.Tensor]:
    """Every tensor reachable from the holders, submodules left out (walk `model.modules()` for them).

    A tensor subclass that flattens (`__tensor_flatten__`) stands for its parts: it owns no bytes itself.
    """
    seen: set[int] = set()
    todo = list(holders)
    while todo:
        holder = todo.pop()
        if holder is None or isinstance(holder, PLAIN) or id(holder) in seen:
            continue
        seen.add(id(holder))
        if isinstance(holder, torch.Tensor):
            flatten = getattr(holder, "__tensor_flatten__", None)
            if flatten is None:
                yield holder
            else:
                todo += [getattr(holder, name) for name in flatten()[0]]
        elif isinstance(holder, OPAQUE):
            continue
        todo += _children(holder)


def bytes_of(found: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind the tensors, each storage once (whole, where a tensor is a view of a part)."""
    storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in found)}
    return sum(storage.nbytes() for storage in storages.values())


def held(model: nn.Module) -> Iterator[torch.Tensor]:
    """Every tensor the model needs to run: parameters, buffers and quantization state."""
    holders: list[Any] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        holders += _children(module)
    return tensors(*holders)


def storage_bytes(model: nn.Module) -> int:
    """Every byte the model needs to run, each storage once."""
    return bytes_of(held(model))


def _tensor_bytes(found: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in found)


def measure(model: nn.Module) -> dict[str, int]:
    """`memory.parameters`, `memory.footprint` (transformers' `get_memory_footprint()`) and `memory.storage`, bytes."""
    parameters = _tensor_bytes(model.parameters())  # a tied parameter once
    return {
        "memory.parameters": parameters,
        "memory.footprint": parameters + _tensor_bytes(model.buffers()),
        "memory.storage": storage_bytes(model),
    }


def predict(config: PretrainedConfig, method: Method, arguments: Arguments) -> dict[str, float]:
    """`measure` of the model before its first forward, from its configuration alone: no weights, nothing allocated.

    Beside the bytes: `linear_elements`, how many weights the method quantizes, and `bits_per_weight`, 8 times the
    bytes of their codes, scales and tables over that count (of a method that quantizes none, its dtype's bits).
    """
    from harness import checkpoints

    model = checkpoints.sketch_model(config, arguments.dtype)
    method.sketch(model, arguments)
    weights = list(method.quantized(model))
    elements = sum(weight.elements for weight in weights)
    stored = sum(weight.storage for weight in weights)
    bits = 8 * stored / elements if elements else BITS[arguments.dtype]
    return {**measure(model), "linear_elements": elements, "bits_per_weight": bits}
