"""GGUF metadata: every key is computed with, does nothing, or is refused; scaled positions give the right figures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from harness.core.contracts import Checkpoint
from harness.core.errors import BadFile
from harness.core.options import Declared
from harness.core.specification import parse
from harness.inputs.models import checkpoints
from harness.inputs.models.gguf_format import hyperparameters, write
from harness.inputs.texts import protocols
from harness.inputs.texts.corpora import Corpus
from tests.gguf_models import NAMED, TENSORS, Shaped, by_converter, byte_level, rewritten, save, stated

SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
LEE = Path(str(distribution("gensim").locate_file("gensim/test/test_data/lee_background.cor")))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def read(path: Path) -> Checkpoint:
    return checkpoints.materialise(parse(f"path:{path}"), Declared(path.parent))


def logits(checkpoint: Checkpoint, length: int = 60) -> torch.Tensor:
    with torch.no_grad():
        ids = torch.arange(length)[None] % 300 + 3
        found: torch.Tensor = checkpoints.open_model(checkpoint, "fp32", "cpu")(input_ids=ids).logits
    return found


def attributes(architecture: str, more: dict[str, Any] | None = None, **tensors: Any) -> dict[str, Any]:
    """What a small model's metadata say, with further keys and further tensors ('rope_freqs')."""
    named = {f"{name}.weight": tensor for name, tensor in tensors.items()}
    return hyperparameters.attributes("x.gguf", stated(architecture, more or {}), {**TENSORS, **named})


# positions: the figures of the folders that say the same in config.json, by a plain loop (random weights, real text)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Corpus]:
    """A GGUF file of a random Llama with a vocabulary made of the text, and the text."""
    folder = tmp_path_factory.mktemp("plain")
    text = LEE.read_text(encoding="utf-8")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [text[:60_000]],
        trainers.BpeTrainer(vocab_size=512, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False),
    )
    torch.manual_seed(0)
    wide = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**wide, **heads))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.get_input_embeddings().weight.normal_(0, 0.6)
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(folder)
    write.write(Checkpoint("x", folder, "x"), "F32", folder / "plain.gguf")
    return folder / "plain.gguf", Corpus("lee", (text[:9000],), "file", "ab" * 32)


def llama3(factor: float, low: float, high: float, original: int, size: int, base: float = 1e4) -> Iterator[float]:
    """Llama 3's factors a frequency, as llama.cpp's converter writes them."""
    for pair in range(size // 2):
        wave = 2 * math.pi * base ** (2 * pair / size)
        smooth = (original / wave - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        yield 1.0 if wave < original / high else factor if wave > original / low else between


SCALED: dict[str, tuple[float, dict[str, Any], dict[str, Any]]] = {
    "none": (852.161, {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}),
    "linear": (863.450, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {}),
    "of old": (863.450, {"rope.scale_linear": 4.0}, {}),
    "yarn": (
        848.306,
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
        {},
    ),
    "llama3": (864.466, {}, {"rope_freqs.weight": list(llama3(8.0, 1.0, 4.0, 32, 16))}),
}


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_positions_give_the_folder_s_figure(
    plain: tuple[Path, Corpus], kind: str, tmp_path: Path, cache: Path
) -> None:
    wanted, keys, tensors = SCALED[kind]
    checkpoint = read(rewritten(plain[0], tmp_path / "x.gguf", keys, tensors))
    tokenizer = checkpoints.tokenizer(checkpoint)
    plan = protocols.plan(plain[1], protocols.parse(parse("chunk:128")), tokenizer, context=256, max_tokens=1024)
    model: Any = checkpoints.open_model(checkpoint, "fp32", "cpu")
    total, count = 0.0, 0
    for window in plan.windows:
        ids = torch.from_numpy(window.ids)[None]
        with torch.no_grad():
            scores = model(input_ids=ids[:, :-1]).logits[0].double().log_softmax(-1)
        total -= float(scores.gather(1, ids[0, 1:, None]).sum())
        count += window.scored
    assert math.exp(total / count) == pytest.approx(wanted, abs=1e-3)


def test_longrope_is_that_of_the_folder(tmp_path: Path, cache: Path) -> None:
    """Short and long factors, each on its side of the original context, and the attention's own factor."""
    long = [1.0 + 0.5 * place for place in range(8)]
    scaled = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": long}
    save("phi3", tmp_path / "plain", original_max_position_embeddings=32)
    folder = save("phi3", tmp_path / "scaled", original_max_position_embeddings=32, rope_parameters=scaled)
    write.write(Checkpoint("x", tmp_path / "plain", "x"), "F32", tmp_path / "plain.gguf")
    factors = {"rope_factors_short.weight": [1.0] * 8, "rope_factors_long.weight": long}
    grown = math.sqrt(1 + math.log(128 / 32) / math.log(32))
    for number, keys in enumerate(({"rope.scaling.attn_factor": grown}, {})):
        found = read(rewritten(tmp_path / "plain.gguf", tmp_path / f"{number}.gguf", keys, factors))
        for length in (30, 60):
            torch.testing.assert_close(logits(found, length), logits(folder, length), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "tensors", "match"),
    [
        ({"rope.scaling.type": "longrope"}, {}, "lacks rope_factors_short"),
        ({"rope.scaling.type": "dynamic"}, {}, r"says llama\.rope\.scaling\.type = dynamic"),
        ({"rope.scaling.type": "yarn"}, {"rope_freqs": Shaped(4, values=[2.0] * 4)}, "scales its positions twice"),
        ({"rope.scaling.yarn_log_multiplier": 0.1}, {}, r"yarn_log_multiplier = 0\.1, which is not translated"),
        ({}, {"rope_freqs": Shaped(3, values=[2.0] * 3)}, "does not hold 4 factors"),
        ({}, {"rope_freqs": Shaped(4, values=[math.nan] * 4)}, "does not hold 4 factors"),
    ],
)
def test_positions_that_are_not_translated_are_one_line(more: Any, tensors: Any, match: str) -> None:
    with pytest.raises(BadFile, match=match):
        attributes("llama", more, **tensors)


def test_forms_of_positions() -> None:
    def scaled(more: dict[str, Any], architecture: str = "llama", **tensors: Any) -> dict[str, Any]:
        return dict(attributes(architecture, more, **tensors)["rope_parameters"])

    assert scaled({}) == {"rope_type": "default", "rope_theta": 10_000.0}
    assert scaled({"rope.scaling.factor": 2.0})["rope_type"] == "linear"  # llama.cpp's kind where none is stated
    assert scaled({}, rope_freqs=Shaped(4, values=[1.0] * 4))["rope_type"] == "default"
    both = scaled({"rope.scaling.factor": 2.0}, rope_freqs=Shaped(4, values=[1.0, 2.0, 4.0, 8.0]))
    assert both["short_factor"] == both["long_factor"] == [2.0, 4.0, 8.0, 16.0]
    assert both["attention_factor"] == 1
    assert scaled({"rope.scaling.attn_factor": 1.5})["attention_factor"] == 1.5
    assert scaled({"rope.scaling.factor": 2.0}, "phi3")["rope_type"] == "longrope"  # the only kind of its class
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_beta_fast": 16.0}
    assert scaled(yarn)["beta_fast"] == 16
    assert "attention_factor" not in scaled(yarn)
    assert scaled({**yarn, "rope.scaling.yarn_attn_factor": 0.5})["attention_factor"] == 0.5
    assert scaled({**yarn, "rope.scaling.attn_factor": 2.0})["attention_factor"] == pytest.approx(
        2 * (1 + 0.1 * math.log(4))
    )
    assert scaled({"rope.dimension_count": 4}, "phi3")["partial_rotary_factor"] == 0.5
    assert scaled({}, "stablelm")["partial_rotary_factor"] == 1


# other keys


HARMLESS = {  # whatever they say, nothing else is computed
    "rope.scaling.original_context_length",  # where positions are not scaled
    "use_parallel_residual",  # a Stablelm's tensors say so
    "attention.sliding_window_pattern",  # 7 of two layers is the same as 6; below
}


@pytest.mark.parametrize("architecture", hyperparameters.KNOWN)
def test_no_key_that_gguf_names_is_ignored(architecture: str) -> None:
    """With a value unlike any default, each is refused, or the model is another one."""
    before = attributes(architecture)
    assert len(NAMED) > 80
    for key in {*NAMED, "never.heard.of"} - HARMLESS:
        for value in (7, 0.375, True, "something", [7, 3]):
            if (key, value) == ("rope.scaling.finetuned", True) or (key, value) == ("attention.causal", True):
                continue
            try:
                found = attributes(architecture, {key: value})
            except BadFile:
                continue
            assert found != before, (key, value)


@pytest.mark.parametrize(
    ("architecture", "more", "wanted"),
    [
        ("gemma2", {"attn_logit_softcapping": 10.0, "attention.sliding_window": 16}, {"attn_logit_softcapping": 10.0}),
        ("gemma2", {"final_logit_softcapping": 0.0}, {"final_logit_softcapping": None}),
        ("gemma2", {"attention.key_length": 24}, {"head_dim": 24, "query_pre_attn_scalar": 24}),
        ("gemma3", {"attention.sliding_window": 16}, {"sliding_window": 16}),
        ("gemma3", {"attention.sliding_window_pattern": 2, "attention.sliding_window": 16}, {"sliding_window": 16}),
        ("granite", {}, {"attention_multiplier": 0.25, "logits_scaling": 8.0, "residual_multiplier": 0.22}),
        ("starcoder2", {"rope.freq_base": 1e6}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("qwen2moe", {}, {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_experts": 4}),
        ("qwen3moe", {"attention.key_length": 16}, {"head_dim": 16, "norm_topk_prob": True}),
        ("nemotron", {"rope.dimension_count": 4}, {"norm_eps": 1e-5, "head_dim": 8}),
        ("llama", {"attention.head_count_kv": [2, 2]}, {"num_key_value_heads": 2}),
        ("llama", {"vocab_size": 40}, {"vocab_size": 40}),
        ("olmo", {"attention.clamp_kqv": 0.0}, {"clip_qkv": None}),
        ("mamba", {}, {"expand": 2, "intermediate_size": 64}),
        ("falcon", {}, {"ffn_hidden_size": 128, "bias": False}),
    ],
)
def test_keys_become_attributes(architecture: str, more: dict[str, Any], wanted: dict[str, Any]) -> None:
    found = attributes(architecture, more)
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("architecture", "more", "match"),
    [
        ("llama", {"expert_count": 8}, r"llama\.expert_count = 8, which is not translated"),
        ("llama", {"logit_scale": 0.5}, r"llama\.logit_scale = 0\.5, which is not translated"),
        ("llama", {"attention.causal": False}, "attention.causal = False"),
        ("llama", {"attention.head_count_kv": [2, 4]}, "a number for each layer"),
        ("llama", {"rope.dimension_count": 4, "attention.key_length": 8}, r"rope\.dimension_count = 4, where"),
        ("olmo", {"rope.dimension_count": 4}, r"olmo\.rope\.dimension_count = 4, where"),
        (
            "olmo",
            {"attention.layer_norm_epsilon": 1e-3},
            "layer_norm_epsilon = 0.001, where transformers' olmo has 1e-05",
        ),
        ("qwen2", {"attention.key_length": 16, "attention.value_length": 16}, "has heads of 8"),
        ("qwen3", {"attention.value_length": 4}, "value_length = 4, where its keys have 8"),
        ("llama", {"block_count": 10**9}, "says it has 1000000000 layers, and holds 4 tensors"),
        ("llama", {"embedding_length": "32"}, "is no number of that kind"),
        ("llama", {"attention.head_count": 0}, "counts nothing"),
        ("falcon", {"attention.head_count_kv": 2}, "lies in an order of its own"),
        ("mamba", {"ssm.dt_b_c_rms": True}, "dt_b_c_rms = True, which is not translated"),
        ("bloom", {"feed_forward_length": 64}, "where transformers' bloom has 128"),
    ],
)
def test_what_is_not_translated_is_refused_by_name(architecture: str, more: dict[str, Any], match: str) -> None:
    with pytest.raises(BadFile, match=match):
        attributes(architecture, more)


def test_a_missing_key_is_named() -> None:
    facts = stated("llama")
    del facts["llama.attention.layer_norm_rms_epsilon"]
    with pytest.raises(BadFile, match=r"x\.gguf does not state llama\.attention\.layer_norm_rms_epsilon"):
        hyperparameters.attributes("x.gguf", facts, TENSORS)


def test_layers_of_gemma_3() -> None:
    more = {"attention.sliding_window": 16, "rope.scaling.factor": 8.0, "rope.freq_base": 1e6}
    found = attributes("gemma3", {**more, "attention.sliding_window_pattern": [False, True]})
    assert found["layer_types"] == ["full_attention", "sliding_attention"]
    assert found["rope_parameters"] == {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    assert attributes("gemma3")["layer_types"] == ["full_attention"] * 2  # no window stated


@pytest.mark.parametrize(
    ("facts", "match"),
    [
        ({"general.type": "adapter"}, "holds no model but 'adapter'"),
        ({"adapter.type": "lora"}, "holds no model"),
        ({"general.type": "mmproj"}, "holds no model but 'mmproj'"),
        ({"split.count": 3}, "is one of 3 parts: join them"),
    ],
)
def test_what_is_no_whole_model_is_refused(facts: dict[str, Any], match: str) -> None:
    with pytest.raises(BadFile, match=match):
        hyperparameters.require_model("x.gguf", facts)


# architectures whose tensors transformers places


def config_of(architecture: str) -> Any:
    if architecture == "gemma2":
        caps = {"attn_logit_softcapping": 10.0, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 24}
        return transformers.Gemma2Config(**SHAPE, head_dim=24, sliding_window=16, tie_word_embeddings=True, **caps)
    if architecture == "gemma3":
        own = {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 16, "tie_word_embeddings": True}
        return transformers.Gemma3TextConfig(**{**SHAPE, "num_hidden_layers": 6}, **own)
    if architecture == "starcoder2":
        return transformers.Starcoder2Config(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 1e3})
    if architecture == "qwen3":
        return transformers.Qwen3Config(**SHAPE, head_dim=24)
    if architecture == "stablelm":
        return transformers.StableLmConfig(**SHAPE, partial_rotary_factor=0.5, use_parallel_residual=True)
    if architecture == "nemotron":
        return transformers.NemotronConfig(**SHAPE, norm_eps=1e-3, partial_rotary_factor=0.5)
    return transformers.Qwen2Config(**SHAPE)


MORE: dict[str, dict[str, Any]] = {
    "gemma2": {"attention.key_length": 24, "attention.value_length": 24},
    "gemma3": {"attention.key_length": 24, "attention.value_length": 24},
    "qwen3": {"attention.key_length": 24, "attention.value_length": 24},
    "stablelm": {"rope.dimension_count": 8, "use_parallel_residual": True},
    "nemotron": {"rope.dimension_count": 8, "rope.scaling.type": "none"},
}


def made(architecture: str, folder: Path) -> Checkpoint:
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config_of(architecture))
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, so that a forgotten one shows
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return Checkpoint("x", folder, "x")


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma2", "gemma3", "starcoder2", "stablelm", "nemotron"])
def test_a_file_that_transformers_places_is_its_folder(architecture: str, tmp_path: Path, cache: Path) -> None:
    folder = made(architecture, tmp_path / "model")
    path = by_converter(tmp_path / "model", tmp_path / "x.gguf", architecture, MORE.get(architecture, {}))
    torch.testing.assert_close(logits(read(path)), logits(folder), rtol=1e-5, atol=2e-5)


def test_a_tensor_that_no_name_fits_is_not_dropped(tmp_path: Path, cache: Path) -> None:
    made("qwen2", tmp_path / "model")
    path = by_converter(tmp_path / "model", tmp_path / "x.gguf", "qwen2")
    with pytest.raises(BadFile, match="holds 16 numbers more than transformers' Qwen2ForCausalLM has places for"):
        read(rewritten(path, tmp_path / "y.gguf", {}, {"blk.0.attn_q_norm.weight": np.ones(16)}))
    with pytest.raises(BadFile, match=r"have other shapes for .*mlp\.down_proj\.weight"):
        read(rewritten(path, tmp_path / "z.gguf", {"feed_forward_length": 100}))
    save("llama", tmp_path / "llama")
    write.write(Checkpoint("x", tmp_path / "llama", "x"), "F32", tmp_path / "l.gguf")
    with pytest.raises(BadFile, match=r"holds blk\.0\.attn_q_norm\.weight, which has no place"):
        read(rewritten(tmp_path / "l.gguf", tmp_path / "m.gguf", {}, {"blk.0.attn_q_norm.weight": np.ones(16)}))


def test_other_architectures_are_held_to_the_keys_that_transformers_takes() -> None:
    sizes = {"attention.head_count": 4, "embedding_length": 64, "context_length": 64, "block_count": 1}
    known = {"general.architecture": "gpt-oss", **{f"gpt-oss.{key}": value for key, value in sizes.items()}}
    hyperparameters.require_translated("x.gguf", {**known, "gpt-oss.rope.dimension_count": 16}, {})
    for key in ("attention.sliding_window", "rope.scaling.factor", "expert_feed_forward_length"):
        with pytest.raises(BadFile, match=rf"says gpt-oss\.{key} = 32, which is not translated"):
            hyperparameters.require_translated("x.gguf", {**known, f"gpt-oss.{key}": 32}, {})
    with pytest.raises(BadFile, match="holds a 'house' model, which transformers does not read from GGUF"):
        hyperparameters.require_translated("x.gguf", {"general.architecture": "house"}, {})
