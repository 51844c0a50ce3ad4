"""Whether a model loads into so much memory: the bytes it ends with, and the most that loading takes on the way.

How the harness loads, and what the peak is made of:

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
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from harness import checkpoints, memory
from harness.contracts import Arguments, Method
from harness.errors import BadSpecification

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FP32_BYTES = 4
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def parse_size(text: str) -> int:
    """Bytes of '24GiB', '512 MB', '1.5GB'; a unit is required, since GB and GiB differ by 7%."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip(), re.ASCII)
    if not found or found[2] not in UNITS:
        raise BadSpecification(f"'{text}' is no size: write a number and one of {', '.join(UNITS)}, as in 24GiB")
    size = int(Decimal(found[1]) * UNITS[found[2]])
    if size <= 0:
        raise BadSpecification(f"'{text}' is no size above zero")
    return size


@dataclass(frozen=True)
class Peak:
    """The most bytes that loading holds at one time, and of what kind that moment is."""

    bytes: int
    how: str


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage alive from the ops under it; `peak` is the most there were."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self.alive: set[int] = set()
        for tensor in (*model.parameters(), *model.buffers()):
            self.see(tensor)

    def see(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        self.alive.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the op, then count what it made."""
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
        return result


def traced_peak(model: nn.Module, method: Method, arguments: Arguments) -> int:
    """The most bytes alive while a method rewrites a model in place.

    On the meta device nothing is allocated, and the check for non-finite values does not run: a byte for each element
    of the largest parameter, its mask, is added there.
    """
    masks = max((parameter.numel() for parameter in model.parameters() if parameter.is_meta), default=0)
    live = Live(model)
    with live:
        method.sketch(model, arguments)
    return live.peak + masks


def loading_peak(config: PretrainedConfig, method: Method, arguments: Arguments) -> Peak:
    """The peak of loading a model under a method, from its configuration."""
    model = checkpoints.sketch_model(config, arguments.dtype)
    whole = memory.storage_bytes(model)
    largest = max((parameter.numel() for parameter in model.parameters()), default=0) * FP32_BYTES
    if method.requires:
        targets = method.targets(model, arguments)
        weights = [model.get_submodule(name).weight for name in targets]
        copy = max((weight.numel() for weight in weights if isinstance(weight, torch.Tensor)), default=0) * FP32_BYTES
        method.sketch(model, arguments)
        end = memory.storage_bytes(model)
        return Peak(
            end + max(copy, largest), "the quantized model, and its largest tensor in fp32 while it is quantized"
        )
    peak = traced_peak(model, method, arguments)
    if peak <= whole + largest:
        return Peak(
            whole + largest, f"the unquantized model in {arguments.dtype}, and its largest tensor as it is read"
        )
    return Peak(peak, f"the unquantized model in {arguments.dtype}, and copies of the weight being quantized")
