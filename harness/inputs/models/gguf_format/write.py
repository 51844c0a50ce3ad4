"""Writes a model as a real, complete GGUF file: hyperparameters, tokenizer and weights, through the gguf package.

The layers' matrices are of the format asked for; embedding and head are Q8_0 where that has fewer bits (as in the
embedded model's file, and much as llama-quantize spares them); vectors and learned positions stay fp32, as llama.cpp's
own converter leaves them. Rotary rows are interleaved the way llama.cpp expects.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from harness.core.contracts import Checkpoint
from harness.core.errors import HarnessError
from harness.inputs.models import checkpoints
from harness.inputs.models.gguf_format import architectures, file, tokenizers
from harness.inputs.models.gguf_format.architectures import Architecture

POSITIONS = "position_embd"
VOCABULARY = ("token_embd", "output.")  # embedding and head: tensors with a row a token


def kind_of(gguf_name: str, dimensions: int, kind: str) -> str:
    """The format of one tensor in a file of format `kind`; '' where it is fp32 whatever the file's."""
    if dimensions != 2 or gguf_name.startswith(POSITIONS):
        return ""
    return "Q8_0" if gguf_name.startswith(VOCABULARY) and file.FORMATS[kind].bits < 8 else kind


def halves_together(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """Reorder rows from transformers' rotary layout (x0 x1 ... y0 y1 ...) to GGUF's (x0 y0 x1 y1 ...).

    weight: (heads * head_dim, ...): a projection, its bias, or its rows as bytes.
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)  # (head, half, pair, rest)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def tensors(model: Any, architecture: Architecture) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Each parameter once, under GGUF's name, fp32, in GGUF's layout; HarnessError for one without a name there."""
    for name, parameter in model.named_parameters():
        module, _, suffix = name.rpartition(".")
        gguf_module = architecture.gguf_module(module)
        if not gguf_module or suffix not in ("weight", "bias"):
            model_type = architecture.model_type
            raise HarnessError(f"no GGUF is written for this {model_type} model: its {name} has no place there")
        written = f"{gguf_module}.{suffix}"
        values = parameter.detach().float().cpu().numpy()
        if architecture.is_conv1d(written):
            values = np.ascontiguousarray(values.T)  # (out, in)
        if heads := architecture.heads(written, model.config):
            values = halves_together(values, heads)
        yield written, values


def write(checkpoint: Checkpoint, kind: str, destination: Path) -> int:
    """Write a checkpoint as GGUF.

    Args:
        checkpoint: a plain folder of one of `architectures.ARCHITECTURES`.
        kind: a key of `file.FORMATS`.
        destination: the file, replaced where it exists.

    Returns:
        The file's size in bytes.

    Raises:
        HarnessError: an architecture, tokenizer or width that GGUF or llama.cpp does not take; non-finite weights.
    """
    model: Any = checkpoints.open_model(checkpoint, "fp32", "cpu")
    architecture = architectures.of_config(model.config)
    rows = model.get_input_embeddings().weight.shape[0]
    facts = {
        "general.name": Path(checkpoint.specification.partition(":")[2] or checkpoint.specification).name,
        "general.file_type": int(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **architectures.metadata(architecture, model.config),
        **tokenizers.metadata(checkpoints.tokenizer(checkpoint), rows),
    }
    writer = gguf.GGUFWriter(destination, architecture.name)
    try:
        for key, value in facts.items():
            _add(writer, key, value)
        for name, values in tensors(model, architecture):
            own = kind_of(name, values.ndim, kind)
            _hold(name, values, own)
            stored = gguf.GGMLQuantizationType[own or "F32"]
            writer.add_tensor(name, gguf.quantize(values, stored) if own else values, raw_dtype=stored)
        del model
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return destination.stat().st_size


def _hold(name: str, values: NDArray[np.float32], kind: str) -> None:
    """Refuse what would be stored wrongly: other numbers than finite ones, rows that no block divides."""
    if not np.isfinite(values).all():
        raise HarnessError(f"gguf cannot store {name}: {int((~np.isfinite(values)).sum())} non-finite values in it")
    if kind:
        try:
            file.row_bytes(kind, values.shape[-1])
        except ValueError as error:
            raise HarnessError(f"gguf cannot store {name}: {error}") from error


def _add(writer: Any, key: str, value: Any) -> None:
    """One metadata entry in the type that llama.cpp asks of it."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
