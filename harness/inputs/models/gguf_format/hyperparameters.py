"""What a GGUF file's metadata say of the computation, as transformers' configuration; nothing is left out in silence.

A key below the architecture's name is taken by whoever computes with it. What nobody took must say that nothing is
done (`NEUTRAL`), or the file is refused by that key: an architecture's class would otherwise compute with its own
default, and give a figure of another model. Defaults are llama.cpp's, as are the names.

Positions come in four forms: `rope.scaling.*` (linear, YaRN), a factor a frequency (`rope_freqs.weight`: Llama 3), and
one for short and one for long texts (`rope_factors_*.weight`: LongRoPE).
"""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from harness.core.errors import BadFile
from harness.inputs.models.gguf_format import tokenizers

ROTARY_BASE = "rope_theta"  # lies in transformers' rope_parameters, not on the configuration itself
BASE = 10_000.0  # of the rotary frequencies, where a file states none
HEADS, HEADS_KV = "attention.head_count", "attention.head_count_kv"
LONG, SHORT, EACH = "rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"
POSITIONS = (LONG, SHORT, EACH)  # tensors that belong to the configuration
SHAPE = {  # key below the architecture's name -> attribute of transformers' configuration
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    HEADS: "num_attention_heads",
}
GROUPED = {"vocab_size": "vocab_size", HEADS_KV: "num_key_value_heads"}
ROTARY = {"rope.dimension_count": "head_dim", "rope.freq_base": ROTARY_BASE}
RMS, NORM = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
GEMMA = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
ORIGINAL = "rope.scaling.original_context_length"
APART = {"vocab_size", HEADS_KV, *ROTARY, ORIGINAL}  # keys that have a rule of their own
# attribute of the configuration -> a tensor that is there where it is true
BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
NEUTRAL: Mapping[str, tuple[Any, ...]] = {  # key -> values under which llama.cpp does nothing
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0, 1),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "feed_forward_length": (0,),
    HEADS: (0,),
    HEADS_KV: (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.alpha": (0,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.factor": (0, 1),
    "rope.scaling.finetuned": (True, False),  # who scaled the positions
    "rope.scaling.type": ("none",),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "ssm.dt_b_c_rms": (False,),
    "tensor_data_layout": ("Meta AI original pth",),  # the rows' order that is expected anyway
}


@dataclass(frozen=True)
class Hyperparameters:
    """The keys of one architecture, for reading and writing."""

    model_type: str  # of transformers
    facts: Mapping[str, str]  # key below the architecture's name -> attribute: a file must state it
    optional: Mapping[str, str] = field(default_factory=dict)  # the same, where it need not, or the attribute is None
    switches: Mapping[str, str] = field(default_factory=dict)  # attribute -> tensor that is there where it is true
    fixed: Mapping[str, Any] = field(default_factory=dict)  # attributes that llama.cpp's graph takes for granted
    constants: Mapping[str, float] = field(default_factory=dict)  # keys that llama.cpp asks for, fixed in transformers
    head: bool = False  # whether transformers' class takes a head's size; others derive it
    partial: bool = False  # whether it rotates a part of a head


LLAMA_LIKE: dict[str, Any] = {
    "facts": {**SHAPE, RMS: "rms_norm_eps"},
    "optional": {**GROUPED, **ROTARY},
    "switches": BIASES,
    "fixed": {"hidden_act": "silu"},
}
SCALES = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
KNOWN = {
    "llama": Hyperparameters("llama", **LLAMA_LIKE, head=True),
    "granite": Hyperparameters("granite", **{**LLAMA_LIKE, "facts": {**LLAMA_LIKE["facts"], **SCALES}}),
    "olmo": Hyperparameters(
        "olmo",
        SHAPE,
        {**GROUPED, **ROTARY, "attention.clamp_kqv": "clip_qkv"},
        switches={"attention_bias": BIASES["attention_bias"]},
        fixed={"hidden_act": "silu"},
        constants={NORM: 1e-5},
    ),
    "phi3": Hyperparameters(
        "phi3",
        {**SHAPE, RMS: "rms_norm_eps"},
        {
            **GROUPED,
            **ROTARY,
            ORIGINAL: "original_max_position_embeddings",
            "attention.sliding_window": "sliding_window",
        },
        fixed={"hidden_act": "silu"},
        partial=True,
    ),
    "gpt2": Hyperparameters(
        "gpt2",
        {
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "block_count": "n_layer",
            HEADS: "n_head",
            NORM: "layer_norm_epsilon",
        },
        {"vocab_size": "vocab_size"},
        fixed={
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
    ),
    "qwen2": Hyperparameters("qwen2", {**SHAPE, RMS: "rms_norm_eps"}, {**GROUPED, **ROTARY}),
    "qwen2moe": Hyperparameters(
        "qwen2_moe",
        {
            **SHAPE,
            RMS: "rms_norm_eps",
            **EXPERTS,
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        {**GROUPED, **ROTARY},
    ),
    "qwen3": Hyperparameters(
        "qwen3",
        {**SHAPE, RMS: "rms_norm_eps"},
        {**GROUPED, **ROTARY},
        switches={"attention_bias": BIASES["attention_bias"]},
        head=True,
    ),
    "qwen3moe": Hyperparameters(
        "qwen3_moe", {**SHAPE, RMS: "rms_norm_eps", **EXPERTS}, {**GROUPED, **ROTARY}, head=True
    ),
    "gemma2": Hyperparameters("gemma2", {**SHAPE, RMS: "rms_norm_eps"}, {**GROUPED, **ROTARY, **GEMMA}, head=True),
    "gemma3": Hyperparameters("gemma3_text", {**SHAPE, RMS: "rms_norm_eps"}, {**GROUPED, **ROTARY, **GEMMA}, head=True),
    "starcoder2": Hyperparameters(
        "starcoder2",
        {**SHAPE, NORM: "norm_epsilon"},
        {**GROUPED, **ROTARY},
        switches={"use_bias": "blk.0.attn_q.bias"},
    ),
    "stablelm": Hyperparameters(
        "stablelm",
        {**SHAPE, NORM: "layer_norm_eps"},
        {**GROUPED, **ROTARY},
        switches={"use_qkv_bias": "blk.0.attn_q.bias", "qk_layernorm": "blk.0.attn_q_norm.weight"},
        partial=True,
    ),
    "nemotron": Hyperparameters(
        "nemotron", {**SHAPE, NORM: "norm_eps"}, {**GROUPED, **ROTARY}, switches=BIASES, head=True, partial=True
    ),
    "falcon": Hyperparameters(
        "falcon",
        {**SHAPE, NORM: "layer_norm_epsilon", "feed_forward_length": "ffn_hidden_size"},
        {**GROUPED, **ROTARY},
        switches={"bias": "blk.0.attn_qkv.bias"},
    ),
    "bloom": Hyperparameters(
        "bloom",
        {"embedding_length": "hidden_size", "block_count": "n_layer", HEADS: "n_head", NORM: "layer_norm_epsilon"},
        {"vocab_size": "vocab_size", "context_length": "seq_length"},
    ),
    "mamba": Hyperparameters(
        "mamba",
        {
            "embedding_length": "hidden_size",
            "block_count": "num_hidden_layers",
            RMS: "layer_norm_epsilon",
            "ssm.conv_kernel": "conv_kernel",
            "ssm.inner_size": "intermediate_size",
            "ssm.state_size": "state_size",
            "ssm.time_step_rank": "time_step_rank",
        },
        {"vocab_size": "vocab_size", "context_length": "max_position_embeddings"},
        switches={"use_conv_bias": "blk.0.ssm_conv1d.bias"},
    ),
}
REAL = {RMS, NORM, *SCALES, *GEMMA.keys() - {"attention.sliding_window"}, "attention.clamp_kqv"}  # others count


class Stated:
    """The keys of a file below its architecture's name. Whoever takes one computes with it; `left` are the others."""

    def __init__(self, what: str, metadata: Mapping[str, Any]) -> None:
        self.what, self.prefix = what, f"{metadata.get('general.architecture')}."
        self.all = {key[len(self.prefix) :]: value for key, value in metadata.items() if key.startswith(self.prefix)}
        self.left = dict(self.all)

    def refused(self, key: str, why: str) -> BadFile:
        """The error for a key: its name and value, and why it cannot be computed with."""
        return BadFile(f"{self.what} says {self.prefix}{key} = {str(self.all.get(key))!s:.80}, {why}")

    def take(self, key: str, default: Any = None) -> Any:
        """A key's value, one for all layers; refused where layers differ."""
        value = self.left.pop(key, default)
        if isinstance(value, list):
            if not value or any(one != value[0] for one in value):
                raise self.refused(key, "a number for each layer, and one for all of them is read")
            value = value[0]
        return value

    def number(self, key: str, default: float | None = None) -> Any:
        """A finite number, not below zero; refused where a file must state it and does not."""
        value = self.take(key, default)
        if value is None:
            raise BadFile(f"{self.what} does not state {self.prefix}{key}: convert the model again")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise self.refused(key, "which is no number of that kind: convert the model again")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number above zero."""
        value = self.number(key, default)
        if not isinstance(value, int) or not value:
            raise self.refused(key, "which counts nothing: convert the model again")
        return value

    def require_nothing_left(self, **neutral: Any) -> None:
        """Refuse the first key that nobody took and that would change the computation.

        `neutral`: further values that change nothing, key=value.
        """
        for key, value in self.left.items():
            known = (*NEUTRAL.get(key, ()), *((neutral[key],) if key in neutral else ()))
            if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in known):
                raise self.refused(key, "which is not translated: name the model's own folder (config.json) instead")


def require_model(what: str, metadata: Mapping[str, Any]) -> None:
    """Refuse a file that holds no whole model: an adapter, a projector, one of several parts."""
    kind = metadata.get("general.type", "model")
    if kind != "model" or any(key.startswith("adapter.") for key in metadata):
        raise BadFile(f"{what} holds no model but {str(kind)!r:.40}: merge it into its model, and name that file")
    if (parts := metadata.get("split.count", 1)) not in (0, 1):
        raise BadFile(f"{what} is one of {parts!s:.20} parts: join them (llama-gguf-split --merge)")


def configuration(what: str, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> Any:
    """The configuration, of transformers, of a file whose architecture is in `KNOWN`.

    Args:
        what: names the file in errors.
        metadata: all of the file's.
        tensors: name -> what has `shape` and, for those of `POSITIONS`, `dequantize()`.

    Raises BadFile, one line, for a key that is missing, of a wrong kind, or not translated.
    """
    given = attributes(what, metadata, tensors)
    config = AutoConfig.for_model(**given)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[given["model_type"]]]
    return config


def attributes(what: str, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The same as the attributes that the configuration is built with."""
    name = metadata["general.architecture"]
    row, stated = KNOWN[name], Stated(what, metadata)
    given = {"model_type": row.model_type, **_plain_keys(row, stated)}
    if (layers := given[row.facts["block_count"]]) > len(tensors):
        raise BadFile(f"{what} says it has {layers} layers, and holds {len(tensors)} tensors: copy it again")
    if HEADS in row.facts:
        _heads(name, row, stated, given, tensors)
    if special := SPECIAL.get(name):
        special(stated, given, tensors)
    words = len(metadata.get("tokenizer.ggml.tokens", ()))
    rows = tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else words
    given["vocab_size"] = stated.count("vocab_size", rows)
    for token, key in tokenizers.TOKENS.items():
        number = metadata.get(key)
        if token != "unk":
            known = isinstance(number, int) and 0 <= number < given["vocab_size"]
            given[f"{token}_token_id"] = number if known else None
    given |= {attribute: tensor in tensors for attribute, tensor in row.switches.items()}
    stated.require_nothing_left()
    return {**given, "tie_word_embeddings": "output.weight" not in tensors, "dtype": "float32"}


def _plain_keys(row: Hyperparameters, stated: Stated) -> dict[str, Any]:
    """Attributes that are a key's value; constants are held to what they must be."""
    given: dict[str, Any] = {}
    for key, attribute in row.facts.items():
        given[attribute] = stated.number(key) if key in REAL else stated.count(key)
    for key, attribute in row.optional.items():
        if key not in APART and key in stated.left:
            given[attribute] = stated.number(key) or None  # 0 means none
    for key, value in row.constants.items():
        if not math.isclose(stated.number(key, value), value, rel_tol=1e-6):  # files hold fp32
            raise stated.refused(key, f"where transformers' {row.model_type} has {value:g}")
    return given


def _heads(name: str, row: Hyperparameters, stated: Stated, given: dict[str, Any], tensors: Mapping[str, Any]) -> None:
    """Heads, their size, what of them rotates, and how: into `given`."""
    heads, hidden = given[row.facts[HEADS]], given[row.facts["embedding_length"]]
    if HEADS_KV in row.optional:
        given[row.optional[HEADS_KV]] = stated.count(HEADS_KV, heads)
    rotates = "rope.dimension_count" in row.optional
    usual = stated.all.get("rope.dimension_count", hidden // heads) if name == "llama" else hidden // heads
    head = stated.count("attention.key_length", usual)
    if stated.count("attention.value_length", head) != head:
        raise stated.refused("attention.value_length", f"where its keys have {head}, and transformers has one size")
    if head != usual and not row.head:
        raise stated.refused("attention.key_length", f"where transformers' {row.model_type} has heads of {usual}")
    if row.head:
        given["head_dim"] = head
    if not rotates:
        return
    rotary = stated.count("rope.dimension_count", head)
    if rotary != head and not (row.partial and rotary < head):
        raise stated.refused("rope.dimension_count", f"where transformers' {row.model_type} rotates heads of {head}")
    original = stated.count(ORIGINAL, given["max_position_embeddings"])
    if ORIGINAL in row.optional:
        given[row.optional[ORIGINAL]] = original
    given["rope_parameters"] = positions(stated, rotary, original, tensors)
    if rotary != head or row.model_type in ("stablelm", "nemotron"):  # which rotate a part where nothing is said
        given["rope_parameters"]["partial_rotary_factor"] = rotary / head


def positions(stated: Stated, rotary: int, original: int, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The `rope_parameters` of transformers: of `rotary` dimensions a head, with `original` tokens read in training."""
    base = {ROTARY_BASE: stated.number("rope.freq_base", BASE)}
    kind = stated.take("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise stated.refused("rope.scaling.type", "which is not translated: name the model's own folder instead")
    linear = stated.number("rope.scale_linear", 0)  # as the first files had it
    factor = float(stated.number("rope.scaling.factor", linear)) or 1.0
    attention = float(stated.number("rope.scaling.attn_factor", 0))
    if LONG in tensors or SHORT in tensors or kind == "longrope":
        scaled: dict[str, Any] = {
            "short_factor": _factors(stated, SHORT, rotary, tensors),
            "long_factor": _factors(stated, LONG, rotary, tensors),
            "original_max_position_embeddings": original,
        }
        scaled |= {"attention_factor": attention} if attention else {}
        return {"rope_type": "longrope", **base, **scaled, **({"factor": factor} if factor != 1 else {})}
    if kind == "yarn":
        if EACH in tensors:
            raise BadFile(f"{stated.what} scales its positions twice, by YaRN and by {EACH}: convert the model again")
        return {"rope_type": "yarn", **base, **_yarn(stated, factor, attention, original)}
    factor = 1.0 if kind == "none" else factor
    each = [factor] * (rotary // 2)
    if EACH in tensors:
        each = [factor * one for one in _factors(stated, EACH, rotary, tensors)]
    if set(each) == {1.0} and attention in (0, 1):
        return {"rope_type": "default", **base}
    if EACH in tensors or attention not in (0, 1) or stated.prefix == "phi3.":  # whose class knows no other kind
        # LongRoPE with the same factors for short and long texts: what any factors can be written as
        scaled = {"short_factor": each, "long_factor": each, "original_max_position_embeddings": original}
        return {"rope_type": "longrope", **base, **scaled, "attention_factor": attention or 1.0}
    return {"rope_type": "linear", **base, "factor": factor}


def _yarn(stated: Stated, factor: float, attention: float, original: int) -> dict[str, Any]:
    """YaRN's own parameters (Peng et al. 2023, arXiv 2309.00071): where it changes, and what it does to attention."""
    scaled: dict[str, Any] = {"factor": factor, "original_max_position_embeddings": original}
    for name in ("beta_fast", "beta_slow"):
        if f"rope.scaling.yarn_{name}" in stated.left:
            scaled[name] = float(stated.number(f"rope.scaling.yarn_{name}"))
    own = float(stated.number("rope.scaling.yarn_attn_factor", 0))  # what a converter finds as attention_factor
    if own or attention:  # llama.cpp multiplies its own formula by attn_factor
        scaled["attention_factor"] = (own or 0.1 * math.log(max(factor, 1)) + 1) * (attention or 1)
    return scaled


def _factors(stated: Stated, name: str, rotary: int, tensors: Mapping[str, Any]) -> list[float]:
    """A tensor of factors, one for each pair of dimensions that rotate."""
    if name not in tensors:
        raise BadFile(f"{stated.what} has positions scaled by factors and lacks {name}: convert the model again")
    found = [float(one) for one in tensors[name].dequantize().reshape(-1)]
    if len(found) != rotary // 2 or not all(0 < one < math.inf for one in found):
        raise BadFile(f"{stated.what}: its {name} does not hold {rotary // 2} factors: convert the model again")
    return found


# what a file says by its architecture's name, by its tensors, or in a way of its own


def _gemma(given: dict[str, Any], largest: int) -> None:
    """Gemma divides by the square root of a head's size; its largest model by the heads' share of the width."""
    given["query_pre_attn_scalar"] = given["head_dim"]
    if given["num_hidden_layers"] == largest:
        given["query_pre_attn_scalar"] = given["hidden_size"] // given["num_attention_heads"]


def _gemma2(stated: Stated, given: dict[str, Any], tensors: Mapping[str, Any]) -> None:
    _gemma(given, largest=46)


def _gemma3(stated: Stated, given: dict[str, Any], tensors: Mapping[str, Any]) -> None:
    """Layers with a window have a base of their own, and no scaling; every sixth reads the whole text."""
    _gemma(given, largest=62)
    layers = given["num_hidden_layers"]
    near = {"rope_type": "default", ROTARY_BASE: stated.number("rope.freq_base_swa", BASE)}
    given["rope_parameters"] = {"full_attention": given["rope_parameters"], "sliding_attention": near}
    pattern = stated.left.get("attention.sliding_window_pattern", 6)
    if isinstance(pattern, list) and len(pattern) == layers:
        windows = [bool(one) for one in pattern]
        del stated.left["attention.sliding_window_pattern"]
    else:
        every = stated.count("attention.sliding_window_pattern", 6)
        windows = [bool((layer + 1) % every) for layer in range(layers)]
    if not given.get("sliding_window"):
        windows = [False] * layers
    given["layer_types"] = ["sliding_attention" if one else "full_attention" for one in windows]


def _stablelm(stated: Stated, given: dict[str, Any], tensors: Mapping[str, Any]) -> None:
    given["use_parallel_residual"] = "blk.0.ffn_norm.weight" not in tensors  # as llama.cpp decides it
    stated.take("use_parallel_residual")  # which converters state of sequential models too


def _falcon(stated: Stated, given: dict[str, Any], tensors: Mapping[str, Any]) -> None:
    if given.pop("num_key_value_heads") != 1 or "blk.0.attn_norm_2.weight" in tensors:
        raise BadFile(f"{stated.what}: a Falcon with several key heads lies in an order of its own: name its folder")


def _bloom(stated: Stated, given: dict[str, Any], tensors: Mapping[str, Any]) -> None:
    for key, usual in ((HEADS_KV, given["n_head"]), ("feed_forward_length", 4 * given["hidden_size"])):
        if stated.count(key, usual) != usual:
            raise stated.refused(key, f"where transformers' bloom has {usual}")


def _mamba(stated: Stated, given: dict[str, Any], tensors: Mapping[str, Any]) -> None:
    given["expand"], rest = divmod(given["intermediate_size"], given["hidden_size"])
    if rest:
        raise stated.refused("ssm.inner_size", "no multiple of its width, which transformers' mamba takes it for")


def _qwen3moe(stated: Stated, given: dict[str, Any], tensors: Mapping[str, Any]) -> None:
    given["norm_topk_prob"] = True  # in llama.cpp's graph


Special = Callable[[Stated, dict[str, Any], Mapping[str, Any]], None]
SPECIAL: Mapping[str, Special] = {
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "stablelm": _stablelm,
    "falcon": _falcon,
    "bloom": _bloom,
    "mamba": _mamba,
    "qwen3moe": _qwen3moe,
}


# architectures that transformers alone translates


def require_translated(what: str, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Hold a file of any other architecture to the keys that transformers computes with."""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    name = str(metadata.get("general.architecture"))
    stated = Stated(what, metadata)
    taken = _asked_for(name, metadata, tensors)
    if taken is None:
        table = GGUF_CONFIG_MAPPING.get(name.replace("-", "_"))
        if table is None:
            raise BadFile(f"{what} holds a {name!r:.40} model, which transformers does not read from GGUF")
        taken = {key for key, attribute in table.items() if attribute}
    for key in taken & stated.left.keys():
        del stated.left[key]
    heads, width = (stated.all.get(key) for key in (HEADS, "embedding_length"))
    head = stated.all.get("attention.key_length")
    if head is None and isinstance(heads, int) and isinstance(width, int) and heads:
        head = width // heads
    sizes = dict.fromkeys(("rope.dimension_count", "attention.key_length", "attention.value_length"), head)
    stated.require_nothing_left(**sizes, vocab_size=stated.all.get("vocab_size"))


def _asked_for(name: str, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> set[str] | None:
    """The keys that transformers' own function asks a file for; None where it has none for the architecture."""
    try:
        from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    except ImportError:  # earlier releases have one table for all architectures
        return None
    if name not in GGUF_CONFIG_ARCHS:
        return None
    asked: set[str] = set()

    class Watched(UserDict[str, Any]):
        """Notes what is asked for."""

        def __getitem__(self, key: str) -> Any:
            asked.add(key)
            return super().__getitem__(key)

    words = {"tokenizer.ggml.tokens": len(metadata.get("tokenizer.ggml.tokens", ()))}
    GGUF_CONFIG_ARCHS[name](Watched({**metadata, **words}), tuple(tensors))
    return {key.removeprefix(f"{name}.") for key in asked}
