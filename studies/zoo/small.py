"""A small configuration of every causal architecture: by rules over the names that configurations give their sizes.

A rule serves all families that use its name; `OWN` has what one family needs beside them. Sub-configurations (of
vision, audio, several decoders) are made small by the same rules.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, CONTEXT, LAYERS, WIDTH = 300, 128, 2, 64

SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(
        "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions "
        "context_length".split(),
        CONTEXT,
    ),
    **dict.fromkeys(
        "num_hidden_layers num_layers n_layer n_layers decoder_layers encoder_layers num_decoder_layers "
        "num_encoder_layers depth conf_num_hidden_layers".split(),
        LAYERS,
    ),
    **dict.fromkeys(
        "hidden_size d_model n_embd embed_dim embedding_size emb_dim dim lru_width word_embed_proj_dim "
        "text_hidden_size out_hidden_size output_hidden_size backbone_hidden_size "
        "input_embedding_size cross_attention_hidden_size embedding_dim".split(),
        WIDTH,
    ),
    **dict.fromkeys(
        "intermediate_size n_inner ffn_dim decoder_ffn_dim encoder_ffn_dim dff dim_ff ffn_hidden_size "
        "feed_forward_size intermediate_size_mlp shared_intermediate_size shared_expert_intermediate_size "
        "shared_experts_intermediate_size moe_shared_expert_intermediate_size dense_intermediate_size d_inner "
        "prefix_dense_intermediate_size mlp_dim block_ffn_dim".split(),
        2 * WIDTH,
    ),
    **dict.fromkeys("moe_intermediate_size expert_ffn_hidden_size moe_latent_size".split(), WIDTH // 2),
    **dict.fromkeys(
        "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads linear_num_heads "
        "linear_num_value_heads index_n_heads indexer_n_heads conf_num_attention_heads".split(),
        4,
    ),
    **dict.fromkeys(
        "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads".split(),
        2,
    ),
    **dict.fromkeys(
        "head_dim attention_head_size d_head d_kv dim_head kv_channels v_head_dim swa_head_dim "
        "linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim indexer_head_dim mamba_d_head "
        "mamba_head_dim global_head_dim qk_nope_head_dim".split(),
        16,
    ),
    **dict.fromkeys("qk_rope_head_dim rotary_dim".split(), 8),
    **dict.fromkeys("q_lora_rank kv_lora_rank o_lora_rank".split(), 32),
    **dict.fromkeys(
        "num_experts num_local_experts n_routed_experts moe_num_experts num_moe_experts".split(), 4
    ),
    **dict.fromkeys(
        "num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k top_k_experts router_top_k".split(), 2
    ),
    **dict.fromkeys("n_group topk_group n_shared_experts num_shared_experts moe_num_shared_experts".split(), 1),
    **dict.fromkeys("mamba_n_heads mamba_num_heads".split(), 8),
    **dict.fromkeys("mamba_d_state state_size ssm_state_size mamba_chunk_size chunk_size".split(), 16),
    **dict.fromkeys("sliding_window attention_chunk_size window_size attention_window_size".split(), 32),
    **dict.fromkeys("bos_token_id eos_token_id decoder_start_token_id".split(), 1),
    "pad_token_id": 0,
    **dict.fromkeys("forced_bos_token_id forced_eos_token_id begin_suppress_tokens suppress_tokens".split(), None),
    "indexer_kv_heads": 1,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "is_decoder": True,
    "is_encoder_decoder": False,
    "use_mamba_kernels": False,
    "type_vocab_size": 2,
    "first_k_dense_replace": 1,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
    "image_size": 32,
    "patch_size": 16,
    "hidden_size_per_layer_input": 16,
    "query_pre_attn_scalar": 16,
    "index_topk": 64,
    "num_kv_shared_layers": 0,
    "local_attention": 32,
    "keep_window_size": 32,
    "attention_type": "original_full",
    "encoder_hash_byte_group_vocab": 500,
    "num_mel_bins": 16,
}  # fmt: skip

OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "cohere_compass_text": {
        "rope_parameters": {
            name: {"rope_type": "default", "rope_theta": 1e4} for name in ("full_attention", "sliding_attention")
        }
    },
    "deepseek_v4": {"num_key_value_heads": 1, "o_groups": 2},
    **{
        name: {"num_key_value_heads": 4, "per_layer_config": {}, "swa_head_dim": 24}
        for name in ("dots3_note", "dots3_note_text")
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "mamba": {"time_step_rank": 4},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "minicpm3": {"dim_model_base": 64},
    "mpt": {"expansion_ratio": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 48],
        "num_buckets": 4,
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "hash_seed": 0,
    },
    **{
        name: {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]}
        for name in ("zamba", "zamba2")
    },
    "zaya": {"num_experts_per_tok": 1},
    "xlm": {"causal": True},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
}
DEEP = 12  # layers that show every type of layer which a configuration makes of itself


def families() -> dict[str, str]:
    """Every model type of transformers' causal mapping, with its class's name, in the order of the mapping."""
    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def configuration(family: str) -> PretrainedConfig:
    """A small configuration of a model type; what a family's configuration refuses is raised as it comes."""
    kind = CONFIG_MAPPING[family]
    return kind(**sizes(kind, family))


def sizes(kind: type[PretrainedConfig], family: str = "") -> dict[str, Any]:
    """The arguments of a small configuration: rules for the names that its class has, then the family's own."""
    known = names(kind)
    chosen = {name: value for name, value in SIZES.items() if name in known}
    for name, part in parts(kind).items():
        chosen[name] = sizes(part) | ({"model_type": part.model_type} if part.model_type else {})
    chosen |= OWN.get(family or kind.model_type, {})
    if "kv_lora_rank" in known and "num_key_value_heads" in chosen:  # latent attention: every head has keys of its own
        chosen["num_key_value_heads"] = chosen["num_attention_heads"]
    if (
        "layer_types" in known - kind.attribute_map.keys()
        and "layer_types" not in chosen
        and "num_hidden_layers" in chosen
    ):
        types = kind(**{**chosen, "num_hidden_layers": DEEP}).layer_types or ()  # a layer of each
        count = max(LAYERS, len(set(types)))
        chosen |= (
            {"layer_types": (list(dict.fromkeys(types)) * LAYERS)[:count], "num_hidden_layers": count} if types else {}
        )
    return chosen


def names(kind: type[PretrainedConfig]) -> set[str]:
    """What a configuration's class takes by name."""
    taken = inspect.signature(kind.__init__).parameters.keys() | getattr(kind, "__dataclass_fields__", {}).keys()
    return set(taken) | set(kind.attribute_map)


def parts(kind: type[PretrainedConfig]) -> Mapping[str, type[PretrainedConfig]]:
    """The classes of a configuration's own parts, those of optional ones left out."""
    specified = {name: each for name, each in kind.sub_configs_defaults.items() if not each.optional}
    classes = {
        name: CONFIG_MAPPING[each.model_type] if each.config_class is AutoConfig else each.config_class
        for name, each in specified.items()
    }
    if not kind.sub_configs_defaults:  # an older way of saying it
        classes = {name: part for name, part in (kind.sub_configs or {}).items() if part is not AutoConfig}
    return classes
