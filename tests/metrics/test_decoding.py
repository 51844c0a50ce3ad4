"""One token behind a prompt, for every kind of state that models carry."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from harness.core.errors import HarnessError
from harness.metrics.measuring import engine
from harness.metrics.measuring.decoding import Prompt, greedy, last_alone

SIZES: dict[str, Any] = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2}
ATTENTION = SIZES | {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
CONFIGURATIONS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**ATTENTION),
    "a full window": lambda: transformers.MistralConfig(**ATTENTION, sliding_window=4),
    "gptj": lambda: transformers.GPTJConfig(vocab_size=31, n_embd=16, n_layer=2, n_head=2, rotary_dim=4),
    "mpt": lambda: transformers.MptConfig(vocab_size=31, d_model=16, n_layers=2, n_heads=2, max_seq_len=64),
    "mamba": lambda: transformers.MambaConfig(**SIZES, state_size=4, time_step_rank=4),
    "rwkv": lambda: transformers.RwkvConfig(**SIZES, context_length=64),
    "lfm2": lambda: transformers.Lfm2Config(**ATTENTION, layer_types=["conv", "full_attention"]),
    "falcon-h1": lambda: transformers.FalconH1Config(
        **ATTENTION, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8
    ),
    "jamba": lambda: transformers.JambaConfig(
        **ATTENTION, num_experts=2, num_experts_per_tok=1, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4,
        mamba_dt_rank=4, use_mamba_kernels=False, pad_token_id=0,
    ),
}  # fmt: skip
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]])


@functools.cache
def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGURATIONS[name]()).eval().requires_grad_(False)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_step_is_the_whole_forward_s_last_as_often_as_it_is_rewound(name: str) -> None:
    model = model_of(name)
    with torch.inference_mode():
        whole = model(input_ids=IDS, use_cache=False).logits[:, -1]
        prompt = Prompt(model, IDS[:, :-1])
        for _ in range(3):
            prompt.rewind()
            torch.testing.assert_close(prompt.step(IDS[:, -1:]).logits[:, -1], whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_greedy_continuations_are_those_of_whole_forwards(name: str) -> None:
    model, ids = model_of(name), IDS
    with torch.inference_mode():
        for _ in range(5):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        assert greedy(model, IDS, 5).tolist() == ids[:, IDS.shape[1] :].tolist()
    assert engine.first_divergence(model, model, IDS[0].numpy(), 5, "cpu") == 5


def test_a_cache_of_keys_and_values_alone_is_cropped_and_others_are_copied() -> None:
    with torch.inference_mode():
        prompts = {name: Prompt(model_of(name), IDS) for name in CONFIGURATIONS}
    assert {name for name, prompt in prompts.items() if prompt.before is None} == {"llama", "gptj", "mpt"}


def test_logits_of_the_last_position_are_asked_for_where_they_can_be() -> None:
    assert last_alone(model_of("llama")) == {"logits_to_keep": 1}
    assert last_alone(nn.Linear(2, 2)) == {}


def test_a_model_without_a_state_says_so_in_one_line() -> None:
    class Stateless(nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return transformers.modeling_outputs.CausalLMOutput(logits=torch.zeros(*input_ids.shape, 3))

    with pytest.raises(HarnessError, match="Stateless gives back no cache and no state to decode from"):
        Prompt(Stateless(), IDS)
