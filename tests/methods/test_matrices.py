"""What a model multiplies by: found, quantized whatever class holds it, counted, and left alone by an identity."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from harness.core import catalog
from harness.core.contracts import Arguments, Checkpoint, Method, Scope
from harness.core.errors import HarnessError, IncompleteQuantization
from harness.core.options import Declared
from harness.core.records import Case, Row
from harness.core.specification import parse
from harness.inputs.models import checkpoints, sizes
from harness.inputs.texts import corpora
from harness.methods import absmax_int8, nf4
from harness.methods.quantizing import stored
from harness.methods.quantizing.arguments import layer_lists, reach, resolve, select
from harness.methods.quantizing.codes import Functions, Recipe
from harness.methods.quantizing.weight_method import weight_method
from harness.metrics.measuring.census import census
from harness.report.account import unreached

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.arange(3, 27)[None]
Make = Callable[[], Any]
CONFIGS: dict[str, Make] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=False),
    "llama-tied": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=64, n_embd=32, n_head=4, n_layer=2, n_positions=64),
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=4),
    "gpt-oss": lambda: transformers.GptOssConfig(
        **SMALL, head_dim=8, num_local_experts=4, num_experts_per_tok=2, **SPECIAL
    ),
    "llama4": lambda: transformers.Llama4TextConfig(
        **SMALL, intermediate_size_mlp=64, head_dim=8, num_local_experts=4, **SPECIAL
    ),
    "deepseek-v3": lambda: transformers.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4},
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    ),
    "dbrx": lambda: transformers.DbrxConfig(
        vocab_size=64,
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    ),
    "jetmoe": lambda: transformers.JetMoeConfig(
        **{key: value for key, value in SMALL.items() if "heads" not in key},
        num_key_value_heads=2,
        kv_channels=16,
        num_local_experts=2,
        num_experts_per_tok=2,
    ),
    "recurrent-gemma": lambda: transformers.RecurrentGemmaConfig(
        **{key: value for key, value in SMALL.items() if key != "max_position_embeddings"},
        lru_width=32,
        attention_window_size=32,
        block_types=["recurrent", "attention"],
    ),
    "mamba": lambda: transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8),
}
IDENTITY = weight_method(
    name="identity",
    summary="keeps what it is given",
    bits=32,
    quantize=lambda weight: {"codes": weight.clone()},
    dequantize=lambda kept, shape: kept["codes"].clone(),
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """An architecture's folder, made when it is first asked for."""
    made: dict[str, Checkpoint] = {}

    def checkpoint(name: str) -> Checkpoint:
        if name not in made:
            made[name] = write(CONFIGS[name](), tmp_path_factory.mktemp(name))
        return made[name]

    return checkpoint


def write(config: Any, folder: Path) -> Checkpoint:
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return Checkpoint(f"path:{folder}", folder, "")


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(input_ids=IDS, use_cache=False).logits
    return result


def arguments(method: Method, text: str = "") -> Arguments:
    return resolve(parse(f"{method.name}{text}"), method, "cpu")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_method_that_quantizes_to_nothing_is_the_reference(name: str, saved: Callable[[str], Checkpoint]) -> None:
    checkpoint = saved(name)
    reference = checkpoints.open_model(checkpoint, "fp32", "cpu")
    config = checkpoints.read_config(checkpoint)
    wanted = logits(reference)  # once: a recurrent model keeps its state
    original = dict(checkpoints.sketch_model(config, "fp32").named_modules())
    for part in ("", ":all"):
        given = arguments(IDENTITY, part)
        model = IDENTITY.load(checkpoint, given, "cpu")
        found = census(model, IDENTITY, given, original)
        assert found["matrices"]["share"] == 1.0
        assert found["matrices"]["left"] == {}
        assert found["elements"] == sum(parameter.numel() for parameter in reference.parameters())
        predicted = sizes.predict(config, IDENTITY, given)
        assert {key: int(predicted[key]) for key in sizes.measure(model)} == sizes.measure(model)
        assert torch.equal(logits(model), wanted)


class Multiplied(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Which of some tensors operations multiply by as by matrices, by their storages."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if "mm" in func.__name__.partition(".")[0] or "linear" in func.__name__:
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor) and tensor.dim() > 1:
                    self.storages.add(tensor.untyped_storage()._cdata)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "gpt2"])
def test_matrices_are_what_forwards_multiply_by(name: str, saved: Callable[[str], Checkpoint]) -> None:
    model: Any = checkpoints.open_model(saved(name), "fp32", "cpu")
    seen = Multiplied()
    with torch.no_grad(), seen:
        model(input_ids=IDS, use_cache=False)
    counted, multiplied = set(), set()
    for first, names in stored.owners(model).items():
        for module, key in (stored.place(model, one) for one in names):
            weight = module._parameters[key]
            assert weight is not None
            counted |= {first} if stored.is_matrix(module, key, weight.shape) else set()
            multiplied |= {first} if weight.untyped_storage()._cdata in seen.storages else set()
    assert counted == multiplied
    known = {id(weight) for module in model.modules() for _, weight in stored.held(module)}
    for key, other in model.named_parameters():  # biases are added to a product by the product itself
        if id(other) not in known and other.dim() > 1 and "bias" not in key:
            assert other.untyped_storage()._cdata not in seen.storages, key


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "llama4", "dbrx", "jetmoe", "gpt2"])
def test_every_expert_is_a_matrix_with_scales_of_its_own(name: str, saved: Callable[[str], Checkpoint]) -> None:
    """absmax-int8 by hand: a scale an output channel of each expert, whichever way it lies."""
    checkpoint = saved(name)
    plain: Any = checkpoints.open_model(checkpoint, "fp32", "cpu")
    model = absmax_int8.METHOD.load(checkpoint, arguments(absmax_int8.METHOD), "cpu")
    lies_in_out = {
        "gpt-oss": ("proj",),
        "llama4": ("gate_up_proj", "experts.down_proj"),
        "gpt2": ("c_",),
        "dbrx": ("w2",),
    }
    with torch.no_grad():
        for key, weight in plain.named_parameters():
            if not (".layers." in key or ".blocks." in key or ".h." in key) or weight.dim() < 2 or "bias" in key:
                continue
            packed = weight.unflatten(0, (4, -1)) if ".experts.mlp." in key else weight  # of DBRX
            turned = any(part in key for part in lies_in_out.get(name, ())) and (packed.dim() == 3 or name == "gpt2")
            step = packed.abs().amax(-2 if turned else -1, keepdim=True) / 127
            packed.copy_((packed / step).round() * step)
    assert torch.allclose(logits(model), logits(plain), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits(model), logits(checkpoints.open_model(checkpoint, "fp32", "cpu")), atol=1e-5)


def test_blocks_do_not_straddle_experts() -> None:
    """63 x 1 weights an expert: a last partial block each."""
    torch.manual_seed(0)
    model = nn.Module()
    model.experts = nn.Module()
    model.experts.register_parameter("up", nn.Parameter(torch.randn(3, 9, 7)))
    plain = model.experts.get_parameter("up").detach().clone()
    recipe = Recipe("nf4", nf4.CODES, {"block": 64})
    stored.apply(model, recipe, ["experts.up"])
    (weight,) = stored.weights(model)
    for place in range(3):
        alone = nn.Sequential(nn.Linear(7, 9, bias=False))
        alone[0].weight.data = plain[place]
        stored.apply(alone, recipe, ["0"])
        assert torch.equal(weight.dequantize()[place], next(stored.weights(alone)).dequantize())
    assert (weight.name, weight.elements, weight.storage) == ("experts.up", 189, 3 * (32 + 4) + 16 * 4)
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    assert kept["experts.up_store.codes"].shape == (3, 32)
    before = weight.dequantize()
    for tensor in model.state_dict().values():
        tensor.zero_()
    model.load_state_dict(kept)
    assert torch.equal(next(stored.weights(model)).dequantize(), before)


def test_experts_are_unpacked_once_a_forward_and_never_outside_one() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.ones(3, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return sum((x @ self.up[at] for at in range(3)), start=x)

    calls: list[int] = []

    def dequantize(kept: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
        calls.append(1)
        return kept["codes"]

    model = nn.Sequential(Experts())
    stored.apply(model, Recipe("counted", Functions(lambda weight: {"codes": weight}, dequantize)), ["0.up"])
    assert torch.equal(model(torch.ones(1, 4)), torch.full((1, 4), 13.0))
    assert len(calls) == 3
    assert model[0].up.shape == (3, 4, 4)
    assert len(calls) == 6


@pytest.mark.parametrize("text", ["absmax-int8-w8a8", "absmax-int8:compute=bf16"])
def test_rounded_activations_need_linear_layers(text: str, saved: Callable[[str], Checkpoint]) -> None:
    method = catalog.methods()[parse(text).name]
    given = resolve(parse(text), method, "cpu")
    with pytest.raises(
        HarnessError, match=r"rounds what linear layers are given; model\.layers\.0\.mlp\.\S+ \(Mixtral"
    ):
        method.load(saved("mixtral"), given, "cpu")
    method.load(saved("mixtral"), replace(given, scope=Scope("attention")), "cpu")


def mixtral_counts() -> tuple[int, int]:
    """Matrix elements of the two layers: attention, and experts with their router."""
    return 2 * (2 * 32 * 32 + 2 * 16 * 32), 2 * (4 * 3 * 32 * 64 + 4 * 32)


def test_what_a_library_leaves_is_counted_and_said(saved: Callable[[str], Checkpoint]) -> None:
    method, (attention, experts) = catalog.methods()["bnb-nf4"], mixtral_counts()
    checkpoint, given = saved("mixtral"), arguments(method)
    model = method.load(checkpoint, given, "cpu")
    original = checkpoints.sketch_model(checkpoints.read_config(checkpoint), "fp32")
    found = census(model, method, given, dict(original.named_modules()))
    share = attention / (attention + experts)
    assert found["matrices"] == {
        "stack": "model.layers",
        "named": attention + experts,
        "reached": attention,
        "share": share,
        "left": {
            "model.layers.*.mlp.gate": 2 * 4 * 32,
            "model.layers.*.mlp.experts.gate_up_proj": 2 * 4 * 2 * 32 * 64,
            "model.layers.*.mlp.experts.down_proj": 2 * 4 * 32 * 64,
        },
        "elsewhere": {"lm_head": 64 * 32},
    }
    quantized = sum(weight.storage for weight in method.quantized(model))
    assert found["bits_per_weight"] == pytest.approx(8 * (quantized + 4 * experts) / (attention + experts))
    note = unreached(Row.of(Case("m", "bnb-nf4", "", "", "memory.storage", "cpu"), census=found))
    assert note.startswith(
        f"bnb-nf4 quantized {share:.1%} of the weights that its scope names and left model.layers.*."
    )
    ours = nf4.METHOD.load(checkpoint, arguments(nf4.METHOD), "cpu")
    found = census(ours, nf4.METHOD, arguments(nf4.METHOD), dict(original.named_modules()))
    assert (found["matrices"]["share"], found["quantized_elements"]) == (1.0, attention + experts)
    assert not unreached(Row.of(Case("m", "nf4", "", "", "memory.storage", "cpu"), census=found))


def test_ours_that_reaches_too_little_is_an_error_before_it_works(saved: Callable[[str], Checkpoint]) -> None:
    method = catalog.methods()["gptq-int4"]
    given = replace(arguments(method), values={**arguments(method).values, "block": 16})
    with pytest.raises(
        IncompleteQuantization,
        match=r"gptq-int4 reaches 11\.\d% of the matrices that its scope names, and leaves model\.layers\.\*\.mlp\.e",
    ):
        method.load(saved("mixtral"), given, "cpu")


def gemma3() -> Any:
    text = {**SMALL, "head_dim": 8, "sliding_window": 16}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2}
    return transformers.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )


def test_a_multimodal_model_s_layers_are_its_text_model_s() -> None:
    model = checkpoints.sketch_model(gemma3(), "fp32")
    assert layer_lists(model) == {"model.language_model.layers": 2}
    names = select(model, Scope())
    assert len(names) == 14
    assert all(name.startswith("model.language_model.layers.") for name in names)
    found = reach(model, Scope(), names)
    assert (found["share"], found["stack"]) == (1.0, "model.language_model.layers")
    assert set(found["elsewhere"]) == {"lm_head", "model.vision_tower", "model.multi_modal_projector"}
    assert found["elsewhere"]["lm_head"] == 64 * 32


def test_layers_are_found_by_their_role() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

    class Model(nn.Module):
        def __init__(self, **parts: nn.Module) -> None:
            super().__init__()
            for name, part in parts.items():
                self.add_module(name, part)

        def get_decoder(self) -> nn.Module:
            return self.get_submodule("text")

    def stack(count: int, kind: type[nn.Module] = Part) -> nn.ModuleList:
        return nn.ModuleList(kind() for _ in range(count))

    # a longer tower beside the decoder, a deeper encoder inside of it, a list of single matrices
    singles = nn.ModuleList(nn.Linear(2, 2) for _ in range(9))
    text = Model(embed=Model(encoder=Model(layers=stack(7))), layers=stack(3), heads=singles)
    assert layer_lists(Model(tower=Model(layers=stack(12)), text=text)) == {"text.layers": 3}
    # one part of each layer a list, as in XLM; norms are no parts
    parts = Model(attentions=stack(2), norms=nn.ModuleList(nn.LayerNorm(2) for _ in range(2)), ffns=stack(2))
    model = Model(text=parts)
    assert layer_lists(model) == {"text.attentions": 2, "text.ffns": 2}
    assert select(model, Scope("attention", (1, 1))) == ["text.attentions.1.inner"]
    assert len(select(model, Scope())) == 4


def untied(folder: Path) -> tuple[Checkpoint, list[int]]:
    """A Llama whose file holds another head than the embedding though its config says tied; and a text's token ids."""
    wider = {**SMALL, "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 256}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**wider, tie_word_embeddings=False)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                assert "norm" in name
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.get_input_embeddings().weight.normal_(0, 0.6)
    model.save_pretrained(folder)
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stated, "tie_word_embeddings": True}))
    (folder / "tokenizer.json").write_text("{}")
    (text,) = corpora.read(parse("lee"), Declared(folder)).documents
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator([text[:60000]], trainer)
    return Checkpoint(f"path:{folder}", folder, ""), trained.encode(text[:9000]).ids[:1024]


def perplexity(model: Any, ids: list[int], width: int = 128) -> float:
    losses = []
    for start in range(0, len(ids), width):
        window = torch.tensor([ids[start : start + width]])
        with torch.inference_mode():
            found = model(input_ids=window, use_cache=False).logits[0, :-1].double()
        losses.append(nn.functional.cross_entropy(found, window[0, 1:], reduction="none"))
    return float(torch.cat(losses).mean().exp())


def test_a_head_of_its_own_is_quantized_beside_as_the_reference_has_it(tmp_path: Path) -> None:
    checkpoint, ids = untied(tmp_path)
    config = checkpoints.read_config(checkpoint)
    plain: Any = checkpoints.open_model(checkpoint, "fp32", "cpu")
    assert plain.lm_head.weight is not plain.model.embed_tokens.weight
    method = absmax_int8.METHOD
    model: Any = method.load(checkpoint, arguments(method), "cpu")
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    assert torch.equal(model.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    assert perplexity(model, ids) == pytest.approx(852.279, abs=1e-3)
    for each, given, loaded in (
        (method, arguments(method), model),
        (method, arguments(method, ":all"), method.load(checkpoint, arguments(method, ":all"), "cpu")),
        (catalog.methods()["fp32"], Arguments("fp32"), plain),
    ):
        predicted = sizes.predict(config, each, given)
        assert {key: int(predicted[key]) for key in sizes.measure(loaded)} == sizes.measure(loaded)
    assert torch.equal(logits(IDENTITY.load(checkpoint, arguments(IDENTITY, ":all"), "cpu")), logits(plain))


@pytest.mark.parametrize("name", ["deepseek-v3", "gpt-oss"])
def test_bytes_in_half_precision_are_those_that_are_loaded(name: str, saved: Callable[[str], Checkpoint]) -> None:
    """Some of an architecture's parameters stay fp32."""
    config = checkpoints.read_config(saved(name))
    for method in (catalog.methods()["bf16"], nf4.METHOD):
        given = replace(arguments(method), dtype="bf16")
        measured = sizes.measure(method.load(saved(name), given, "cpu"))
        predicted = sizes.predict(config, method, given)
        assert {key: int(predicted[key]) for key in measured} == measured


def test_a_bias_that_is_tied_lies_in_both_places(tmp_path: Path) -> None:
    """A head's bias under two names, one of them in the file."""
    config = transformers.BertConfig(
        **{key: value for key, value in SMALL.items() if key != "num_key_value_heads"}, is_decoder=True
    )
    checkpoint = write(config, tmp_path)
    model = IDENTITY.load(checkpoint, arguments(IDENTITY), "cpu")
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model), logits(checkpoints.open_model(checkpoint, "fp32", "cpu")))


def _names(model: nn.Module) -> Iterator[str]:
    yield from (weight.name for weight in stored.weights(model))


def test_a_quantized_model_gives_the_same_selection(saved: Callable[[str], Checkpoint]) -> None:
    for name in ("mixtral", "jetmoe", "recurrent-gemma"):
        model = checkpoints.sketch_model(CONFIGS[name](), "fp32")
        for part in ("mlp", "linear", "all"):
            before = select(model, Scope(part))
            quantized = checkpoints.sketch_model(CONFIGS[name](), "fp32")
            nf4.METHOD.sketch(quantized, Arguments("fp32", Scope(part), {"block": 64}))
            assert select(quantized, Scope(part)) == before
            assert sorted(_names(quantized)) == sorted(before)
