"""Architectures of the models that reports name: public facts as transformers' configuration, no weights, no torch.

Sources: the config.json of openai-community/gpt2, allenai/OLMo-1B-hf and microsoft/Phi-3-mini-4k-instruct. Only what
decides shapes and buffers is listed; a test builds each on the meta device and counts its parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from harness.core.errors import UnknownName

if TYPE_CHECKING:  # annotations only
    from transformers import PretrainedConfig

GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "tie_word_embeddings": True,
}
OLMO_1B = {
    "model_type": "olmo",
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "clip_qkv": None,
    "tie_word_embeddings": True,
}
PHI_3_MINI = {
    "model_type": "phi3",
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "sliding_window": 2047,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
    "tie_word_embeddings": False,
}
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"gpt2": GPT2, "olmo-1b": OLMO_1B, "phi-3-mini": PHI_3_MINI}
)


def config_of(name: str) -> PretrainedConfig:
    """The configuration of a known architecture; UnknownName lists those there are."""
    from transformers import AutoConfig

    if name not in ARCHITECTURES:
        raise UnknownName("architecture", name, ARCHITECTURES)
    return AutoConfig.for_model(**ARCHITECTURES[name])
