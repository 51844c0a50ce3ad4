"""Writes a model as a real, complete GGUF file: hyperparameters, tokenizer and weights, through the gguf package.

The layers' matrices are of the format asked for; embedding and head are Q8_0 where that has fewer bits (as in the
embedded model's file, and much as llama-quantize spares them); vectors and learned positions stay fp32, as llama.cpp's
own converter leaves them. Rotary rows are interleaved the way llama.cpp expects.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

from harness.core.contracts import Checkpoint
from harness.core.errors import HarnessError
from harness.inputs.models import checkpoints
from harness.inputs.models.gguf_format import architectures, file, tokenizers

ROW = 32  # weights: formats are compared by the bytes of so many, which every block divides
POSITIONS = "position_embd"
VOCABULARY = ("token_embd", "output.")  # embedding and head: tensors with a row a token


def kind_of(gguf_name: str, dimensions: int, kind: str) -> str:
    """The format of one tensor in a file of format `kind`; '' where it is fp32 whatever the file's."""
    if dimensions != 2 or gguf_name.startswith(POSITIONS):
        return ""
    smaller = file.row_bytes(kind, ROW) < file.row_bytes("Q8_0", ROW)
    return "Q8_0" if gguf_name.startswith(VOCABULARY) and smaller else kind


def write(checkpoint: Checkpoint, kind: str, destination: Path) -> int:
    """Write a checkpoint as a GGUF file of format `kind` (a key of `file.FORMATS`); returns its size in bytes.

    Raises HarnessError for an architecture, tokenizer or width that GGUF or llama.cpp does not take, and for weights
    that are not finite.
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
        for key, value in facts.items():  # llama.cpp asks for unsigned numbers; the writer takes no empty list
            form = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
            if value != []:
                writer.add_key_value(key, value, form)
        for theirs, parameter in model.named_parameters():  # a tied one once
            module, _, suffix = theirs.rpartition(".")
            gguf_module = architecture.gguf_module(module)
            if not gguf_module or suffix not in ("weight", "bias"):
                raise HarnessError(
                    f"no GGUF is written for this {architecture.name} model: its {theirs} has no place there"
                )
            name = f"{gguf_module}.{suffix}"
            values = parameter.detach().float().cpu().numpy()
            if architecture.is_conv1d(name):
                values = np.ascontiguousarray(values.T)  # (out, in)
            if heads := architecture.heads(name, model.config):
                values = architectures.halves_together(values, heads)
            if lost := int((~np.isfinite(values)).sum()):
                raise HarnessError(f"gguf cannot store {name}: {lost} non-finite values in it")
            own = kind_of(name, values.ndim, kind) or "F32"
            try:
                file.row_bytes(own, values.shape[-1])
            except ValueError as error:
                raise HarnessError(f"gguf cannot store {name}: {error}") from error
            stored = gguf.GGMLQuantizationType[own]
            writer.add_tensor(name, gguf.quantize(values, stored), raw_dtype=stored)
        del model
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return destination.stat().st_size
