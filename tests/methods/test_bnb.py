"""The bitsandbytes options, skip list, layouts and noise filter; no checkpoint is read."""

import copy
import inspect
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, LlamaConfig, OlmoConfig, Phi3Config
from transformers.pytorch_utils import Conv1D

from harness.core.contracts import Arguments
from harness.core.errors import HarnessError, UnknownName
from harness.methods.bitsandbytes import METHODS
from harness.methods.quantizing import bnb

INT8, NF4, NF4_DQ = bnb.Format("llm_int8"), bnb.Format("nf4"), bnb.Format("nf4", double=True)


def on_meta(config: Any) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model


def llama(tied: bool) -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    return on_meta(LlamaConfig(vocab_size=96, tie_word_embeddings=tied, **sizes))


def test_importing_the_methods_imports_no_torch() -> None:
    code = (
        "import sys; import harness.methods.bitsandbytes; "
        "print(sorted({'torch', 'transformers', 'bitsandbytes'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_declarations() -> None:
    assert [method.name for method in METHODS] == ["bnb-int8", "bnb-fp4", "bnb-nf4", "bnb-nf4-dq"]
    assert [method.bits for method in METHODS] == [8, 4, 4, 4]
    assert [method.batch_invariant for method in METHODS] == [False, True, True, True]
    assert [sorted(method.parameters) for method in METHODS] == [["threshold"], *3 * [["compute"]]]
    assert METHODS[0].parameters["threshold"].default == 6.0


@pytest.mark.parametrize("format", [INT8, NF4, NF4_DQ])
def test_every_option_of_the_library_is_written_out(format: bnb.Format) -> None:
    known = set(inspect.signature(BitsAndBytesConfig.__init__).parameters) - {"self", "kwargs"}
    assert set(bnb.options(format, Arguments("fp32"), ["lm_head"])) == known


def test_options_reach_the_configuration() -> None:
    config = bnb.configuration(bnb.options(NF4_DQ, Arguments("fp16", values={"compute": "bf16"}), ["lm_head"]))
    assert config.quantization_method() == "nf4"
    assert config.bnb_4bit_use_double_quant is True
    assert config.bnb_4bit_compute_dtype is torch.bfloat16
    assert config.bnb_4bit_quant_storage is torch.uint8
    assert config.llm_int8_skip_modules == ["lm_head"]


def test_compute_dtype_follows_the_models() -> None:
    values = {"compute": METHODS[2].parameters["compute"].default}
    chosen = [bnb.options(NF4, Arguments(dtype, values=values), []) for dtype in ("fp32", "bf16", "fp16")]
    assert [each["bnb_4bit_compute_dtype"] for each in chosen] == ["float32", "bfloat16", "float16"]


def test_whole_threshold_is_passed_as_float() -> None:
    config = bnb.configuration(bnb.options(INT8, Arguments("fp16", values={"threshold": 4}), []))
    assert (config.quantization_method(), config.llm_int8_threshold) == ("llm_int8", 4.0)
    assert isinstance(config.llm_int8_threshold, float)


def test_misspelt_option_is_an_error() -> None:
    chosen = bnb.options(NF4, Arguments("fp32"), [])
    chosen["bnb_4bit_qant_type"] = chosen.pop("bnb_4bit_quant_type")
    with pytest.raises(UnknownName, match=r"'bnb_4bit_qant_type'; did you mean 'bnb_4bit_quant_type'\?"):
        bnb.configuration(chosen)


def test_unknown_quantization_type_is_an_error() -> None:
    chosen = bnb.options(bnb.Format("nf5"), Arguments("fp32"), [])
    with pytest.raises(UnknownName, match=r"unknown 4-bit quantization type 'nf5'; did you mean 'nf4'\?"):
        bnb.configuration(chosen)


def test_what_a_processor_s_kernel_cannot_lay_out_is_said_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleDict({"good": nn.Linear(64, 32, device="meta"), "bad": Conv1D(50, 64), "short": nn.Linear(32, 64)})
    bnb.refuse_unpackable(model, ["good", "bad"])  # where no processor is so particular
    monkeypatch.setattr(functional, "has_avx512bf16", lambda: True)
    bnb.refuse_unpackable(model, ["good"])
    with pytest.raises(
        HarnessError, match="pieces of 32 outputs by 64 inputs, and bad has 50 by 64: a limit of the libr"
    ):
        bnb.refuse_unpackable(model, ["good", "bad"])
    with pytest.raises(HarnessError, match="and short has 64 by 32"):
        bnb.refuse_unpackable(model, ["short"])


def test_skip_list_holds_head_and_tied_embeddings() -> None:
    assert bnb.kept(llama(tied=False)) == ["lm_head"]
    assert bnb.kept(llama(tied=True)) == ["lm_head", "model.embed_tokens"]
    gpt2 = on_meta(GPT2Config(n_embd=64, n_head=4, n_layer=1, vocab_size=96))
    assert bnb.kept(gpt2) == ["lm_head", "transformer.wte"]


def test_targets_are_the_decoders_projections() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    counts = {
        "llama": (llama(tied=True), 7),
        "olmo": (on_meta(OlmoConfig(vocab_size=96, **sizes)), 7),
        "phi3": (on_meta(Phi3Config(vocab_size=96, pad_token_id=0, **sizes)), 4),
        "gpt2": (on_meta(GPT2Config(n_embd=64, n_head=4, n_layer=2, vocab_size=96)), 4),
    }
    for name, (model, a_layer) in counts.items():
        found = bnb.targets(model, Arguments("fp32"))
        assert len(found) == 2 * a_layer, name
        assert not any("lm_head" in target for target in found), name


def test_targets_are_the_same_after_quantization() -> None:
    model = llama(tied=False)
    before = bnb.targets(model, Arguments("fp32"))
    bnb.sketch(NF4, model, Arguments("fp32"))
    assert [weight.name for weight in bnb.quantized(model)] == bnb.targets(model, Arguments("fp32")) == before


@pytest.mark.parametrize(
    ("format", "shape", "expected"),
    [
        # (50, 63): 3150 weights, 1575 bytes of codes, 50 blocks of which one is partial
        (NF4, (50, 63), 1575 + 4 * 50 + 4 * 16),
        (NF4_DQ, (50, 63), 1575 + 50 + 4 * 1 + 4 * 16 + 4 * 256 + 4),
        # (257, 64): 257 blocks, so that nested absmax takes a second block
        (NF4_DQ, (257, 64), 257 * 32 + 257 + 4 * 2 + 4 * 16 + 4 * 256 + 4),
        (INT8, (50, 63), 3150 + 4 * 50),
    ],
)
def test_sketched_storage_by_hand(format: bnb.Format, shape: tuple[int, int], expected: int) -> None:
    chosen = bnb.options(format, Arguments("fp32"), [])
    for plain in (nn.Linear(shape[1], shape[0], device="meta"), Conv1D(*shape).to("meta")):
        model = nn.Sequential(bnb.sketched(plain, chosen))
        (weight,) = bnb.quantized(model)
        assert (weight.kind, weight.elements) == (type(plain).__name__, shape[0] * shape[1])
        assert weight.storage == expected


def linear_4bit(weight: torch.Tensor, double: bool) -> Any:
    """bitsandbytes' own module for a weight (out, in)."""
    module = bitsandbytes.nn.Linear4bit(
        *weight.shape[::-1], bias=False, quant_type="nf4", compress_statistics=double, compute_dtype=weight.dtype
    )
    module.weight = bitsandbytes.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=double, module=module
    )
    module.source_cls = nn.Linear
    return module.to("cpu").eval()


@pytest.mark.parametrize("double", [False, True])
def test_weight_can_be_read_after_the_library_repacked_it(double: bool) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))  # (out, in)
    module = linear_4bit(weight, double)
    before = bnb.dequantize_4bit(module)  # (out, in)
    scales = copy.deepcopy(module.weight.quant_state)
    module.weight.data, module.weight.quant_state = functional._convert_weight_packed_for_cpu(
        module.weight.data, module.weight.quant_state
    )
    packed_absmax = module.weight.quant_state.absmax.clone()
    after = bnb.dequantize_4bit(module)

    absmax = scales.absmax
    if double:
        absmax = functional.dequantize_blockwise(scales.absmax, scales.state2) + scales.offset
    ratio = (absmax.bfloat16().float() / absmax).repeat_interleave(64).reshape(64, 128)  # of each weight's scale
    torch.testing.assert_close(after, before * ratio, rtol=1e-6, atol=0)
    assert not torch.equal(after, before)
    torch.testing.assert_close(module.weight.quant_state.absmax, packed_absmax, rtol=0, atol=0)
    assert module.weight.quant_state.packing_format_for_cpu is True


def test_quiet_counts_what_it_filters_and_passes_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    line = "MatMul8bitLt: inputs will be cast from torch.float32 to float16 during quantization"
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    with bnb.quiet() as counted:
        for _ in range(3):
            logger.warning("MatMul8bitLt: inputs will be cast from %s to float16 during quantization", torch.float32)
        logger.warning("something else")
    assert counted == {line: 3}
    assert [record.getMessage() for record in caplog.records] == ["something else"]
    logger.warning(line)
    assert len(caplog.records) == 2


def test_quiet_counts_warnings_too() -> None:
    line = "MatMul8bitLt: inputs will be cast from torch.float32 to float16 during quantization"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with bnb.quiet() as counted:
            warnings.warn(line, UserWarning, stacklevel=1)
            warnings.warn(line, UserWarning, stacklevel=1)
            warnings.warn("something else", UserWarning, stacklevel=1)
        warnings.warn(line, UserWarning, stacklevel=1)
    assert counted == {line: 2}
    assert [str(warning.message) for warning in seen] == ["something else", line]


def test_quiet_over_a_real_forward(caplog: pytest.LogCaptureFixture) -> None:
    module = bitsandbytes.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False, threshold=6.0)
    module = module.to("cpu").eval()
    with bnb.quiet() as counted, torch.inference_mode():
        module(torch.ones(2, 64))
        module(torch.ones(2, 64))
    assert sum(counted.values()) == 2
    assert not caplog.records


def test_a_function_that_bitsandbytes_marks_for_compiling_is_compiled_at_its_first_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: list[dict[str, Any]] = []

    def compiler(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiled.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compiler)
    double = bnb._marks(dynamic=False)(lambda value: 2 * value)
    plain = bnb._marks(abs)
    assert not compiled
    assert (double(3), double(4), plain(-1)) == (6, 8, 1)
    assert compiled == [{"dynamic": False}, {}]


def test_importing_bitsandbytes_leaves_the_compiler_in_its_place() -> None:
    before = torch.compile
    bnb.preload()
    assert torch.compile is before


def test_int8_alone_says_that_a_card_multiplies_in_fp16() -> None:
    assert {method.name: dict(method.notes) for method in METHODS if method.notes} == {
        "bnb-int8": {"cuda": bnb.FP16_PRODUCT}
    }
