"""What GGUF calls the tensors and facts of the model architectures that are written and read here. No torch.

One table serves both directions: `write` reads it from transformers' names to GGUF's,
`read` backwards. Names and keys are those that llama.cpp loads (its architectures llama, gpt2, olmo and
phi3); what an architecture's graph in llama.cpp does not compute is refused by name rather than left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.core.errors import HarnessError

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

    name: str  # of GGUF
    model_type: str  # of transformers
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
        return (
            self.conv1d and gguf_name.startswith("blk.") and gguf_name.endswith(".weight") and "norm" not in gguf_name
        )

    def heads(self, gguf_name: str, config: Any) -> int:
        """Heads whose rows GGUF interleaves in a tensor of this name; 0 where it keeps transformers' order."""
        attribute = self.interleaved.get(gguf_name.split(".")[-2])
        return int(getattr(config, attribute)) if attribute else 0


LLAMA = Architecture(
    "llama",
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
    architecture = next((one for one in ARCHITECTURES.values() if one.model_type == config.model_type), None)
    if architecture is None:
        known = ", ".join(one.model_type for one in ARCHITECTURES.values())
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


def unknown(architecture: Architecture, file_facts: Mapping[str, Any]) -> list[str]:
    """What of a file's hyperparameters this table does not cover: missing and foreign keys, [] where none."""
    prefix = f"{architecture.name}."
    stated = {key.removeprefix(prefix) for key in file_facts if key.startswith(prefix)}
    allowed = {*architecture.facts, *architecture.optional, *architecture.constants}
    if "rope.dimension_count" in architecture.facts:
        allowed |= {"attention.key_length", "attention.value_length"}  # derived from it
    return sorted((stated - allowed) | (set(architecture.facts) - stated))


def configuration(architecture: Architecture, file_facts: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration's attributes that a file states, as transformers' class takes them."""
    named = {**architecture.facts, **architecture.optional}
    attributes = {
        name: file_facts[f"{architecture.name}.{key}"]
        for key, name in named.items()
        if f"{architecture.name}.{key}" in file_facts
    }
    attributes |= {name: None for name in architecture.optional.values() if name not in attributes}
    if ROTARY_BASE in attributes:
        attributes["rope_parameters"] = {"rope_type": "default", ROTARY_BASE: attributes.pop(ROTARY_BASE)}
    if architecture.model_type in ("olmo", "phi3"):
        attributes.pop("head_dim")  # derived by their classes
    return attributes
