"""GGUF files into plain model folders: fp32 safetensors, config.json, tokenizer.json.

The architectures of `architectures` are converted here directly, in seconds; whatever else a file holds, its weights
or its tokenizer go through transformers, which takes about a minute (and reads no OLMo).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from harness.core.errors import BadFile
from harness.inputs.models import folder
from harness.inputs.models.gguf_format import architectures, tokenizers
from harness.inputs.models.gguf_format.architectures import ARCHITECTURES, Architecture
from harness.inputs.models.gguf_format.file import GgufFile

VERSION = 2  # of the conversion: part of the cache's key
GRIDS = {"Q4_0": "affine4:32", "Q4_1": "affine4:32"}  # values d (q - 8) and d q + m: both affine 4-bit grids
STORED = {
    "Q4_0": "Q4_0, symmetric 4-bit in blocks of 32,",
    "Q4_1": "Q4_1, affine 4-bit in blocks of 32,",
}
# attribute of the configuration -> a tensor that is there where it is true (OLMo and Llama may have biases)
BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
PLAIN = ("F32", "F16", "BF16")  # not quantized


def convert(path: Path, destination: Path) -> dict[str, str]:
    """Write a GGUF file's model into the folder `destination`.

    Returns {'note', 'grid'}: what a reader must know of how the weights were stored, and the quantization grid that
    most of them lie on ('' for none). BadFile where neither this module nor transformers can read the file.
    """
    file = GgufFile(path)
    if (architecture := architecture_of(file)) is not None:
        write_weights(file, architecture, destination)
    else:
        _through_transformers(path, destination)
    if tokenizers.is_known(file.metadata):
        tokenizers.write(file.metadata, destination)
    else:
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(destination)
    return _facts(file)


def _facts(file: GgufFile) -> dict[str, str]:
    elements: Counter[str] = Counter()
    for name, tensor in file.tensors.items():
        if name.startswith("blk."):
            elements[tensor.kind] += int(np.prod(tensor.shape))
    kind = elements.most_common(1)[0][0] if elements else "F32"
    if kind in PLAIN:
        return {"note": "", "grid": ""}
    stored = STORED.get(kind, f"{kind},")
    return {
        "note": f"weights were stored as {stored} before they became this fp32 reference",
        "grid": GRIDS.get(kind, ""),
    }


def architecture_of(file: GgufFile) -> Architecture | None:
    """The architecture whose tensors and facts cover the whole file, with nothing left out; None where none does."""
    architecture = ARCHITECTURES.get(str(file.metadata.get("general.architecture")))
    if architecture is None or "mistral" in str(file.metadata.get("general.name", "")).lower():
        return None  # a Mistral's attention window is not stated in its file
    named = all(_name(architecture, name) for name in file.tensors)
    return architecture if named and not architectures.unknown(architecture, file.metadata) else None


def _name(architecture: Architecture, gguf_name: str) -> str:
    """The name of a tensor in transformers' model, '' if it has none."""
    module, _, suffix = gguf_name.rpartition(".")
    theirs = architecture.module(module)
    return f"{theirs}.{suffix}" if theirs and suffix in ("weight", "bias") else ""


def write_weights(file: GgufFile, architecture: Architecture, destination: Path) -> None:
    """Write config.json and model.safetensors of a file of a known architecture; a head that is not stored is tied."""
    config = _configuration(file, architecture)
    config.save_pretrained(destination)
    state = {}
    for name, tensor in file.tensors.items():
        weight = np.array(in_layout(tensor.dequantize(), name, architecture, config), order="C")  # ours to write into
        state[_name(architecture, name)] = torch.from_numpy(weight)
    save_file(state, destination / "model.safetensors", metadata={"format": "pt"})


def _configuration(file: GgufFile, architecture: Architecture) -> Any:
    known = tokenizers.TOKENS.items()
    specials = {f"{name}_token_id": file.metadata.get(key) for name, key in known if name != "unk"}
    config = AutoConfig.for_model(
        architecture.model_type,
        **architectures.configuration(architecture, file.metadata),
        **specials,
        tie_word_embeddings="output.weight" not in file.tensors,
        dtype="float32",
        **{name: True for name, tensor in BIASES.items() if architecture.interleaved and tensor in file.tensors},
    )
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[architecture.model_type]]
    return config


def in_layout(weight: NDArray[Any], gguf_name: str, architecture: Architecture, config: Any) -> NDArray[Any]:
    """A tensor of the file in transformers' row order and orientation."""
    if heads := architecture.heads(gguf_name, config):
        weight = halves_apart(weight, heads)
    return weight.T if architecture.is_conv1d(gguf_name) else weight


def halves_apart(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """Reorder a query or key projection's rows from GGUF's rotary layout to transformers'.

    GGUF interleaves the two halves that a rotation mixes (x0 y0 x1 y1 ...); transformers keeps them apart
    (x0 x1 ... y0 y1 ...). weight: (heads * head_dim, ...): values, a bias, or rows as bytes.
    """
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1)  # (head, pair, half, rest)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _through_transformers(path: Path, destination: Path) -> None:
    """Any architecture that transformers reads."""
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        detail = str(error).splitlines()[0]
        raise BadFile(f"{path} holds a model that transformers does not read from GGUF ({detail})") from error
    folder.require_match(report, f"the weights in {path}, as transformers reads them,")
    folder.save_plain(loaded, loaded.state_dict(), destination)
