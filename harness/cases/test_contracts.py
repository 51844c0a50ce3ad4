"""The contract of every method that the user's own files or installed packages add, and of those named in --methods.

Seven checks that run a method on two small random models: what its author gets for nothing. They need no download and
take seconds. Each takes a `Candidate` and raises AssertionError with what it saw. The models are a Llama (Linear
weights, grouped heads, tied head) and a GPT-2 (Conv1D weights), of widths that blocks of 64 divide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from harness.core import catalog
from harness.core.contracts import Arguments, Checkpoint, Method, QuantizedWeight
from harness.core.errors import HarnessError
from harness.core.specification import Specification, parse
from harness.methods.quantizing import arguments
from harness.plugin import state_of
from harness.run import plan

if TYPE_CHECKING:  # annotations only
    from torch import Tensor, nn

ARCHITECTURES = ("llama", "gpt2")
WORDS = 96  # of the models' vocabulary
TOKENS = 24  # fed in a forward
WINDOWS = 24  # that run two at a time
SPREAD = 0.05  # of the random weights, so that rounding them shows in the logits


def checkpoint(architecture: str, folder: Path) -> Checkpoint:
    """A small random model of an architecture as a plain folder, the same at every call."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    shape: dict[str, Any] = {"vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model: Any
        if architecture == "gpt2":
            model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, **shape))
        else:
            wide = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "tie_word_embeddings": True}
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
            model = LlamaForCausalLM(LlamaConfig(**wide, **heads, **shape))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += SPREAD * torch.randn_like(parameter)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w0").save_pretrained(folder)
    return Checkpoint(f"path:{folder}", folder, "random")


@dataclass(frozen=True)
class Candidate:
    """One method on one of the two models."""

    method: Method
    source: Checkpoint

    @property
    def arguments(self) -> Arguments:
        """The method's defaults on a CPU."""
        return arguments.resolve(Specification(self.method.name), self.method, "cpu")

    def load(self) -> nn.Module:
        """The model under the method."""
        return self.method.load(self.source, self.arguments, "cpu")

    def original(self) -> nn.Module:
        """The model without it."""
        from harness.inputs.models import checkpoints

        return checkpoints.open_model(self.source, "fp32", "cpu")

    def sketch(self) -> nn.Module:
        """The unquantized model without its weights."""
        from harness.inputs.models import checkpoints

        return checkpoints.sketch_model(checkpoints.read_config(self.source), self.arguments.dtype)


def logits(model: Any) -> Tensor:
    """(1, TOKENS, WORDS) of fixed ids."""
    import torch

    with torch.inference_mode():
        output: Tensor = model(input_ids=torch.arange(TOKENS)[None], use_cache=False).logits
    return output


def shape_and_dtype(candidate: Candidate) -> None:
    """Logits of the right shape in the dtype asked for, finite, from a model in eval mode."""
    import torch

    from harness.inputs.models.checkpoints import TORCH_DTYPES

    model = candidate.load()
    assert not model.training, "the loaded model is in training mode: return model.eval()"
    output = logits(model)
    assert output.shape == (1, TOKENS, WORDS), f"logits are {tuple(output.shape)}, not {(1, TOKENS, WORDS)}"
    wanted = TORCH_DTYPES[candidate.arguments.dtype]
    assert output.dtype == wanted, f"logits are {output.dtype}, not {wanted}"
    assert bool(torch.isfinite(output).all()), "logits are not finite"
    fresh, plain = candidate.load(), candidate.original()  # some libraries repack at the first forward
    for weight in candidate.method.quantized(fresh):
        restored = weight.dequantize()
        original = plain.get_submodule(weight.name).get_parameter("weight").detach()
        assert restored.dtype == torch.float32, f"{weight.name} dequantizes to {restored.dtype}, not fp32"
        assert restored.shape == original.shape, (
            f"{weight.name} dequantizes to {tuple(restored.shape)}, not {tuple(original.shape)} as in the model"
        )
        assert bool(torch.isfinite(restored).all()), f"{weight.name} dequantizes to non-finite values"


def determinism(candidate: Candidate) -> None:
    """Two loads give equal logits, and a second forward those of the first."""
    import torch

    first, second = candidate.load(), candidate.load()
    before = logits(first)
    assert torch.equal(before, logits(second)), "two loads of one checkpoint give different logits"
    assert torch.equal(before, logits(first)), "a second forward gives other logits than the first"


def census(candidate: Candidate) -> None:
    """What is quantized is what was to be, and measured bytes are the predicted ones."""
    from harness.inputs.models import checkpoints, sizes
    from harness.metrics.measuring import census

    model = candidate.load()
    measured = sizes.measure(model)
    try:
        counted = census.census(model, candidate.method, candidate.arguments, dict(candidate.sketch().named_modules()))
    except HarnessError as error:
        raise AssertionError(str(error)) from error
    assert candidate.method.dtype or counted["quantized_modules"], "it quantizes nothing"
    predicted = sizes.predict(checkpoints.read_config(candidate.source), candidate.method, candidate.arguments)
    for name, value in measured.items():
        assert predicted[name] == value, (
            f"{name}: {value:,} bytes measured, {predicted[name]:,} predicted by its sketch"
        )


def save_and_load(candidate: Candidate) -> None:
    """The state_dict holds all there is: put into another load whose tensors were wiped, it gives equal logits."""
    import torch

    model, other = candidate.load(), candidate.load()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = logits(model)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    other.load_state_dict(kept)
    assert torch.equal(logits(other), before), "a model restored from its state_dict gives other logits"


def bad_arguments(candidate: Candidate) -> None:
    """Unknown arguments and values of the wrong kind are one line that names them."""
    method = candidate.method
    wrong = [f"{method.name}:no-such-argument=1", f"{method.name}:dtype=fp7"]
    for key, parameter in method.parameters.items():
        if parameter.kind is not str:
            wrong.append(f"{method.name}:{key}=word")
        if parameter.choices:
            wrong.append(f"{method.name}:{key}={'none-of-them' if parameter.kind is str else 10**9 + 7}")
    for text in wrong:
        complaint = ""
        try:
            arguments.resolve(parse(text), method, "cpu")
        except HarnessError as error:
            complaint = str(error)
        assert complaint, f"'{text}' is taken without complaint"
        assert "\n" not in complaint, f"'{text}' is refused in more than one line"


def relative_error(plain: nn.Module, weights: Iterable[QuantizedWeight], bits: float = 0.0) -> float:
    """Root of the squared error of quantized weights relative to the originals; with `bits`, of plain rounding."""
    off = whole = 0.0
    for weight in weights:
        original = plain.get_submodule(weight.name).get_parameter("weight").detach()
        off += float(((rounded(original, bits) if bits else weight.dequantize()) - original).square().sum())
        whole += float(original.square().sum())
    return math.sqrt(off / whole) if whole else 0.0


def rounded(weight: Tensor, bits: float) -> Tensor:
    """A weight on one symmetric grid of so many bits: what any method must beat."""
    step = weight.abs().max() / (2 ** (bits - 1) - 1)
    return (weight / step).round() * step


def error_falls_as_bits_grow(candidate: Candidate) -> None:
    """Its weights err less than plain rounding at a bit and a half fewer; with an argument `bits`, less the more."""
    method = candidate.method
    if method.dtype:
        return  # a reference
    if method.calibrated:
        return calibrated_outputs(candidate)  # its weights may lie further off: it is outputs that it keeps
    model, plain = candidate.load(), candidate.original()
    error = relative_error(plain, method.quantized(model))
    if method.bits < 16:
        assert error > 0, "quantized weights equal the originals"
    fewer = min(max(1.6, method.bits - 1.5), 10.5)  # fp16 numbers are no finer than 11 bits where they are large
    limit = relative_error(plain, method.quantized(model), fewer)
    assert error < limit, f"weights err by {error:.4f}, rounding at {fewer:g} bits by {limit:.4f}"
    if "bits" in method.parameters:
        errors = []
        for bits in sorted(method.parameters["bits"].choices):
            more = arguments.resolve(parse(f"{method.name}:bits={bits}"), method, "cpu")
            loaded = method.load(candidate.source, more, "cpu")
            errors.append(relative_error(plain, method.quantized(loaded)))
        assert errors == sorted(errors, reverse=True), f"errors do not fall as bits grow: {errors}"


def calibrated_outputs(candidate: Candidate) -> None:
    """Logits err less than those of one symmetric grid a weight at as many bits."""
    model, plain, exact = candidate.load(), candidate.original(), candidate.original()
    for weight in candidate.method.quantized(model):
        original = plain.get_submodule(weight.name).get_parameter("weight").detach()
        original.copy_(rounded(original, candidate.method.bits))
    reference = logits(exact)
    error, limit = (float((logits(other) - reference).square().mean()) for other in (model, plain))
    assert 0 < error < limit, f"logits err by {error:.3g} (mean square), by {limit:.3g} under plain rounding"
    assert isinstance(getattr(model, "calibration", None), dict), "no record of its calibration on the loaded model"


def two_at_once(candidate: Candidate) -> None:
    """Where it declares that forwards may run beside each other, the losses are those of one at a time."""
    import numpy as np
    import torch

    from harness.core.contracts import Window
    from harness.metrics.measuring import engine

    if not candidate.method.concurrent:
        return
    model, draws = candidate.load(), np.random.default_rng(0)
    windows = [Window(draws.integers(0, WORDS, TOKENS), TOKENS - 1) for _ in range(WINDOWS)]
    threads = torch.get_num_threads()
    torch.set_num_threads(engine.STREAMS)
    try:
        together = engine.score(model, windows, device="cpu", concurrent=True)
        torch.set_num_threads(1)  # as each of the two has it: its products may differ from those of two threads
        alone = engine.score(model, windows, device="cpu")
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(alone, together), "two forwards beside each other give other losses: declare concurrent=False"


CHECKS = (shape_and_dtype, determinism, census, save_and_load, bad_arguments, error_falls_as_bits_grow, two_at_once)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a method, architecture and check."""
    if "contract_method" not in metafunc.fixturenames:
        return
    named = {specification.name for specification in state_of(metafunc.config).options.methods}
    listed = catalog.listed_methods()
    tested = [listed[name].value for name in plan.ordered(listed) if name in named or not listed[name].own]
    why = "no method of another package or file is here, and --methods names none"
    none = [pytest.param(None, id="all", marks=pytest.mark.skip(reason=why))]
    metafunc.parametrize("contract_method", [pytest.param(item, id=item.name) for item in tested] or none)
    metafunc.parametrize("contract_architecture", ARCHITECTURES)
    metafunc.parametrize("contract_check", [pytest.param(check, id=check.__name__) for check in CHECKS])


@pytest.fixture(scope="session")
def contract_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """The two models."""
    folder = tmp_path_factory.mktemp("contract")
    return {name: checkpoint(name, folder / name) for name in ARCHITECTURES}


@pytest.mark.contract
def test_contract(
    contract_method: Method,
    contract_architecture: str,
    contract_check: Callable[[Candidate], None],
    contract_checkpoints: dict[str, Checkpoint],
) -> None:
    """One promise of a method, kept on one model."""
    if missing := plan.missing_packages(contract_method):
        pytest.skip(f"missing: pip install {' '.join(missing)}")
    if contract_check is save_and_load and not contract_method.reloads:
        pytest.skip("it declares that its state_dict cannot be loaded again")
    contract_check(Candidate(contract_method, contract_checkpoints[contract_architecture]))
