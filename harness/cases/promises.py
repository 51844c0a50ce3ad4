"""The contract of a method, as checks that run it on two small random models: what a plugin's author gets for nothing.

Each check takes a `Trial` and raises AssertionError with what it saw. The models are a Llama (Linear weights, grouped
heads, tied head) and a GPT-2 (Conv1D weights), of widths that blocks of 64 divide.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.contracts import Arguments, Checkpoint, Method
from harness.core.errors import HarnessError
from harness.core.specification import Specification, parse
from harness.methods.quantizing import arguments

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
class Trial:
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
        found: Tensor = model(input_ids=torch.arange(TOKENS)[None], use_cache=False).logits
    return found


def shape_and_dtype(trial: Trial) -> None:
    """Logits of the right shape in the dtype asked for, finite, from a model in eval mode without gradients."""
    import torch

    from harness.inputs.models.checkpoints import TORCH_DTYPES

    model = trial.load()
    assert not model.training, "the loaded model is in training mode: return model.eval()"
    assert not any(parameter.requires_grad for parameter in model.parameters()), "parameters require gradients"
    found = logits(model)
    assert found.shape == (1, TOKENS, WORDS), f"logits are {tuple(found.shape)}, not {(1, TOKENS, WORDS)}"
    wanted = TORCH_DTYPES[trial.arguments.dtype]
    assert found.dtype == wanted, f"logits are {found.dtype}, not {wanted}"
    assert bool(torch.isfinite(found).all()), "logits are not finite"
    shapes = {
        name: module.weight.shape for name, module in trial.original().named_modules() if hasattr(module, "weight")
    }
    for weight in trial.method.quantized(trial.load()):  # a fresh one: some libraries repack at the first forward
        restored = weight.dequantize()
        assert restored.dtype == torch.float32, f"{weight.name} dequantizes to {restored.dtype}, not fp32"
        assert restored.shape == shapes[weight.name], (
            f"{weight.name} dequantizes to {tuple(restored.shape)}, not {tuple(shapes[weight.name])} as in the model"
        )
        assert bool(torch.isfinite(restored).all()), f"{weight.name} dequantizes to non-finite values"


def determinism(trial: Trial) -> None:
    """Two loads give equal logits, and a second forward those of the first."""
    import torch

    first, second = trial.load(), trial.load()
    before = logits(first)
    assert torch.equal(before, logits(second)), "two loads of one checkpoint give different logits"
    assert torch.equal(before, logits(first)), "a second forward gives other logits than the first"


def census(trial: Trial) -> None:
    """What is quantized is what was to be, and measured bytes are the predicted ones."""
    from harness.inputs.models import checkpoints, sizes
    from harness.metrics.measuring import census

    model = trial.load()
    measured = sizes.measure(model)
    try:
        found = census.census(model, trial.method, trial.arguments, dict(trial.sketch().named_modules()))
    except HarnessError as error:
        raise AssertionError(str(error)) from error
    assert trial.method.dtype or found["quantized_modules"], "it quantizes nothing"
    predicted = sizes.predict(checkpoints.read_config(trial.source), trial.method, trial.arguments)
    for name, value in measured.items():
        assert predicted[name] == value, (
            f"{name}: {value:,} bytes measured, {predicted[name]:,} predicted by its sketch"
        )


def save_and_load(trial: Trial) -> None:
    """The state_dict holds all there is: put into another load whose tensors were wiped, it gives equal logits."""
    import torch

    model, other = trial.load(), trial.load()
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = logits(model)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.zero_()
    other.load_state_dict(kept)
    assert torch.equal(logits(other), before), "a model restored from its state_dict gives other logits"


def bad_arguments(trial: Trial) -> None:
    """Unknown arguments and values of the wrong kind are one line that names them."""
    method = trial.method
    wrong = [f"{method.name}:no-such-argument=1", f"{method.name}:dtype=fp7"]
    for key, parameter in method.parameters.items():
        if parameter.kind is not str:
            wrong.append(f"{method.name}:{key}=word")
        if parameter.choices:
            wrong.append(f"{method.name}:{key}={'none-of-them' if parameter.kind is str else 10**9 + 7}")
    for text in wrong:
        told = complaint(text, method)
        assert told, f"'{text}' is taken without complaint"
        assert "\n" not in told, f"'{text}' is refused in more than one line"


def complaint(text: str, method: Method) -> str:
    """What a user is told of a specification; '' where it is taken."""
    try:
        arguments.resolve(parse(text), method, "cpu")
    except HarnessError as error:
        return str(error)
    return ""


def relative_error(method: Method, chosen: Arguments, source: Checkpoint) -> float:
    """Root of the squared error over all quantized weights, relative to the weights."""
    from harness.inputs.models import checkpoints

    plain = dict(checkpoints.open_model(source, "fp32", "cpu").named_modules())
    off = whole = 0.0
    for weight in method.quantized(method.load(source, chosen, "cpu")):
        original: Any = plain[weight.name].weight
        off += float((weight.dequantize() - original).square().sum())
        whole += float(original.square().sum())
    return math.sqrt(off / whole) if whole else 0.0


def round_to_nearest(source: Checkpoint, names: list[str], bits: float) -> float:
    """The same of one symmetric grid a weight at so many bits: what any method must beat."""
    from harness.inputs.models import checkpoints

    plain = dict(checkpoints.open_model(source, "fp32", "cpu").named_modules())
    levels = 2 ** (bits - 1) - 1
    off = whole = 0.0
    for name in names:
        original: Any = plain[name].weight
        step = original.abs().max() / levels
        off += float(((original / step).round() * step - original).square().sum())
        whole += float(original.square().sum())
    return math.sqrt(off / whole)


def error_falls_as_bits_grow(trial: Trial) -> None:
    """Its weights err less than plain rounding at a bit and a half fewer; with an argument `bits`, less the more."""
    method, chosen = trial.method, trial.arguments
    if method.dtype:
        return  # a reference
    if method.calibrated:
        return calibrated_outputs(trial)  # its weights may lie further off: it is outputs that it keeps
    found = relative_error(method, chosen, trial.source)
    names = [weight.name for weight in method.quantized(trial.load())]
    if method.bits < 16:
        assert found > 0, "quantized weights equal the originals"
    fewer = min(max(1.6, method.bits - 1.5), 10.5)  # fp16 numbers are no finer than 11 bits where they are large
    limit = round_to_nearest(trial.source, names, fewer)
    assert found < limit, f"weights err by {found:.4f}, rounding at {fewer:g} bits by {limit:.4f}"
    if "bits" in method.parameters:
        errors = []
        for bits in sorted(method.parameters["bits"].choices):
            more = arguments.resolve(parse(f"{method.name}:bits={bits}"), method, "cpu")
            errors.append(relative_error(method, more, trial.source))
        assert errors == sorted(errors, reverse=True), f"errors do not fall as bits grow: {errors}"


def calibrated_outputs(trial: Trial) -> None:
    """Logits err less than those of one symmetric grid a weight at as many bits."""
    model, plain, exact = trial.load(), trial.original(), trial.original()
    levels = 2 ** (trial.method.bits - 1) - 1
    for weight in trial.method.quantized(model):
        rounded: Any = plain.get_submodule(weight.name).weight
        step = rounded.abs().max() / levels
        rounded.copy_((rounded / step).round() * step)
    reference = logits(exact)
    found, limit = (float((logits(other) - reference).square().mean()) for other in (model, plain))
    assert 0 < found < limit, f"logits err by {found:.3g} (mean square), by {limit:.3g} under plain rounding"
    assert isinstance(getattr(model, "calibration", None), dict), "no record of its calibration on the loaded model"


def two_at_once(trial: Trial) -> None:
    """Where it declares that forwards may run beside each other, the losses are those of one at a time."""
    import numpy as np
    import torch

    from harness.core.contracts import Window
    from harness.metrics.measuring import engine

    if not trial.method.concurrent:
        return
    model, draws = trial.load(), np.random.default_rng(0)
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
