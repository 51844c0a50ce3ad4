"""The model architectures that are read from GGUF and written to it: tensors, facts and layouts in both's words.

One table serves both directions: from transformers' names to GGUF's, and backwards. Names are those that llama.cpp
loads (its architectures llama, granite, gpt2, olmo and phi3); keys are `hyperparameters`' affair. What an
architecture's graph in llama.cpp does not compute is refused by name rather than left out.

`convert` makes a GGUF file a plain model folder (fp32 safetensors, config.json, tokenizer.json): one of these
architectures directly, in seconds; the weights of others, and tokenizers of other kinds, go through transformers, which
takes about a minute. Either way every tensor and every key of the file is computed with, or the file is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from harness.core.errors import BadFile, HarnessError
from harness.inputs.models import folder
from harness.inputs.models.gguf_format import hyperparameters, tokenizers
from harness.inputs.models.gguf_format.file import GgufFile

VERSION = 3  # of the conversion: part of the cache's key
GRIDS = {"Q4_0": "affine4:32", "Q4_1": "affine4:32"}  # values d (q - 8) and d q + m: both affine 4-bit grids
STORED = {"Q4_0": "Q4_0, symmetric 4-bit in blocks of 32,", "Q4_1": "Q4_1, affine 4-bit in blocks of 32,"}
PLAIN = ("F32", "F16", "BF16")  # not quantized
GATED_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
SPLIT_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
QUERIES = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


@dataclass(frozen=True)
class Architecture:
    """One architecture in GGUF's and in transformers' words."""

    name: str  # of GGUF and of transformers' model type
    outer: Mapping[str, str]  # GGUF module -> transformers module, outside the layers
    inner: Mapping[str, str]  # the same inside a layer
    layers: str = "model.layers"  # prefix of a layer in transformers
    interleaved: Mapping[str, str] = field(default_factory=dict)  # module with rotary rows -> its heads' attribute
    conv1d: bool = False  # transformers keeps the layers' matrices (in, out)

    def module(self, name: str) -> str:
        """Transformers' name of a GGUF module ('blk.3.attn_q' or 'token_embd'); '' where the architecture has none."""
        head, _, rest = name.partition(".")
        if head == "blk":
            number, _, inner = rest.partition(".")
            return f"{self.layers}.{number}.{self.inner[inner]}" if inner in self.inner else ""
        return self.outer.get(name, "")

    def tensor(self, gguf_name: str) -> str:
        """Transformers' name of a tensor ('token_embd.weight'); '' where the architecture has none."""
        module, _, suffix = gguf_name.rpartition(".")
        theirs = self.module(module)
        return f"{theirs}.{suffix}" if theirs and suffix in ("weight", "bias") else ""

    def gguf_module(self, name: str) -> str:
        """GGUF's name of a transformers module; '' where the architecture has none."""
        backwards = {theirs: ours for ours, theirs in self.outer.items()}
        if name in backwards:
            return backwards[name]
        number, _, inner = name.removeprefix(f"{self.layers}.").partition(".")
        module = {theirs: ours for ours, theirs in self.inner.items()}.get(inner)
        return f"blk.{number}.{module}" if module and number.isdigit() else ""

    def is_conv1d(self, gguf_name: str) -> bool:
        """Whether transformers holds a tensor of this GGUF name the other way round."""
        matrix = gguf_name.startswith("blk.") and gguf_name.endswith(".weight") and "norm" not in gguf_name
        return self.conv1d and matrix

    def heads(self, gguf_name: str, config: Any) -> int:
        """Heads whose rows GGUF interleaves in a tensor of this name; 0 where it keeps transformers' order."""
        attribute = self.interleaved.get(gguf_name.split(".")[-2])
        return int(getattr(config, attribute)) if attribute else 0


LLAMA = Architecture("llama", OUTER, {**NORMS, **SPLIT_ATTENTION, **GATED_MLP}, interleaved=QUERIES)
GRANITE = Architecture("granite", OUTER, LLAMA.inner, interleaved=QUERIES)
OLMO = Architecture(
    "olmo",
    {name: module for name, module in OUTER.items() if name != "output_norm"},  # its norms have no weights
    {**SPLIT_ATTENTION, **GATED_MLP},
    interleaved=QUERIES,
)
PHI3 = Architecture(
    "phi3",
    OUTER,
    {
        **NORMS,
        "attn_qkv": "self_attn.qkv_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_up": "mlp.gate_up_proj",
        "ffn_down": "mlp.down_proj",
    },
)
GPT2 = Architecture(
    "gpt2",
    {
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
    },
    {
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
    "transformer.h",
    conv1d=True,
)
ARCHITECTURES = {one.name: one for one in (LLAMA, GRANITE, GPT2, OLMO, PHI3)}


def of_config(config: Any) -> Architecture:
    """The architecture of a transformers configuration.

    Raises HarnessError, in one line, for another architecture and for what GGUF's graph of it does not compute.
    """
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        raise HarnessError(f"no GGUF is written for '{config.model_type}' models: {known} are known")
    for name, value in hyperparameters.KNOWN[architecture.name].fixed.items():
        if getattr(config, name) != value:
            raise HarnessError(
                f"no GGUF is written for this {config.model_type} model: its {name} is {getattr(config, name)!r}, and "
                f"llama.cpp computes {value!r}"
            )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise HarnessError(
            f"no GGUF is written for this {config.model_type} model: its positions are scaled or partial ({rope})"
        )
    return architecture


def fact(config: Any, attribute: str) -> Any:
    """One attribute of a configuration, those that transformers derives or nests included."""
    if attribute == hyperparameters.ROTARY_BASE:
        return config.rope_parameters[attribute]
    value = getattr(config, attribute, None)
    if value is None and attribute == "head_dim":
        return config.hidden_size // config.num_attention_heads
    if value is None and attribute == "n_inner":
        return 4 * config.n_embd
    return value


def metadata(architecture: Architecture, config: Any) -> dict[str, int | float]:
    """Every hyperparameter of the file by its full key."""
    keys = hyperparameters.KNOWN[architecture.name]
    written = {key: fact(config, name) for key, name in {**keys.facts, **keys.optional}.items()}
    written = {key: value for key, value in written.items() if value is not None}
    written = {key: float(value) if key in hyperparameters.REAL else value for key, value in written.items()}
    written |= keys.constants
    head = fact(config, "head_dim") if architecture is not GPT2 else 0
    if head and head * config.num_attention_heads != config.hidden_size:
        written |= {"attention.key_length": head, "attention.value_length": head}
    return {f"{architecture.name}.{key}": value for key, value in written.items()}


def architecture_of(file: GgufFile) -> Architecture | None:
    """The architecture of a file whose tensors are placed here; None where transformers places them."""
    return ARCHITECTURES.get(str(file.metadata.get("general.architecture")))


def halves_apart(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """Reorder a query or key projection's rows from GGUF's rotary layout to transformers'.

    GGUF interleaves the two halves that a rotation mixes (x0 y0 x1 y1 ...); transformers keeps them apart
    (x0 x1 ... y0 y1 ...). weight: (heads * head_dim, ...): values, a bias, or rows as bytes.
    """
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1)  # (head, pair, half, rest)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def halves_together(weight: NDArray[Any], heads: int) -> NDArray[Any]:
    """Undo `halves_apart`."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)  # (head, half, pair, rest)
    return halves.swapaxes(1, 2).reshape(weight.shape)


def in_layout(weight: NDArray[Any], gguf_name: str, architecture: Architecture, config: Any) -> NDArray[Any]:
    """A tensor of the file in transformers' row order and orientation."""
    if heads := architecture.heads(gguf_name, config):
        weight = halves_apart(weight, heads)
    return weight.T if architecture.is_conv1d(gguf_name) else weight


def convert(path: Path, destination: Path) -> dict[str, str]:
    """Write a GGUF file's model into the folder `destination`.

    Returns {'note', 'grid'}: what a reader must know of how the weights were stored, and the quantization grid that
    most of them lie on ('' for none). BadFile where the file states or holds what would be left out, and where neither
    this module nor transformers can read it.
    """
    file = GgufFile(path)
    hyperparameters.require_model(str(path), file.metadata)
    if (architecture := architecture_of(file)) is not None:
        _place(file, architecture, path, destination)
    else:
        _through_transformers(file, path, destination)
    tokenizers.convert(path, file.metadata, destination)
    elements: Counter[str] = Counter()
    for name, tensor in file.tensors.items():
        if name.startswith("blk."):
            elements[tensor.kind] += int(np.prod(tensor.shape))
    kind = elements.most_common(1)[0][0] if elements else "F32"
    stored = f"weights were stored as {STORED.get(kind, f'{kind},')} before they became this fp32 reference"
    return {"note": "" if kind in PLAIN else stored, "grid": GRIDS.get(kind, "")}


def _place(file: GgufFile, architecture: Architecture, path: Path, destination: Path) -> None:
    """The model of an architecture that is known here."""
    config = hyperparameters.configuration(str(path), file.metadata, file.tensors)
    weights = {name: tensor for name, tensor in file.tensors.items() if name not in hyperparameters.POSITIONS}
    if lost := [name for name in weights if not architecture.tensor(name)]:
        raise BadFile(f"{path} holds {lost[0]}, which has no place in transformers' {architecture.name}")
    config.save_pretrained(destination)
    state = {}
    for name, tensor in weights.items():
        weight = in_layout(tensor.dequantize(), name, architecture, config)
        state[architecture.tensor(name)] = torch.from_numpy(np.array(weight, order="C"))  # a copy to write into
    save_file(state, destination / "model.safetensors", metadata={"format": "pt"})


def _through_transformers(file: GgufFile, path: Path, destination: Path) -> None:
    """The model of an architecture whose tensors transformers places: with every key and every tensor, or refused."""
    given: dict[str, Any] = {}
    if file.metadata.get("general.architecture") in hyperparameters.KNOWN:
        given["config"] = hyperparameters.configuration(str(path), file.metadata, file.tensors)
    else:
        hyperparameters.require_translated(str(path), file.metadata, file.tensors)
    try:
        loaded, report = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
            **given,
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        detail = str(error).splitlines()[0]
        raise BadFile(f"{path} holds a model that transformers does not read from GGUF ({detail})") from error
    folder.require_match(report, f"the weights in {path}, as transformers reads them,")
    # its loader drops a tensor that it has no name for, without a word in the report
    held = sum(int(np.prod(one.shape)) for name, one in file.tensors.items() if name not in hyperparameters.POSITIONS)
    placed = {tensor.data_ptr(): tensor.numel() for tensor in loaded.state_dict().values()}
    if given and held > sum(placed.values()):
        raise BadFile(
            f"{path} holds {held - sum(placed.values()):,} numbers more than transformers' {type(loaded).__name__} "
            "has places for, which would be left out"
        )
    folder.save_plain(loaded, loaded.state_dict(), destination)
