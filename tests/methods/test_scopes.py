"""Scopes over the structures of four model families, randomly initialised."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoConfig,
    OPTConfig,
    Phi3Config,
)

from harness.core.contracts import Scope
from harness.core.errors import BadSpecification, HarnessError, UnknownName
from harness.methods import nf4
from harness.methods.quantizing.arguments import parse_scope, scope_text, select

SIZES = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: GPT2Config(vocab_size=48, n_embd=32, n_head=4, n_layer=3, n_positions=16),
    "llama": lambda: LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "olmo": lambda: OlmoConfig(**SIZES, tie_word_embeddings=False),
    "phi3": lambda: Phi3Config(**SIZES, pad_token_id=0),
    "opt": lambda: OPTConfig(**SIZES, ffn_dim=64, max_position_embeddings=16, word_embed_proj_dim=32),
    "neox": lambda: GPTNeoXConfig(**SIZES),
}
LLAMA = [f"self_attn.{name}_proj" for name in "qkvo"], [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
HALVES = {  # attention, mlp: what stands below a layer
    "gpt2": (["attn.c_attn", "attn.c_proj"], ["mlp.c_fc", "mlp.c_proj"]),
    "llama": LLAMA,
    "olmo": LLAMA,
    "phi3": (["self_attn.o_proj", "self_attn.qkv_proj"], ["mlp.gate_up_proj", "mlp.down_proj"]),
    "opt": ([f"self_attn.{name}_proj" for name in "kvq"] + ["self_attn.out_proj"], ["fc1", "fc2"]),
    "neox": (["attention.query_key_value", "attention.dense"], ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]),
}
STACK = {"gpt2": "transformer.h", "opt": "model.decoder.layers", "neox": "gpt_neox.layers"}


def build(family: str) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(CONFIGS[family]())
    return model


def inside(family: str, names: list[str], layers: tuple[int, ...] = (0, 1, 2)) -> set[str]:
    return {f"{STACK.get(family, 'model.layers')}.{layer}.{name}" for layer in layers for name in names}


@pytest.mark.parametrize("family", CONFIGS)
def test_linear_attention_and_mlp(family: str) -> None:
    model, (attention, mlp) = build(family), HALVES[family]
    assert set(select(model, Scope("attention"))) == inside(family, attention)
    assert set(select(model, Scope("mlp"))) == inside(family, mlp)
    assert set(select(model, Scope())) == inside(family, attention + mlp)


@pytest.mark.parametrize("family", CONFIGS)
def test_all_takes_every_weight_once(family: str) -> None:
    model = build(family)
    chosen = [model.get_submodule(name).weight for name in select(model, Scope("all"))]
    every = {id(parameter) for name, parameter in model.named_parameters() if name.endswith("weight")}
    assert {id(weight) for weight in chosen} == every
    assert len(chosen) == len(every)


@pytest.mark.parametrize("family", ["gpt2", "olmo"])
def test_layers_and_names_narrow(family: str) -> None:
    model, (attention, mlp) = build(family), HALVES[family]
    assert set(select(model, Scope(layers=(1, 2)))) == inside(family, attention + mlp, (1, 2))
    assert set(select(model, Scope("mlp", (2, 2)))) == inside(family, mlp, (2,))
    glob = f"*.{mlp[0]}"
    assert set(select(model, Scope(names=glob, layers=(0, 1)))) == inside(family, mlp[:1], (0, 1))
    assert all(fnmatchcase(name, glob) for name in select(model, Scope(names=glob)))


def test_all_of_some_layers_takes_their_norms_and_no_embedding() -> None:
    chosen = select(build("llama"), Scope("all", (1, 1)))
    assert set(chosen) == inside("llama", [*LLAMA[0], *LLAMA[1], "input_layernorm", "post_attention_layernorm"], (1,))


def test_a_tied_weight_answers_to_both_its_names() -> None:
    assert select(build("llama"), Scope("all", names="lm_head")) == ["model.embed_tokens"]
    assert select(build("olmo"), Scope("all", names="lm_head")) == ["lm_head"]


@pytest.mark.parametrize("part", ["linear", "all", "mlp"])
def test_a_quantized_model_gives_the_same_answer(part: str) -> None:
    from harness.core.contracts import Arguments

    for family in ("gpt2", "llama"):
        model = build(family)
        before = select(model, Scope(part))
        nf4.METHOD.sketch(model, Arguments("fp32", Scope(part), {"block": 64}))
        assert select(model, Scope(part)) == before


def test_order_is_that_of_the_model() -> None:
    model = build("gpt2")
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    chosen = select(model, Scope("all"))
    assert chosen == sorted(chosen, key=order.__getitem__)


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        (
            Scope(names="lm_head"),
            "scope 'linear:names=lm_head' selects nothing in LlamaForCausalLM: it has layers 0-2 ",
        ),
        (Scope(names="lm_head"), "lm_head, embeddings and norms need the scope 'all'"),
        (Scope("mlp", names="*q_proj"), "each with self_attn.q_proj, .*, post_attention_layernorm"),
        (Scope(layers=(0, 11)), "'linear:layers=0-11' reaches beyond LlamaForCausalLM: its 3 layers are 0-2"),
    ],
)
def test_selecting_nothing_is_an_error(scope: Scope, message: str) -> None:
    with pytest.raises(BadSpecification, match=message) as caught:
        select(build("llama"), scope)
    assert "\n" not in str(caught.value)


def test_packed_experts_and_their_router_are_matrices_too() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2, tie_word_embeddings=False)
        )
    experts = ["mlp.gate", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert set(select(model, Scope())) == inside("llama", LLAMA[0] + experts)
    assert set(select(model, Scope("mlp", names="*experts"))) == inside("llama", experts[1:])
    assert set(select(model, Scope("attention"))) == inside("llama", LLAMA[0])
    assert set(select(model, Scope(), linear=True)) == inside("llama", LLAMA[0])


def test_a_model_without_layers() -> None:
    with pytest.raises(HarnessError, match="Sequential has no list of layers"):
        select(nn.Sequential(nn.Linear(2, 2)), Scope())


def test_experts_in_a_list_are_no_layers() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))

    model = nn.Module()
    model.blocks = nn.ModuleList([Layer(), Layer()])
    assert select(model, Scope(layers=(1, 1))) == [f"blocks.1.experts.{expert}" for expert in range(5)]


@pytest.mark.parametrize(
    ("words", "arguments", "scope"),
    [
        ((), {}, Scope()),
        (("mlp",), {"layers": "3"}, Scope("mlp", (3, 3))),
        ((), {"layers": "0-11", "names": "*.q_proj", "block": "64"}, Scope("linear", (0, 11), "*.q_proj")),
    ],
)
def test_parse(words: tuple[str, ...], arguments: dict[str, str], scope: Scope) -> None:
    assert parse_scope(words, arguments) == scope


@pytest.mark.parametrize(
    ("words", "arguments", "error", "message"),
    [
        (("atention",), {}, UnknownName, "unknown scope 'atention'; did you mean 'attention'?"),
        (("all", "mlp"), {}, BadSpecification, "'all' and 'mlp' exclude each other"),
        ((), {"layers": "1-"}, BadSpecification, "'layers=1-' is no range of layers"),
        ((), {"layers": "-1"}, BadSpecification, "is no range"),
        ((), {"layers": "4-2"}, BadSpecification, "runs backwards: write layers=2-4"),
    ],
)
def test_parse_refuses(words: tuple[str, ...], arguments: dict[str, str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_scope(words, arguments)


def test_text() -> None:
    assert scope_text(Scope("all", (0, 3), "*.mlp.*")) == "all:layers=0-3:names=*.mlp.*"
    assert scope_text(Scope()) == "linear"
