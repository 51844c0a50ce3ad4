"""What each latency member feeds the model, from which cache, and what it reports; times come from a script."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from harness.core import catalog
from harness.core.contracts import Checkpoint, Subject, TokenPlan, Window
from harness.core.errors import HarnessError
from harness.core.records import Case, Figure
from harness.core.specification import parse
from harness.core.values import encode
from harness.methods.quantizing.arguments import resolve
from harness.metrics import latency
from harness.metrics.latency import METRIC
from harness.metrics.measuring.devices import Cpu, NoDeviceTime
from harness.metrics.measuring.timing import Work

MEMBERS = {member.name: member for member in METRIC.members}


def llama(context: int = 256, **more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=50, max_position_embeddings=context, eos_token_id=3, **sizes, **more)
    return cast(PreTrainedModel, LlamaForCausalLM(config).eval().requires_grad_(False))


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=256, n_embd=16, n_layer=2, n_head=2, eos_token_id=3)
    return cast(PreTrainedModel, GPT2LMHeadModel(config).eval().requires_grad_(False))


class ScriptedCpu(Cpu):
    """The real CPU, but the seconds come from a script and the works are logged."""

    def __init__(self, seconds: Callable[[int], float] = lambda index: 1.0, apart: float | None = None) -> None:
        super().__init__()
        self.seconds = seconds
        self.apart = apart
        self.repetitions = 0

    def time(self, *works: Work | Callable[[], object]) -> list[float]:
        found = []
        for work in works:
            work()
            found.append(self.seconds(self.repetitions))
            self.repetitions += 1
        return found

    def device_seconds(self, work: Callable[[], object]) -> Any:
        if self.apart is not None:
            work()
        return self.apart


@dataclass
class Fake:
    """Enough of a Subject; asking for a reference that is not needed fails."""

    model: PreTrainedModel
    other: PreTrainedModel | None = None
    device: Cpu = field(default_factory=ScriptedCpu)
    repetitions: int = 4
    method: str = "nf4"
    plan: TokenPlan | None = None

    @property
    def case(self) -> Case:
        return Case("m", self.method, "", "", "latency.prefill", "cpu", "fp32")

    @property
    def reference(self) -> PreTrainedModel:
        assert self.other is not None, "the reference was loaded for nothing"
        return self.other


def measured(fake: Fake, name: str) -> Figure:
    return METRIC.measure(cast(Subject, fake), MEMBERS[name])


@dataclass(frozen=True)
class Forward:
    tokens: tuple[int, ...]
    cached: int  # tokens in the cache before
    logits: int  # positions with logits
    cache_out: bool
    inference: bool


@pytest.fixture
def watch() -> Iterator[Callable[[PreTrainedModel], list[Forward]]]:
    """Log every forward of a model."""
    hooks = []

    def start(model: PreTrainedModel) -> list[Forward]:
        log: list[Forward] = []
        before: list[int] = []

        def pre(module: nn.Module, args: Any, kwargs: Any) -> None:
            cache = kwargs.get("past_key_values")
            before.append(cache.get_seq_length() if cache is not None else 0)

        def post(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            ids = kwargs["input_ids"]
            assert ids.shape[0] == 1  # batch 1
            log.append(
                Forward(
                    tuple(ids[0].tolist()),
                    before[-1],
                    output.logits.shape[1],
                    output.past_key_values is not None,
                    torch.is_inference_mode_enabled(),
                )
            )

        hooks.append(model.register_forward_pre_hook(pre, with_kwargs=True))
        hooks.append(model.register_forward_hook(post, with_kwargs=True))
        return log

    yield start
    for hook in hooks:
        hook.remove()


Watch = Callable[[PreTrainedModel], list[Forward]]


def test_members_and_what_the_family_plans() -> None:
    assert list(MEMBERS) == [f"latency.{kind}" for kind in ("prefill", "decode", "forward", "generate", "evaluation")]
    assert [name for name, member in MEMBERS.items() if member.core] == ["latency.prefill", "latency.decode"]
    assert [name for name, member in MEMBERS.items() if member.textual] == ["latency.evaluation"]
    assert all(member.timed and member.unit == "s" and member.better == "lower" for member in METRIC.members)
    assert METRIC.family == "latency"


@pytest.mark.parametrize("model", [llama, gpt2])
def test_prefill_feeds_128_tokens_and_asks_for_the_last_logits(model: Callable[[], Any], watch: Watch) -> None:
    fake = Fake(model(), model())
    ours, theirs = watch(fake.model), watch(fake.reference)
    figure = measured(fake, "latency.prefill")
    assert {(len(one.tokens), one.cached, one.logits, one.cache_out) for one in ours} == {(128, 0, 1, True)}
    assert {one.tokens for one in ours} == {one.tokens for one in theirs}  # one prompt for both
    assert len({one.tokens for one in ours}) == 1
    assert all(0 <= token < 50 for one in ours for token in one.tokens)
    assert len(set(ours[0].tokens)) > 20  # not one token over and over
    assert all(one.inference for one in ours + theirs)
    assert len(ours) == len(theirs) == 3 + 4  # three warm-up repetitions (a steady clock), four blocks
    assert (figure.detail["prompt_tokens"], figure.detail["new_tokens"]) == (128, 0)


def test_forward_makes_no_cache_and_all_logits(watch: Watch) -> None:
    fake = Fake(llama(), llama())
    log = watch(fake.model)
    measured(fake, "latency.forward")
    assert {(len(one.tokens), one.cached, one.logits, one.cache_out) for one in log} == {(128, 0, 128, False)}


@pytest.mark.parametrize("model", [llama, gpt2])
def test_decode_starts_every_repetition_from_the_same_cache(model: Callable[[], Any], watch: Watch) -> None:
    fake = Fake(model(), model())
    ours, theirs = watch(fake.model), watch(fake.reference)
    figure = measured(fake, "latency.decode")
    for log in (ours, theirs):
        assert (len(log[0].tokens), log[0].cached) == (128, 0)  # the prompt, before any timing
        assert {(len(one.tokens), one.cached, one.logits) for one in log[1:]} == {(1, 128, 1)}
        assert len(log) == 1 + 3 + 4
    assert (figure.detail["prompt_tokens"], figure.detail["new_tokens"]) == (128, 1)


@pytest.mark.parametrize("model", [llama, gpt2])
def test_decode_from_the_cache_gives_what_the_whole_sequence_gives(model: Callable[[], Any]) -> None:
    fake = Fake(model(), method="fp32")
    outputs: list[torch.Tensor] = []
    fake.model.register_forward_hook(lambda module, args, output: outputs.append(output.logits[0, -1].clone()))
    fed: list[torch.Tensor] = []
    fake.model.register_forward_pre_hook(lambda module, args, kwargs: fed.append(kwargs["input_ids"]), with_kwargs=True)
    measured(fake, "latency.decode")
    decoded = [logits for logits, ids in zip(outputs, fed, strict=True) if ids.shape[1] == 1]
    prompt, token = fed[0], next(ids for ids in fed if ids.shape[1] == 1)
    whole = fake.model(input_ids=torch.cat([prompt, token], dim=1)).logits[0, -1]
    for logits in decoded:
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-5)


def test_decode_refuses_a_cache_that_does_not_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import DynamicCache

    monkeypatch.setattr(DynamicCache, "crop", lambda self, count: None)
    with pytest.raises(RuntimeError, match="the cache holds 129 tokens after cropping, not 128"):
        measured(Fake(llama(), llama()), "latency.decode")


def test_generate_makes_64_tokens_after_32_and_ignores_the_end_of_text(watch: Watch) -> None:
    fake = Fake(llama(), llama(), repetitions=10)
    log = watch(fake.model)
    figure = measured(fake, "latency.generate")
    assert len(log) == (3 + 6) * 64  # three warm-up repetitions and six blocks, 64 forwards each
    first = log[:64]
    assert (len(first[0].tokens), first[0].cached) == (32, 0)
    assert [(len(one.tokens), one.cached) for one in first[1:]] == [(1, 32 + step) for step in range(63)]
    assert (figure.detail["prompt_tokens"], figure.detail["new_tokens"], figure.count) == (32, 64, 6)


def test_generate_is_greedy_as_transformers_is(watch: Watch) -> None:
    fake = Fake(llama(), method="fp32", repetitions=1)
    log = watch(fake.model)
    measured(fake, "latency.generate")
    first = list(log[:64])
    prompt = torch.tensor([first[0].tokens])
    ours = [one.tokens[0] for one in first[1:]]
    theirs = fake.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    assert ours == theirs[0, 32:-1].tolist()


def test_generate_goes_on_behind_the_end_of_text(watch: Watch) -> None:
    model = llama(tie_word_embeddings=False)
    cast(Any, model).lm_head.weight.zero_()  # all logits equal: argmax is token 0
    model.config.eos_token_id = 0
    fake = Fake(model, method="fp32", repetitions=1)
    log = watch(fake.model)
    measured(fake, "latency.generate")
    assert {one.tokens for one in log if one.cached} == {(0,)}
    assert len(log) == (3 + 3 + 1 + 1) * 64


@pytest.mark.parametrize(
    ("name", "prompt", "new"),
    [
        ("latency.prefill", 40, 0),
        ("latency.forward", 40, 0),
        ("latency.decode", 39, 1),
        ("latency.generate", 32, 8),
    ],
)
def test_a_short_context_is_filled_and_told(name: str, prompt: int, new: int, watch: Watch) -> None:
    fake = Fake(llama(context=40), llama(context=40), repetitions=1)
    log = watch(fake.model)
    figure = measured(fake, name)
    assert (figure.detail["prompt_tokens"], figure.detail["new_tokens"]) == (prompt, new)
    assert max(len(one.tokens) + one.cached for one in log) <= 40
    assert len(log[0].tokens) == prompt


def test_a_sliding_window_shortens_the_prompt_so_that_the_cache_can_be_cropped(watch: Watch) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(vocab_size=50, sliding_window=32, num_key_value_heads=1, **sizes)
    fake = Fake(MistralForCausalLM(config).eval(), method="fp32")
    log = watch(fake.model)
    assert measured(fake, "latency.decode").detail["prompt_tokens"] == 30
    assert {one.cached for one in log[1:] if len(one.tokens) == 1} == {30}


def seconds_of(candidate: float, reference: float, warm: int = 6) -> Callable[[int], float]:
    """A steady clock: three warm-up repetitions each, then blocks A B, B A, ..."""

    def seconds(index: int) -> float:
        if index < warm:
            return candidate if index < warm // 2 else reference
        block, second = divmod(index - warm, 2)
        return (reference if (block + second) % 2 else candidate) * (1 + 0.001 * block)

    return seconds


def test_the_figure_and_what_is_judged() -> None:
    fake = Fake(llama(), llama(), device=ScriptedCpu(seconds_of(0.2, 0.1)), repetitions=10)
    figure = measured(fake, "latency.prefill")
    assert figure.samples == pytest.approx([0.2 * (1 + 0.001 * block) for block in range(10)])
    assert figure.value == pytest.approx(0.2009)
    assert (figure.unit, figure.count) == ("s", 10)
    assert figure.spread == pytest.approx(0.2 * 0.0045)
    detail = figure.detail
    assert detail["p90"] == pytest.approx(0.2 * 1.0081)
    assert detail["p99"] == pytest.approx(0.2 * 1.00891)
    assert detail["reference_p50"] == pytest.approx(0.10045)
    assert detail["reference_iqr"] == pytest.approx(0.1 * 0.0045)
    assert detail["reference_samples"] == pytest.approx([0.1 * (1 + 0.001 * block) for block in range(10)])
    assert detail["log_ratio"] == pytest.approx(math.log(2))
    assert detail["log_ratio_low"] == pytest.approx(math.log(2))
    assert detail["log_ratio_high"] == pytest.approx(math.log(2))
    assert detail["log_ratio_usable"] is True
    assert 0 < detail["aa_floor"] < 0.0011
    assert detail["blocks"] == 10
    assert detail["warmup"] == {
        "candidate": {"repetitions": 3, "settled": True},
        "reference": {"repetitions": 3, "settled": True},
    }
    assert detail["threads"] == torch.get_num_threads()
    assert "device_seconds" not in detail
    json.dumps(encode(detail), allow_nan=False)


def test_the_wait_policy_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert measured(Fake(llama(), llama()), "latency.prefill").detail["wait_policy"] == "PASSIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert measured(Fake(llama(), llama()), "latency.prefill").detail["wait_policy"] == ""


def test_the_reference_is_timed_against_itself(watch: Watch) -> None:
    fake = Fake(llama(), None, method="fp32", repetitions=6)  # Fake.reference would fail
    log = watch(fake.model)
    figure = measured(fake, "latency.prefill")
    assert len(log) == 2 * (3 + 6)
    assert figure.detail["log_ratio"] == 0.0
    assert len(figure.detail["reference_samples"]) == 6


def test_too_few_repetitions_give_nulls_and_no_nan() -> None:
    figure = measured(Fake(llama(), llama(), repetitions=1), "latency.prefill")
    assert figure.count == 1
    assert figure.detail["aa_floor"] is None
    assert figure.detail["log_ratio_usable"] is False
    json.dumps(figure.detail, allow_nan=False)


def test_device_seconds_stand_apart() -> None:
    fake = Fake(llama(), llama(), device=ScriptedCpu(apart=0.03))
    detail = measured(fake, "latency.prefill").detail
    assert (detail["device_seconds"], detail["reference_device_seconds"]) == (0.03, 0.03)


def test_a_blind_profiler_is_told_and_the_latency_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(llama(), llama())

    def blind(work: object) -> float:
        raise NoDeviceTime("the profiler saw no CUDA kernel")

    monkeypatch.setattr(fake.device, "device_seconds", blind)
    figure = measured(fake, "latency.prefill")
    assert figure.value == 1.0
    assert figure.detail["device_seconds"] is None
    assert figure.detail["device_seconds_error"] == "the profiler saw no CUDA kernel"


def test_evaluation_is_the_whole_pass_of_the_plan() -> None:
    rng = np.random.default_rng(0)
    windows = tuple(Window(rng.integers(0, 50, length), length - 1) for length in (20, 20, 9))
    plan = TokenPlan("chunk:20", "text", "0" * 64, 49, windows, "token")
    fake = Fake(llama(), llama(), plan=plan, repetitions=10)
    fed: list[int] = []
    fake.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    figure = measured(fake, "latency.evaluation")
    assert (fed.count(19), fed.count(8)) == (14, 7)  # one warm-up pass and six blocks; a last id is never fed
    assert (figure.count, figure.detail["prompt_tokens"], figure.detail["new_tokens"]) == (6, 46, 0)
    assert figure.detail["warmup"]["candidate"] == {"repetitions": 1, "settled": False}


def test_one_window_of_an_evaluation_is_profiled() -> None:
    rng = np.random.default_rng(0)
    windows = tuple(Window(rng.integers(0, 50, length), scored) for length, scored in ((9, 8), (20, 19), (30, 0)))
    plan = TokenPlan("chunk:20", "text", "0" * 64, 59, windows, "token")
    fed: list[int] = []
    fake = Fake(llama(), llama(), plan=plan, repetitions=6)
    fake.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    assert "device_tokens" not in measured(fake, "latency.evaluation").detail  # a CPU has no profile
    fed.clear()  # what the engine asked of the model once is not asked again
    measured(fake, "latency.evaluation")
    passes = len(fed)
    fake.device = ScriptedCpu(apart=0.03)
    detail = measured(fake, "latency.evaluation").detail
    assert fed[2 * passes :] == [19]  # the longest that scores anything, once, behind the same passes
    assert (detail["device_seconds"], detail["device_tokens"]) == (0.03, 19)


def test_the_real_clock_sees_a_slower_model() -> None:
    fast, slow = llama(), llama()
    slow.register_forward_hook(lambda module, args, output: torch.linalg.svd(torch.randn(300, 300)) and None)
    detail = measured(Fake(slow, fast, device=Cpu(), repetitions=8), "latency.prefill").detail
    assert detail["log_ratio"] > 0
    assert all(seconds > 0 for seconds in detail["reference_samples"])


def test_declaring_the_metric_imports_no_torch() -> None:
    code = "import sys, harness.metrics.latency; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Operations(TorchDispatchMode):
    """The operations that torch runs, each with the shapes and strides that it is given."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[object, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [one for one in args if isinstance(one, torch.Tensor)]
        self.seen.append((str(function), *((one.shape, one.stride(), one.dtype) for one in tensors)))
        return function(*args, **(kwargs or {}))


def operations(model: Any, work: Callable[[Any], Work]) -> list[tuple[object, ...]]:
    run: Operations
    with torch.no_grad(), Operations() as run:  # in inference mode a linear layer is one operation, its copy unseen
        work(model)()
    return run.seen


@pytest.mark.parametrize("kind", ["prefill", "decode", "forward"])
@pytest.mark.parametrize("name", ["fp32", "bf16", "bnb-int8", "bnb-nf4", "absmax-int8"])
def test_nothing_of_ours_stands_between_a_users_forward_and_the_clock(name: str, kind: str, tmp_path: Path) -> None:
    """The same operations on the same shapes and layouts as in a script that calls from_pretrained itself."""
    config = LlamaConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    asked: dict[str, Any] = {
        "bnb-int8": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": "cpu"},
        "bnb-nf4": {
            "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
            "device_map": "cpu",
        },
    }
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, **asked.get(name, {})).eval()
    method = catalog.methods()[name]
    given = resolve(parse(name), method, "cpu")
    ours = method.load(Checkpoint("m", tmp_path, ""), given, "cpu")
    fake = Fake(cast(PreTrainedModel, ours), cast(PreTrainedModel, ours), method=name)
    _, build = latency.work(cast(Subject, fake), MEMBERS[f"latency.{kind}"])
    if name == "absmax-int8":  # nobody else has it: its head and norms are still those of a plain model
        layers = {key for key, one in ours.named_modules() if type(one).__name__ == "QuantizedLinear"}
        rest = {key: one for key, one in ours.named_parameters() if key.rpartition(".")[0] not in layers}
        assert {key: one.requires_grad for key, one in rest.items()} == dict.fromkeys(rest, True)
        return
    assert operations(ours, build) == operations(plain, build)
    if name == "fp32" and kind == "prefill":  # a frozen head is copied whole: the comparison sees it
        assert operations(ours.requires_grad_(False), build) != operations(plain, build)


def test_other_lengths_are_members_of_their_own() -> None:
    names = [member.name for member in catalog.members_given("latency:prompt=512:generate=128:batch=4")]
    assert names == [
        "latency.prefill:batch=4:prompt=512",
        "latency.decode:batch=4:prompt=512",
        "latency.generate:batch=4:generate=128:prompt=512",
    ]
    assert [member.name for member in catalog.members_given("latency:batch=2")] == [
        "latency.prefill:batch=2",
        "latency.decode:batch=2",
    ]
    assert [member.name for member in catalog.members_given("latency.decode:prompt=128:batch=1")] == ["latency.decode"]
    for name in names:
        found = catalog.member(name)
        assert found is not None
        assert (found.name, found.timed, found.unit) == (name, True, "s")
    assert catalog.member("latency.none:batch=4") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("latency:prompts=4", "unknown argument of latency 'prompts'; did you mean 'prompt=N'"),
        ("latency.prefill:generate=4", "unknown argument of latency.prefill 'generate'"),
        ("latency:quick", "unknown argument of latency 'quick'"),
        ("latency:batch=0", "'0' is no whole number above zero"),
        ("memory:batch=4", "unknown argument of memory 'batch'"),
        ("speed:batch=4", "unknown metric 'speed'"),
    ],
)
def test_an_argument_that_is_none_is_said(text: str, said: str) -> None:
    with pytest.raises(HarnessError, match=said):
        catalog.members_given(text)


def test_asked_lengths_are_what_runs() -> None:
    fake = Fake(llama(), llama(), device=ScriptedCpu(seconds_of(0.2, 0.1, warm=6)), repetitions=6)
    shapes: list[tuple[int, ...]] = []
    fake.model.register_forward_pre_hook(lambda module, args, more: shapes.append(tuple(more["input_ids"].shape)),
                                         with_kwargs=True)  # fmt: skip
    (member,) = catalog.members_given("latency.generate:prompt=20:generate=5:batch=3")
    detail = METRIC.measure(cast(Subject, fake), member).detail
    assert set(shapes) == {(3, 20), (3, 1)}
    assert (detail["prompt_tokens"], detail["new_tokens"], detail["batch"]) == (20, 5, 3)
    assert detail["tokens_per_second"] == pytest.approx(15 / 0.2, rel=0.01)
    assert detail["reference_tokens_per_second"] == pytest.approx(15 / 0.1, rel=0.01)
