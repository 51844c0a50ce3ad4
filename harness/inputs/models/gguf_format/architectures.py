"""The model architectures that are read from GGUF and written to it: tensors, facts and layouts in both's words.

One table serves both directions: from transformers' names to GGUF's, and backwards. Names and keys are those that
llama.cpp loads (its architectures llama, gpt2, olmo and phi3); what an architecture's graph in llama.cpp does not
compute is refused by name rather than left out.

`convert` makes a GGUF file a plain model folder (fp32 safetensors, config.json, tokenizer.json): one of these
architectures directly, in seconds; whatever else a file holds, its weights or its tokenizer go through transformers,
which takes about a minute (and reads no OLMo).
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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from harness.core.errors import BadFile, HarnessError
from harness.inputs.models import folder
from harness.inputs.models.gguf_format import tokenizers
from harness.inputs.models.gguf_format.file import GgufFile

VERSION = 2  # of the conversion: part of the cache's key
GRIDS = {"Q4_0": "affine4:32", "Q4_1": "affine4:32"}  # values d (q - 8) and d q + m: both affine 4-bit grids
STORED = {"Q4_0": "Q4_0, symmetric 4-bit in blocks of 32,", "Q4_1": "Q4_1, affine 4-bit in blocks of 32,"}
# attribute of the configuration -> a tensor that is there where it is true (OLMo and Llama may have biases)
BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
PLAIN = ("F32", "F16", "BF16")  # not quantized
ROTARY_BASE = "rope_theta"  # lies in transformers' rope_parameters, not on the configuration itself
COUNTS = {  # key below the architecture's name -> attribute of transformers' configuration
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "rope.dimension_count": "head_dim",
    "rope.freq_base": ROTARY_BASE,
}
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
    layers: str  # prefix of a layer in transformers
    facts: Mapping[str, str]  # key below `architecture` -> attribute of the configuration
    optional: Mapping[str, str] = field(default_factory=dict)  # the same, where the attribute is not None
    fixed: Mapping[str, Any] = field(default_factory=dict)  # attributes that llama.cpp's graph takes for granted
    constants: Mapping[str, float] = field(default_factory=dict)  # keys that llama.cpp asks for, fixed in transformers
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


LLAMA = Architecture(
    "llama",
    OUTER,
    {**NORMS, **SPLIT_ATTENTION, **GATED_MLP},
    "model.layers",
    {**COUNTS, "attention.layer_norm_rms_epsilon": "rms_norm_eps"},
    fixed={"hidden_act": "silu"},
    interleaved=QUERIES,
)
OLMO = Architecture(
    "olmo",
    {name: module for name, module in OUTER.items() if name != "output_norm"},  # its norms have no weights
    {**SPLIT_ATTENTION, **GATED_MLP},
    "model.layers",
    COUNTS,
    optional={"attention.clamp_kqv": "clip_qkv"},
    fixed={"hidden_act": "silu"},
    constants={"attention.layer_norm_epsilon": 1e-5},
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
    "model.layers",
    {
        **COUNTS,
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "rope.scaling.original_context_length": "original_max_position_embeddings",
    },
    optional={"attention.sliding_window": "sliding_window"},
    fixed={"hidden_act": "silu"},
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
    {
        "vocab_size": "vocab_size",
        "context_length": "n_positions",
        "embedding_length": "n_embd",
        "feed_forward_length": "n_inner",
        "block_count": "n_layer",
        "attention.head_count": "n_head",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    },
    fixed={
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    conv1d=True,
)
ARCHITECTURES = {one.name: one for one in (LLAMA, GPT2, OLMO, PHI3)}


def of_config(config: Any) -> Architecture:
    """The architecture of a transformers configuration.

    Raises HarnessError, in one line, for another architecture and for what GGUF's graph of it does not compute.
    """
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        raise HarnessError(f"no GGUF is written for '{config.model_type}' models: {known} are known")
    for name, value in architecture.fixed.items():
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
    if attribute == ROTARY_BASE:
        return config.rope_parameters[ROTARY_BASE]
    value = getattr(config, attribute, None)
    if value is None and attribute == "head_dim":
        return config.hidden_size // config.num_attention_heads
    if value is None and attribute == "n_inner":
        return 4 * config.n_embd
    return value


def metadata(architecture: Architecture, config: Any) -> dict[str, int | float]:
    """Every hyperparameter of the file by its full key."""
    written = {key: fact(config, name) for key, name in {**architecture.facts, **architecture.optional}.items()}
    written |= architecture.constants
    head = fact(config, "head_dim") if architecture is not GPT2 else 0
    if head and head * config.num_attention_heads != config.hidden_size:
        written |= {"attention.key_length": head, "attention.value_length": head}
    return {f"{architecture.name}.{key}": value for key, value in written.items() if value is not None}


def architecture_of(file: GgufFile) -> Architecture | None:
    """The architecture whose tensors and facts cover the whole file, with nothing left out; None where none does."""
    architecture = ARCHITECTURES.get(str(file.metadata.get("general.architecture")))
    if architecture is None or "mistral" in str(file.metadata.get("general.name", "")).lower():
        return None  # a Mistral's attention window is not stated in its file
    prefix = f"{architecture.name}."
    stated = {key.removeprefix(prefix) for key in file.metadata if key.startswith(prefix)}
    known = {*architecture.facts, *architecture.optional, *architecture.constants}
    if "rope.dimension_count" in architecture.facts:
        known |= {"attention.key_length", "attention.value_length"}  # derived from it
    whole = stated <= known and stated >= architecture.facts.keys() and all(map(architecture.tensor, file.tensors))
    return architecture if whole else None


def configuration(architecture: Architecture, file: GgufFile) -> Any:
    """The file's facts as transformers' configuration; a head that is not stored is tied."""
    named = {**architecture.facts, **architecture.optional}
    stated = {name: file.metadata.get(f"{architecture.name}.{key}") for key, name in named.items()}
    if ROTARY_BASE in stated:
        stated["rope_parameters"] = {"rope_type": "default", ROTARY_BASE: stated.pop(ROTARY_BASE)}
    if architecture.name in ("olmo", "phi3"):
        del stated["head_dim"]  # derived by their classes
    specials = {name: key for name, key in tokenizers.TOKENS.items() if name != "unk"}
    config = AutoConfig.for_model(
        architecture.name,
        **stated,
        **{f"{name}_token_id": file.metadata.get(key) for name, key in specials.items()},
        tie_word_embeddings="output.weight" not in file.tensors,
        dtype="float32",
        **{name: True for name, tensor in BIASES.items() if architecture.interleaved and tensor in file.tensors},
    )
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[architecture.name]]
    return config


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
    most of them lie on ('' for none). BadFile where neither this module nor transformers can read the file.
    """
    file = GgufFile(path)
    if (architecture := architecture_of(file)) is not None:
        config, state = configuration(architecture, file), {}
        config.save_pretrained(destination)
        for name, tensor in file.tensors.items():
            weight = in_layout(tensor.dequantize(), name, architecture, config)
            state[architecture.tensor(name)] = torch.from_numpy(np.array(weight, order="C"))  # a copy to write into
        save_file(state, destination / "model.safetensors", metadata={"format": "pt"})
    else:
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
    if tokenizers.is_known(file.metadata):
        tokenizers.write(file.metadata, destination)
    else:
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(destination)
    elements: Counter[str] = Counter()
    for name, tensor in file.tensors.items():
        if name.startswith("blk."):
            elements[tensor.kind] += int(np.prod(tensor.shape))
    kind = elements.most_common(1)[0][0] if elements else "F32"
    stored = f"weights were stored as {STORED.get(kind, f'{kind},')} before they became this fp32 reference"
    return {"note": "" if kind in PLAIN else stored, "grid": GRIDS.get(kind, "")}
