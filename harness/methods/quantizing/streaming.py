"""Quantizing from safetensors tensor by tensor: no unquantized model is ever whole in memory.

The model is built without weights; what stays unquantized is read into its place, then each weight to be quantized is
mapped, turned into codes part by part and unmapped before the next. The peak is the quantized model and one tensor as
it lies in the file. Folders whose names are not the architecture's own, one for one (older layouts, merged experts),
are left to `checkpoints.open_model`, which knows how to convert.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from harness.core import progress
from harness.core.contracts import Checkpoint
from harness.core.errors import BadFile
from harness.inputs.models import checkpoints, folder
from harness.methods.quantizing import stored
from harness.methods.quantizing.codes import Recipe

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "I8": torch.int8,
    "BOOL": torch.bool,
}  # as safetensors writes them
AHEAD = 2**28  # bytes that are on their way while a tensor is worked on


@dataclass(frozen=True)
class Place:
    """Where one tensor's bytes lie."""

    file: Path
    offset: int  # from the file's beginning, bytes
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def expect(self) -> None:
        """Have the system begin to read it, where it takes such advice."""
        if hasattr(os, "posix_fadvise"):
            with self.file.open("rb") as file:
                os.posix_fadvise(file.fileno(), self.offset, self.nbytes, os.POSIX_FADV_WILLNEED)

    def tensor(self, mapped: bool) -> Tensor:
        """The tensor: in memory of its own, or in pages of the file that go when it goes, where it is aligned."""
        short = BadFile(f"{self.file} ends before its last tensor: fetch it again")
        if mapped and self.offset % self.dtype.itemsize == 0:
            try:
                pages = np.memmap(self.file, np.uint8, "c", self.offset, (self.nbytes,))
            except ValueError as error:  # reading past a mapping's end would be a bus error
                raise short from error
            return torch.from_numpy(pages).view(self.dtype).view(self.shape)
        result = torch.empty(self.shape, dtype=self.dtype)  # aligned as torch does: products may depend on it
        with self.file.open("rb") as file:
            file.seek(self.offset)
            if file.readinto(result.reshape(-1).view(torch.uint8).numpy().data) < self.nbytes:
                raise short
        return result


def in_turn(wanted: Sequence[Place]) -> Iterator[Place]:
    """Each as it is wanted; the system reads those to come, AHEAD bytes of them, while one is worked on."""
    asked = ahead = 0
    for at, place in enumerate(wanted):
        while asked < len(wanted) and (asked == at or ahead < AHEAD):
            wanted[asked].expect()
            ahead += wanted[asked].nbytes
            asked += 1
        yield place
        ahead -= place.nbytes


def places(files: Iterable[Path]) -> dict[str, Place] | None:
    """Every tensor of some safetensors files by name; None where one's dtype is not known or it has no elements."""
    result: dict[str, Place] = {}
    for path in files:
        data, header = folder.header(path, str(path.parent))
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES or not math.prod(entry["shape"]):
                return None
            start = data + entry["data_offsets"][0]
            result[name] = Place(path, start, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return result


def quantized_model(
    checkpoint: Checkpoint, dtype: str, recipe: Recipe, targets: Callable[[nn.Module], list[str]]
) -> nn.Module | None:
    """The quantized model on the CPU; None where the folder is not streamable.

    Args:
        checkpoint: the plain folder.
        dtype: 'fp32', 'bf16' or 'fp16', of everything that is not quantized.
        recipe: the method.
        targets: names of the weights to quantize, asked of the model without weights.
    """
    files = folder.weights_files(
        checkpoint.directory, f"model '{checkpoint.specification}'", allow_pickle=checkpoint.allow_pickle
    )
    shards = [path for path in files if path.suffix == ".safetensors"]
    there = places(shards) if shards else None
    if there is None:
        return None
    model = checkpoints.sketch_model(checkpoints.read_config(checkpoint), dtype, real_buffers=True)
    state = model.state_dict(keep_vars=True)
    held = {id(state[name]) for name in there if name in state}
    if (
        getattr(model, "_keep_in_fp32_modules", None)
        or getattr(model, "_keep_in_fp32_modules_strict", None)
        or not there.keys() <= state.keys()
        or not all(name in there or id(tensor) in held for name, tensor in state.items())  # tied ones at least once
        or any(state[name].shape != place.shape for name, place in there.items())
    ):
        return None
    alike: dict[int, list[str]] = {}  # tied tensors have several names
    for name, tensor in state.items():
        alike.setdefault(id(tensor), []).append(name)
    names = targets(model)
    shared = {name: alike[id(state[stored.parameter_name(model, name)])] for name in names}
    later = {other for group in shared.values() for other in group}
    kept = checkpoints.TORCH_DTYPES[dtype]
    whole = [name for name in there if name not in later]
    sources = {name: next(other for other in shared[name] if other in there) for name in names}
    queue = in_turn([there[name] for name in (*whole, *sources.values())])
    for name in progress.each("a tensor to read", whole):
        _put(model, alike[id(state[name])], next(queue).tensor(mapped=False), kept)

    def read(name: str) -> None:
        place = next(queue)
        assert place is there[sources[name]], "weights are quantized in another order than they are read in"
        _put(model, [stored.parameter_name(model, name)], place.tensor(mapped=True))

    stored.apply(model, recipe, names, read=read, dtype=kept)
    return model


def _put(model: nn.Module, names: Iterable[str], tensor: Tensor, dtype: torch.dtype | None = None) -> None:
    """Put a tensor, floating point ones in a dtype, into every place that shares it."""
    if tensor.is_floating_point():
        tensor = tensor.to(dtype or tensor.dtype)
    parameter = nn.Parameter(tensor) if tensor.is_floating_point() else None
    for name in names:
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            module._parameters[leaf] = parameter
