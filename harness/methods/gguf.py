"""The methods `gguf-*`: a model written as a real GGUF file, read back, and run from its blocks.

Loading writes the whole file (hyperparameters, tokenizer, weights) into the cache's scratch folder, reads it with
`file`, and puts its blocks as they are into the model; each forward unpacks them, so what is measured is
what the file holds. Which tensor is of which format says `write`; vectors are fp32 in the file and in the
model's dtype here. The file itself is deleted, its size is kept.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from harness.core.contracts import Arguments, Checkpoint, Method
from harness.core.files import cache_folder
from harness.methods.quantizing.codes import Functions, Recipe
from harness.methods.quantizing.weight_method import stored_weights

if TYPE_CHECKING:  # annotations only: methods are listed without torch
    from torch import Tensor, nn


def gguf_method(kind: str, summary: str, bits: float, grid: str = "") -> Method:
    """The method of a block format; `grid` as `Method.grid`. No scope: a file is quantized whole."""
    return Method(
        name=f"gguf-{kind.lower()}",
        summary=summary,
        bits=bits,
        load=functools.partial(load, kind),
        sketch=functools.partial(sketch, kind),
        quantized=stored_weights,
        targets=targets,
        requires=("gguf",),
        grid=grid,
        core=False,
        concurrent=True,
        file_bytes=lambda model: int(cast("Any", model).gguf_file_bytes),
    )


def load(kind: str, checkpoint: Checkpoint, arguments: Arguments, device: str) -> nn.Module:
    """The checkpoint through a file of this format, its matrices kept packed; eval mode, on `device`."""
    import numpy as np
    import torch

    from harness.inputs.models import checkpoints
    from harness.inputs.models.gguf_format import architectures, write
    from harness.inputs.models.gguf_format.file import GgufFile
    from harness.methods.quantizing import stored

    with tempfile.TemporaryDirectory(dir=cache_folder("scratch")) as folder, torch.no_grad():
        path = Path(folder) / "model.gguf"
        size = write.write(checkpoint, kind, path)
        model: Any = checkpoints.open_model(checkpoint, arguments.dtype, "cpu")
        architecture = architectures.of_config(model.config)
        sketch(kind, model, arguments)
        for name, tensor in GgufFile(path).tensors.items():
            module_name, _, suffix = name.rpartition(".")
            module = model.get_submodule(architecture.module(module_name))
            store = stored.store_of(module) if suffix == "weight" else None
            if store is None:
                values = architectures.in_layout(tensor.dequantize(), name, architecture, model.config)
                getattr(module, suffix).copy_(torch.from_numpy(np.array(values, order="C")))
            else:
                rows = tensor.data.reshape(tensor.shape[0], -1)  # (out, bytes a row)
                if heads := architecture.heads(name, model.config):
                    rows = architectures.halves_apart(rows, heads)
                store.get_buffer("blocks").copy_(torch.from_numpy(np.array(rows, order="C")))
    model.gguf_file_bytes = size
    return model.to(device)  # type: ignore[no-any-return]


def sketch(kind: str, model: nn.Module, arguments: Arguments) -> None:
    """Room for the blocks in place of every matrix, to be filled from the file, where the model lies (meta too)."""
    import torch

    from harness.inputs.models.gguf_format import file
    from harness.methods.quantizing import stored

    def room(weight: Tensor, kind: str) -> dict[str, Tensor]:
        size = file.row_bytes(kind, weight.shape[1])
        return {"blocks": torch.empty(weight.shape[0], size, dtype=torch.uint8, device=weight.device)}

    def read(kept: Mapping[str, Tensor], shape: tuple[int, int], kind: str) -> Tensor:
        return file.dequantize(kept["blocks"], kind)

    for own, names in formats(model, kind).items():
        stored.apply(model, Recipe(f"gguf-{own.lower()}", Functions(room, read), {"kind": own}), names)


def formats(model: Any, kind: str) -> dict[str, list[str]]:
    """Format -> the modules whose matrix it takes, each matrix once under its first name."""
    from harness.inputs.models.gguf_format import architectures, write
    from harness.methods.quantizing import stored

    architecture = architectures.of_config(model.config)
    found: dict[str, list[str]] = {}
    for first in stored.weight_owners(model):
        module = model.get_submodule(first)
        store = stored.store_of(module)
        dimensions = len(store.layout) if store else module.weight.dim()
        if own := write.kind_of(f"{architecture.gguf_module(first)}.weight", dimensions, kind):
            found.setdefault(own, []).append(first)
    return found


def targets(model: Any, arguments: Arguments) -> list[str]:
    """Every matrix once, under its first name, learned positions left out."""
    return [name for names in formats(model, "F32").values() for name in names]


METHODS = (
    gguf_method("F32", "GGUF F32: fp32 numbers: what the other formats are compared with", bits=32),
    gguf_method("F16", "GGUF F16: fp16 numbers", bits=16),
    gguf_method("Q8_0", "GGUF Q8_0: int8 codes in blocks of 32, fp16 step", bits=8),
    gguf_method("Q5_1", "GGUF Q5_1: affine 5-bit codes in blocks of 32, fp16 step and minimum", bits=5),
    gguf_method("Q5_0", "GGUF Q5_0: 5-bit codes in blocks of 32, fp16 step", bits=5),
    # weights that lie on such a grid already come back as they were
    gguf_method(
        "Q4_1", "GGUF Q4_1: affine 4-bit codes in blocks of 32, fp16 step and minimum", bits=4, grid="affine4:32"
    ),
    gguf_method("Q4_0", "GGUF Q4_0: 4-bit codes in blocks of 32, fp16 step", bits=4),
)
