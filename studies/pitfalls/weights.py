"""Faults in how weights are stored, selected, counted and used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from harness.core import catalog
from harness.core.contracts import Arguments, Scope
from harness.core.errors import BadSpecification
from harness.core.stats import summarise
from harness.inputs.models import sizes
from harness.methods.quantizing import arguments, stored
from harness.methods.quantizing.codes import Functions, Recipe, divide
from harness.metrics.measuring.devices import open_device
from harness.metrics.measuring.timing import Work, measure
from harness.published.pitfalls import in_fp32, perplexity
from studies.pitfalls.bench import Bench, Shown, mean

BLOCKS = 6  # of timed pairs: the times are shown, and decide nothing
SEED = 20_251_122  # of the token ids that are timed; any number would do


def stores(model: nn.Module) -> Iterator[stored.StoredWeight]:
    """Every quantized weight of a model once."""
    found = {id(store): store for store in map(stored.store_of, model.modules()) if store is not None}
    yield from found.values()


def drop_scales(model: nn.Module) -> None:
    """Set every scale to 1: weights become their integer codes."""
    for store in stores(model):
        store.get_buffer("scale").fill_(1.0)


def _with_and_without_scale(bench: Bench, method: str) -> Shown:
    model = bench.open(method)
    right = bench.nll(model)
    drop_scales(model)
    fault = bench.nll(model)
    reference, vocabulary = perplexity(bench.reference_nll), len(bench.tokenizer)

    def figures(nll: Any) -> dict[str, float]:
        return {
            "perplexity": perplexity(nll),
            "perplexity by an fp32 exp": in_fp32(nll),
            "mean NLL, nat": mean(nll),
            "reference perplexity": reference,
            "vocabulary": vocabulary,
        }

    return Shown(figures(fault), figures(right), note=f"`{method}`")


def codes_without_scale(bench: Bench) -> Shown:
    """Every weight, embeddings, head and norms too, stands as its int8 code; the scale was computed and never used.

    Codes reach 127 where weights stay under about 1, so logits grow by orders of magnitude and the mean NLL with them.
    Beyond 88.7 nats an fp32 exponential is infinite, beyond 709 a double's too.
    """
    return _with_and_without_scale(bench, "absmax-int8-tensor:all")


def codes_without_scale_selective(bench: Bench) -> Shown:
    """The same where only the decoder's projections are codes; norms and head stay as they were.

    The norms bring the stream back to size, and the unquantized head turns it into logits of ordinary size: what is
    left is a confident wrong distribution instead of an overflow.
    """
    return _with_and_without_scale(bench, "absmax-int8-tensor:linear")


def affine_codes(weight: Tensor, divisor: int, by_row: int) -> dict[str, Tensor]:
    """Codes q = round((w - min) / step), step = (max - min) / divisor, kept as uint8: modulo 256.

    Args:
        weight: (out, in) fp32.
        divisor: 255 for 8 bits; 256 gives the maximum the code 256.
        by_row: 1 for a step an output row, 0 for one a tensor.
    """
    spread = weight if by_row else weight.reshape(1, -1)
    minimum = spread.amin(dim=1, keepdim=True)  # (out, 1) or (1, 1)
    scale = (spread.amax(dim=1, keepdim=True) - minimum) / divisor
    codes = divide(weight - minimum, scale).round_().int().byte()
    return {"codes": codes, "scale": scale, "minimum": minimum}


def affine_weight(stored: Mapping[str, Tensor], shape: tuple[int, int], divisor: int, by_row: int) -> Tensor:
    """The weight codes * step + min: (out, in) fp32."""
    return stored["codes"].float().mul_(stored["scale"]).add_(stored["minimum"])


def affine_recipe(divisor: int, by_row: int) -> Recipe:
    """The recipe of the two functions above."""
    return Recipe("affine-uint8", Functions(affine_codes, affine_weight), {"divisor": divisor, "by_row": by_row})


def overflowing_code(bench: Bench) -> Shown:
    """With step = (max - min) / 2^b the maximum gets the code 2^b, which a b-bit store keeps as 0.

    So the largest weight of every row comes back as the smallest. The right divisor is 2^b - 1. With one step a tensor
    instead of one a row, a single weight a matrix turns over, and the damage may pass unseen.
    """

    def run(divisor: int, by_row: int) -> dict[str, float]:
        model = bench.open()
        names = arguments.select(model, Scope())
        plain = {name: model.get_submodule(name).get_parameter("weight").detach() for name in names}
        stored.apply(model, affine_recipe(divisor, by_row), names)
        worst, wrapped = 0.0, 0
        for name, weight in plain.items():
            store = stored.store_of(model.get_submodule(name))
            assert store is not None
            matrix = weight.T if store.transposed else weight
            steps = divide((store.dequantize() - matrix).abs(), store.get_buffer("scale"))
            worst, wrapped = max(worst, float(steps.max())), wrapped + int((steps > 1).sum())
        return {
            "perplexity": perplexity(bench.nll(model)),
            "largest error, steps": worst,
            "weights off by more than a step": wrapped,
            "reference perplexity": perplexity(bench.reference_nll),
        }

    once = run(256, 0)
    beside = {f"one step a tensor: {name}": value for name, value in once.items() if name != "reference perplexity"}
    return Shown(run(256, 1), run(255, 1), beside, "uint8, min and max of each output row")


def empty_scope(bench: Bench) -> Shown:
    """A list of modules to leave alone is compared with full module names, and holds last names only.

    No entry ever matches, nothing complains, and the selective model is the whole one. A scope of ours that selects
    nothing is an error, and every measurement carries the census of what was quantized.
    """
    method = catalog.methods()["absmax-int8"]
    model = bench.open()
    skipped = {name.rpartition(".")[2] for name in arguments.select(model, Scope("mlp"))}
    whole = arguments.select(model, Scope())
    left = [name for name in whole if name not in skipped]  # the fault: 'down_proj' is no full name
    for name in left:
        method.sketch(model, Arguments("fp32", Scope("all", None, name)))
    fault = sizes.storage_bytes(model)
    whole_model, selective = bench.open("absmax-int8"), bench.open("absmax-int8:attention")
    all_bytes = sizes.storage_bytes(whole_model)

    def figures(storage: int, candidate: nn.Module) -> dict[str, float]:
        return {
            "storage, bytes": storage,
            "whole-model storage, bytes": all_bytes,
            "modules quantized": len(list(stores(candidate))),
            "modules in the whole": len(whole),
            "perplexity": perplexity(bench.nll(candidate)),
        }

    try:
        bench.open(f"absmax-int8:names={min(skipped)}")
        refusal = ""
    except BadSpecification as error:
        refusal = str(error)
    note = f"to leave alone: {', '.join(sorted(skipped))}. The same mistake in a scope of ours: {refusal}"
    return Shown(figures(fault, model), figures(sizes.storage_bytes(selective), selective), note=note)


def unpacked_once(model: nn.Module) -> nn.Module:
    """Every QuantizedLinear replaced by an nn.Linear that holds its dequantized weight: fp32 bytes, fp32 speed."""
    for name, module in list(model.named_modules()):
        if isinstance(module, stored.QuantizedLinear):
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight = nn.Parameter(module.store.dequantize(), requires_grad=False)
            plain.register_parameter("bias", module.bias)
            model.set_submodule(name, plain)
    return model


def without_kernel(model: nn.Module) -> nn.Module:
    """The same codes and scales, with no product that reads codes: the weight is dequantized at every call."""
    for store in stores(model):
        codes = store.recipe.codes
        store.recipe = dataclasses.replace(store.recipe, codes=Functions(codes.encode, codes.decode))
    return model


def counted(model: nn.Module) -> list[int]:
    """A counter, its one item raised whenever a weight of the model is dequantized from here on."""
    calls = [0]

    def counting(dequantize: Any, *inputs: Any, **values: Any) -> Tensor:
        calls[0] += 1
        result: Tensor = dequantize(*inputs, **values)
        return result

    for store in stores(model):
        functions = Functions(store.recipe.codes.encode, partial(counting, store.recipe.codes.decode))
        store.recipe = dataclasses.replace(store.recipe, codes=functions)
    return calls


def dequantize_every_call(bench: Bench) -> Shown:
    """A weight-only method without a kernel of its own turns codes into floats before every product.

    At one token a forward that is more work than the product itself, so generation pays it for each token; a long
    prompt shares it. The right version for speed without a kernel unpacks once, with the same numbers, at the
    memory of fp32. What saves both is a product that reads codes. How much slower depends on sizes, threads and the
    way of unpacking: the direction is that of the report, its factor of eight is not reached here.
    """
    reference = bench.open()
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, len(bench.tokenizer), (1, 128), generator=generator)

    def forward(model: Any, tokens: int) -> None:
        with torch.inference_mode():
            model(input_ids=ids[:, :tokens], use_cache=False, logits_to_keep=1)

    def times(model: nn.Module, tokens: int) -> float:
        ours, theirs = (Work(partial(forward, which, tokens)) for which in (model, reference))
        timing = measure(ours, theirs, open_device("cpu").time, BLOCKS)
        return summarise(timing.candidate).p50 / summarise(timing.reference).p50

    def figures(model: nn.Module) -> dict[str, float]:
        timed = {f"time at length {tokens}, times fp32": times(model, tokens) for tokens in (1, 128)}
        calls = counted(model)
        forward(model, 1)
        return {
            "weights dequantized a forward": calls[0],
            **timed,
            "storage, MiB": sizes.storage_bytes(model) / 2**20,
            "perplexity": perplexity(bench.nll(model)),
        }

    note = "`absmax-int8` without a product that reads codes; medians of interleaved repetitions on this machine"
    fault, right = without_kernel(bench.open("absmax-int8")), unpacked_once(bench.open("absmax-int8"))
    return Shown(figures(fault), figures(right), note=note)


def tied_head_twice(bench: Bench) -> Shown:
    """A state dict lists a tied head and its embedding under two names; adding up its entries counts one tensor twice.

    A converter that treats every nn.Linear alike makes it true: the head gets a quantized copy of its own while
    the embedding stays, and quantizing more takes more memory.
    """
    model: Any = bench.open()
    held = sizes.measure(model)["memory.parameters"]
    counted_twice = sum(tensor.nbytes for tensor in model.state_dict().values())
    copied: Any = bench.open("absmax-int8")
    alone = sizes.storage_bytes(copied)
    head = copied.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    name = next(name for name, module in copied.named_modules() if module is head)
    catalog.methods()["absmax-int8"].sketch(copied, Arguments("fp32", Scope("all", None, name)))
    beside = {
        "int8 storage, head left to the embedding, bytes": alone,
        "int8 storage, head copied and quantized, bytes": sizes.storage_bytes(copied),
    }
    return Shown(
        {"bytes counted": counted_twice, "bytes held": held},
        {"bytes counted": sum(parameter.nbytes for parameter in model.parameters()), "bytes held": held},
        beside,
    )


def truncated(weight: Tensor, scale: Tensor) -> Tensor:
    """Codes by a cast: the fraction is dropped, so every weight moves towards 0."""
    return divide(weight, scale).to(torch.int8).float()


def rounded(weight: Tensor, scale: Tensor) -> Tensor:
    """Codes by rounding to the nearest."""
    return divide(weight, scale).round_()


def truncated_codes(bench: Bench) -> Shown:
    """Codes are made by casting w / scale to int8, which drops the fraction.

    Rounding is off by half a step at most and by nothing on average; a cast is off by up to a whole step, always
    towards 0, so every weight shrinks and the shrinkage adds up from layer to layer.
    """

    def run(code: Callable[[Tensor, Tensor], Tensor]) -> dict[str, float]:
        model = bench.open()
        worst, before, after = 0.0, 0.0, 0.0
        for name in arguments.select(model, Scope()):
            module: Any = model.get_submodule(name)
            by_row = 1 if isinstance(module, nn.Linear) else 0  # GPT-2 keeps (in, out)
            weight = module.weight.detach()
            scale = weight.abs().amax(dim=by_row, keepdim=True) / 127
            back = code(weight, scale) * scale
            worst = max(worst, float(divide((weight - back).abs(), scale).max()))
            before, after = before + float(weight.abs().sum()), after + float(back.abs().sum())
            module.weight.data.copy_(back)
        return {
            "perplexity": perplexity(bench.nll(model)),
            "largest error, steps": worst,
            "sum of magnitudes, %": 100 * after / before,
            "reference perplexity": perplexity(bench.reference_nll),
        }

    return Shown(run(truncated), run(rounded), note="int8, one scale an output row")


def declared_not_stored(bench: Bench) -> Shown:
    """Codes are written into the fp32 tensors that held the weights, and memory is added up by name: a byte each.

    Nothing is ever stored in 8 bits. Scales are not counted, products are those of fp32, and so is their time. A twin
    of the fault computes the codes and never puts them into the model.
    """
    model = bench.open()
    names = {f"{name}.weight" for name in arguments.select(model, Scope())}
    printed = sum(each.numel() * (1 if name in names else 4) for name, each in model.named_parameters())
    stored_as_codes = sizes.storage_bytes(bench.open("absmax-int8"))
    held = sizes.storage_bytes(model)
    return Shown(
        {"bytes printed": printed, "bytes held": held},
        {"bytes printed": stored_as_codes, "bytes held": stored_as_codes},
        {"scales that the declared figure leaves out, bytes": stored_as_codes - printed},
    )


def packed_halved_again(bench: Bench) -> Shown:
    """Two 4-bit codes lie in a byte, and the elements of that storage are counted at half a byte each.

    The library's tensor has half as many elements as the weight had: its bytes are its elements.
    """
    codes = [store.get_buffer("codes") for store in stores(bench.open("nf4"))]
    held = sum(each.nbytes for each in codes)
    halved = sum(each.numel() // 2 for each in codes)
    return Shown({"bytes printed": halved, "bytes held": held}, {"bytes printed": held, "bytes held": held})


def one_card_of_several(bench: Bench) -> Shown:
    """A model is spread over cards, and the allocator of the current card alone is asked.

    Which card is current says nothing of where the layers lie. The right version adds up all cards; here the shares
    are counted, since the model needs no card: the embedding and half of the layers on the first.
    """
    model: Any = bench.open("nf4")
    prefix, layers = arguments.decoder_layers(model)
    whole = sizes.storage_bytes(model)
    beyond = [model.get_submodule(f"{prefix}.{index}") for index in range(layers // 2, layers)]
    elsewhere = sizes.bytes_of(tensor for module in beyond for tensor in sizes.held(module))
    return Shown(
        {"bytes printed": whole - elsewhere, "bytes held": whole},
        {"bytes printed": whole, "bytes held": whole},
        note=f"`nf4`, {layers // 2} of {layers} layers on the current card",
    )
