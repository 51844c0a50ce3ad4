"""What a CUDA card must hold for a model under a method: allocated bytes at their peak, without weights or a card.

- *Load peak*: the unquantized model on the card while a method of ours replaces each weight in turn, its own code run
  on a card that is not there (`fake_card`). Under bitsandbytes, what transformers holds as it reads one tensor after
  another in the order of their names and has each quantized. Of other libraries' methods the end alone is counted, and
  whatever comes from the host whole (a reference, a GGUF file) is never larger than at the end.
- *Run peak*: one forward over a window of tokens without a cache, logits at every position, as `memory.run_peak`
  measures it; or, where tokens are to be decoded, the larger of the prompt's forward, which makes the cache, and of the
  last token's, behind a full one.

Not counted, as nobody has seen them on a card: NOT_COUNTED.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from harness.core.contracts import Arguments, Method
from harness.core.errors import HarnessError
from harness.inputs.models import checkpoints, sizes
from harness.methods.quantizing import bnb, encode
from harness.metrics.measuring import fake_card

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from harness.methods.quantizing.codes import Recipe
    from harness.metrics.measuring.fake_card import Card

NOT_COUNTED = (
    "the driver's context",
    "cuBLAS workspaces",
    "the pool's rounding and spare blocks",
    "LLM.int8's outlier columns",
    "what calibration holds",
)
HALF_BYTES, FP32_BYTES = 2, 4


@dataclass(frozen=True)
class Prediction:
    """Bytes on a card."""

    load_peak: int  # most while the model is loaded
    run_peak: int  # most while it runs, weights included
    weights: int  # of the loaded model, quantization state included
    activations: int  # of `run_peak`, what is neither weights nor cache
    cache: int  # keys and values (and other state) after the last token; 0 without decoding


def predict(config: PretrainedConfig, method: Method, arguments: Arguments, window: int, decode: int = 0) -> Prediction:
    """The peaks of a model from its configuration.

    Args:
        config: of the unquantized model.
        method: and its arguments, resolved for a card.
        arguments: of the method.
        window: tokens of the forward, or of the prompt.
        decode: tokens decoded behind it, 0 for none.

    Raises:
        HarnessError: the forward does not run without values; names architecture and reason.
    """
    model = checkpoints.sketch_model(config, arguments.dtype)
    reading = 0
    if method.requires:  # a library's layers, made on the meta device
        plain = checkpoints.sketch_model(config, arguments.dtype)
        method.sketch(model, arguments)
        format = bnb.format_of(method)
        reading = _reading_peak(plain, model, method, format) if format else 0
    with checkpoints.quiet(), bnb.quiet(), fake_card.present() as card:
        for tensor in sizes.held(model):
            card.take(tensor)
        if not method.requires:
            with _each_shape_once(card):
                method.sketch(model, arguments)
        load_peak, weights = max(card.peak, reading), card.now
        card.reset()
        try:
            cache = beside = 0
            if decode:
                cache, beside = _decoding(card, model, window, decode)
            else:
                model(_ids(model, window), use_cache=False)
        except HarnessError:
            raise
        except Exception as error:  # whatever code of a library says that finds no values, or an operation unknown
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            raise HarnessError(
                f"{config.model_type}: its forward under {method.name} does not run without values "
                f"({reason[:200]}): measure memory.run_peak on a card instead"
            ) from error
        peak = card.peak
    return Prediction(load_peak, peak, weights, peak - weights - beside, cache)


@contextlib.contextmanager
def _each_shape_once(card: Card) -> Iterator[None]:
    """A weight like one before takes the same memory again: it is counted, not run."""
    traced: dict[Any, tuple[int, dict[str, tuple[torch.Size, torch.dtype]]]] = {}
    run = encode.quantize

    def quantize(recipe: Recipe, rows: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        key = rows.shape, rows.stride(), rows.dtype
        if key in traced:
            extra, kinds = traced[key]
            card.peak = max(card.peak, card.now + extra)
            return {name: rows.new_empty(shape, dtype=kind) for name, (shape, kind) in kinds.items()}
        before, highest = card.now, card.peak
        card.reset()
        made = run(recipe, rows, dtype)
        traced[key] = card.peak - before, {name: (tensor.shape, tensor.dtype) for name, tensor in made.items()}
        card.peak = max(card.peak, highest)
        return made

    encode.quantize = quantize
    try:
        yield
    finally:
        encode.quantize = run


def _reading_peak(plain: nn.Module, model: nn.Module, method: Method, format: bnb.Format) -> int:
    """Most bytes while transformers reads tensors one by one and bitsandbytes quantizes each.

    A weight to be quantized comes whole in the model's dtype. 4 bits: a Conv1D's is copied into rows first, and double
    quantization holds its absmax and a copy in fp32. int8: a second one in fp16.
    """
    done = {weight.name: weight for weight in method.quantized(model)}
    modules = dict(plain.named_modules())
    now = peak = 0

    def natural(pair: tuple[str, nn.Parameter]) -> list[tuple[int, int | str]]:
        """The order in which transformers reads tensors: numbers by their value."""
        return [(0, int(part)) if part.isdigit() else (1, part) for part in pair[0].split(".")]

    for name, parameter in sorted(plain.named_parameters(), key=natural):
        owner, _, leaf = name.rpartition(".")
        passing = 0
        if leaf == "weight" and owner in done:
            size = done[owner].storage
            passing = parameter.nbytes
            if format.int8:
                passing += HALF_BYTES * parameter.numel()
            elif isinstance(modules[owner], Conv1D):
                passing *= 2
            if format.double:
                passing += 2 * FP32_BYTES * -(-parameter.numel() // bnb.BLOCK)
        else:
            size = parameter.nbytes
        now += size
        peak = max(peak, now + passing)
    return peak


def _ids(model: Any, length: int) -> torch.Tensor:
    """Ids (1, length), as `memory.run_peak` feeds them."""
    count: int = model.config.get_text_config().vocab_size
    return torch.arange(length, device=fake_card.PLACE).remainder(count)[None]


def _decoding(card: Card, model: Any, window: int, decode: int) -> tuple[int, int]:
    """Prompt and tokens: the cache's bytes at the end, and at the peak."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    cache = getattr(model(_ids(model, window), use_cache=True, **last), "past_key_values", None)
    if cache is None:
        raise HarnessError(f"{model.config.model_type} keeps no past_key_values: leave out --decode")
    prompt_peak, at_prompt = card.peak, sizes.bytes_of(sizes.tensors(cache))
    token = _ids(model, 1)
    layers = list(getattr(cache, "layers", []))
    if layers and all(isinstance(getattr(layer, "keys", None), torch.Tensor) for layer in layers):
        for place, layer in enumerate(layers) if decode > 1 else ():  # keys and values take up tokens at once
            both = layer.keys, layer.values
            more = [kept.new_empty(*kept.shape[:-2], decode - 1, kept.shape[-1]) for kept in both]
            cache.update(*more, place)
        card.reset()
        model(token, past_key_values=cache, use_cache=True, **last)
    else:
        for _ in range(decode):
            model(token, past_key_values=cache, use_cache=True, **last)
    at_end = sizes.bytes_of(sizes.tensors(cache))
    if prompt_peak > card.peak:
        card.peak = prompt_peak
        return at_end, at_prompt
    return at_end, at_end
