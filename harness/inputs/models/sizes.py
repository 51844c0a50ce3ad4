"""Bytes of a model, measured and predicted.

*Storage* is every byte the model needs to run: parameters, buffers and quantization state wherever it hangs, each
storage once. The walk below finds the state of libraries that keep it outside parameters and buffers (bitsandbytes on
its parameters and modules, others in dictionaries of a module or inside tensor subclasses), on real tensors and on
the meta device alike, so that a prediction is the same sum over a model without weights.

The most that loading takes on the way, by how the harness loads:

- A reference: the whole model in its dtype, and one tensor as it was read, counted in fp32.
- A method of ours: the unquantized model is loaded first, then each weight is replaced in turn. The peak is traced: the
  method's own code runs on the meta device while every storage alive is counted, so that copies in fp32, codes and
  what was freed before are those of the code that loads.
- bitsandbytes: transformers quantizes each tensor as it is read. The peak is the model at its end, and the largest
  quantized weight in fp32.

Left out: what the process takes by itself (about 0.5 GB for torch), pages of the file that the kernel may drop, the
rounding of allocators, further tensors that transformers' reading threads hold at one time, and every forward pass.
"""

from __future__ import annotations

import re
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from harness.core.contracts import Arguments, Method, QuantizedWeight
from harness.core.errors import BadSpecification
from harness.inputs.models import checkpoints

if TYPE_CHECKING:
    from transformers import PretrainedConfig

REGISTERED = frozenset({"_parameters", "_buffers", "_modules"})  # of a module: walked by their names instead
TRANSIENT = frozenset({("MatmulLtState", "idx")})  # bitsandbytes: outlier columns of the last input, not needed to run
OPAQUE = (nn.Module, type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType)
PLAIN = (str, bytes, int, float, complex, torch.dtype, torch.device, torch.Size)


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


def bytes_of(held: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind the tensors, each storage once (whole, where a tensor is a view of a part)."""
    storages = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in held)}
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


def _tensor_bytes(listed: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in listed)


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
    model = checkpoints.sketch_model(config, arguments.dtype)
    method.sketch(model, arguments)
    weights = list(method.quantized(model))
    elements = sum(weight.elements for weight in weights)
    bits = bits_per_weight(weights, arguments.dtype)
    return {**measure(model), "linear_elements": elements, "bits_per_weight": bits}


def bits_per_weight(weights: Sequence[QuantizedWeight], dtype: str) -> float:
    """8 * bytes of codes, scales and tables / elements; of an unquantized model the bits of its dtype."""
    elements, stored = sum(weight.elements for weight in weights), sum(weight.storage for weight in weights)
    return 8 * stored / elements if elements else 8.0 * checkpoints.TORCH_DTYPES[dtype].itemsize


FP32_BYTES = 4
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_size(text: str) -> int:
    """Bytes of '24GiB', '512 MB', '1.5GB'; a unit is required, since GB and GiB differ by 7%."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip(), re.ASCII)
    if not match or match[2] not in UNITS:
        raise BadSpecification(f"'{text}' is no size: write a number and one of {', '.join(UNITS)}, as in 24GiB")
    size = int(Decimal(match[1]) * UNITS[match[2]])
    if size <= 0:
        raise BadSpecification(f"'{text}' is no size above zero")
    return size


@dataclass(frozen=True)
class Peak:
    """The most bytes that loading holds at one time, and of what kind that moment is."""

    bytes: int
    how: str


class StorageCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage that operations under it make, for as long as it lives.

    `now` are the bytes of all storages alive, `peak` the most there were since `reset`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def take(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size

    def reset(self) -> None:
        """Begin a new peak."""
        self.peak = self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the op, then count what it made."""
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.take(tensor)
        return result


def traced_peak(model: nn.Module, method: Method, arguments: Arguments) -> int:
    """The most bytes alive while a method rewrites a model in place.

    On the meta device nothing is allocated, and the check for non-finite values does not run: a byte for each element
    of the largest parameter, its mask, is added there.
    """
    masks = max((parameter.numel() for parameter in model.parameters() if parameter.is_meta), default=0)
    count = StorageCount()
    for tensor in (*model.parameters(), *model.buffers()):
        count.take(tensor)
    with count:
        method.sketch(model, arguments)
    return count.peak + masks


def loading_peak(config: PretrainedConfig, method: Method, arguments: Arguments) -> Peak:
    """The peak of loading a model under a method, from its configuration."""
    model = checkpoints.sketch_model(config, arguments.dtype)
    whole = storage_bytes(model)
    largest = max((parameter.numel() for parameter in model.parameters()), default=0) * FP32_BYTES
    if method.requires:
        targets = method.targets(model, arguments)
        weights = [model.get_submodule(name).weight for name in targets]
        copy = max((weight.numel() for weight in weights if isinstance(weight, torch.Tensor)), default=0) * FP32_BYTES
        method.sketch(model, arguments)
        end = storage_bytes(model)
        how = "the quantized model, and its largest tensor in fp32 while it is quantized"
        return Peak(end + max(copy, largest), how)
    peak = traced_peak(model, method, arguments)
    how = "its largest tensor as it is read" if peak <= whole + largest else "copies of the weight being quantized"
    return Peak(max(peak, whole + largest), f"the unquantized model in {arguments.dtype}, and {how}")
