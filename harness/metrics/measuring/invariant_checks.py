"""The checks, on one layer of bitsandbytes or a whole (tiny) model. Each builds its own: nothing is shared."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from harness.core import catalog
from harness.core.contracts import Method, Subject
from harness.core.errors import HarnessError, UnknownName
from harness.core.records import Figure
from harness.inputs.models import checkpoints, sizes
from harness.inputs.models.checkpoints import TORCH_DTYPES
from harness.methods.quantizing import bnb
from harness.metrics.measuring.checks import LAYER, SHAPES

INPUTS, OUTPUTS = 256, 1024  # multiples of every block; large enough that a norm averages 2^18 codes
ROWS = (1, 8, 64, 512)  # one token, a small batch, a batch, a window: kernels are chosen by it
MODULE_ROWS = 8
TOKENS, BATCH = 32, 4
PRODUCT = {"fp32": 1e-5, "bf16": 4e-3, "fp16": 5e-4}  # see harness.metrics.invariant
PRODUCT_INT8 = 2e-2
GAIN = 0.0075
SHAPE_ERROR = 0.2  # a 4-bit code costs 0.09 to 0.13; beyond 0.2 something else is wrong
ROW = 1e-5
OUTLIER = 40.0  # far beyond LLM.int8's threshold of 6
SEED = 20_251_124


def relative(output: Tensor, wanted: Tensor) -> float:
    """|output - wanted| / |wanted| in Frobenius norm, fp64; shapes equal."""
    a, b = output.detach().double(), wanted.detach().double()
    return float((a - b).norm() / b.norm())


def within(value: float, limit: float, **detail: Any) -> Figure:
    """A figure that must not exceed its limit; a value that is not finite does."""
    return Figure(value, "", detail={"holds": value <= limit, "limit": f"at most {limit:g}", **detail})


def equal(output: Tensor, wanted: Tensor, tokens: Tensor | None = None) -> Figure:
    """The relative difference of two outputs that must have equal bits; of logits the mean NLL of tokens too, nats."""
    holds = output.equal(wanted)
    detail: dict[str, Any] = {"holds": holds, "limit": "0"}
    if tokens is not None:
        for name, logits in (("nll", output), ("nll_before", wanted)):
            detail[name] = float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))
    return Figure(0.0 if holds else relative(output, wanted), "", detail=detail)


def weight(inputs: int = INPUTS, outputs: int = OUTPUTS) -> Tensor:
    """(outputs, inputs) fp32: Gaussian rows of log-normal scale."""
    seeded = torch.Generator().manual_seed(SEED)
    rows = torch.exp(torch.randn(outputs, 1, generator=seeded))
    return torch.randn(outputs, inputs, generator=seeded) * rows * 0.02  # 0.02: as models are initialised


def inputs(rows: int, width: int = INPUTS) -> Tensor:
    """(rows, width) fp32 Gaussian."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(SEED + rows))


def format_of(method: Method) -> bnb.Format:
    """The library's format of a method."""
    format = bnb.format_of(method)
    if format is None:
        raise HarnessError(f"{method.name} is no method of the harness's on bitsandbytes: this check needs one")
    return format


def build(subject: Subject, values: Tensor, dtype: str = "fp32", method: Method | None = None) -> nn.Module:
    """The library's layer with these weights (out, in), quantized, in eval mode on the case's device."""
    format = format_of(method or subject.method)
    chosen = bnb.options(format, replace(subject.arguments, dtype=dtype), [])
    outputs, width = values.shape
    held = values.to(TORCH_DTYPES[dtype]).clone()
    module: Any
    if format.int8:
        module = bitsandbytes.nn.Linear8bitLt(
            width, outputs, bias=False, has_fp16_weights=False, threshold=chosen["llm_int8_threshold"]
        )
        module.weight = bitsandbytes.nn.Int8Params(held, requires_grad=False, has_fp16_weights=False)
    else:
        settings = {"quant_type": format.kind, "compress_statistics": format.double}
        module = bitsandbytes.nn.Linear4bit(
            width, outputs, bias=False, compute_dtype=getattr(torch, chosen["bnb_4bit_compute_dtype"]), **settings
        )
        module.weight = bitsandbytes.nn.Params4bit(held, requires_grad=False, module=module, **settings)
    module.source_cls = nn.Linear  # as transformers marks it
    built: nn.Module = module.to(subject.device.torch_device).eval()
    return built


def fresh(subject: Subject, method: Method | None = None) -> tuple[nn.Module, Tensor]:
    """A copy before any forward, and what it is run on: 64 rows of a layer, (4, 32) seeded token ids of a model."""
    if subject.case.model == LAYER:
        return build(subject, weight(), method=method), inputs(64)
    model = (method or subject.method).load(subject.checkpoint, subject.arguments, subject.case.device)
    words = checkpoints.read_config(subject.checkpoint).vocab_size
    return model, torch.randint(0, words, (BATCH, TOKENS), generator=torch.Generator().manual_seed(SEED))


def run(module: nn.Module, x: Tensor) -> Tensor:
    """A layer's output of rows, or a model's logits of token ids (batch, tokens, vocabulary) in fp32, on the host."""
    x = x.to(next(module.parameters()).device)
    with torch.inference_mode():
        output = module(x) if x.is_floating_point() else module(input_ids=x, use_cache=False).logits.float()
    return output.cpu()  # type: ignore[no-any-return]


def product(dtype: str, subject: Subject) -> Figure:
    """The layer, or every quantized module of a model, against a plain product with its own dequantized weight."""
    int8 = getattr(bnb.format_of(subject.method), "int8", False)
    errors = {}
    if subject.case.model == LAYER:
        module = build(subject, weight(), dtype)
        (only,) = subject.method.quantized(module)
        kept = only.dequantize().double().cpu()  # (out, in)
        for rows in ROWS:
            x = inputs(rows).to(TORCH_DTYPES[dtype])
            errors[str(rows)] = relative(run(module, x), x.double() @ kept.T)
        return within(max(errors.values()), PRODUCT_INT8 if int8 else PRODUCT[dtype], by_rows=errors)
    model, _ = fresh(subject)
    dtype = subject.arguments.dtype  # the model's
    for one in subject.method.quantized(model):
        part: Any = model.get_submodule(one.name)
        kept = one.dequantize().float().cpu()
        kept = kept.T if one.kind == Conv1D.__name__ else kept  # (out, in)
        x = torch.randn(MODULE_ROWS, kept.shape[1], generator=torch.Generator().manual_seed(SEED))
        bias = 0.0 if part.bias is None else part.bias.detach().double().cpu()
        with torch.inference_mode():
            y = part(x.to(subject.device.torch_device, TORCH_DTYPES[dtype])).cpu()
        errors[one.name] = relative(y, x.double() @ kept.double().T + bias)
    worst = max(errors, key=lambda name: errors[name])
    return within(errors[worst], PRODUCT_INT8 if int8 else PRODUCT[dtype], module=worst)


def scale(subject: Subject) -> Figure:
    """How much larger the layer's output is than the unquantized one's, in least squares."""
    module, x = fresh(subject)
    output, wanted = run(module, x).double(), x.double() @ weight().double().T
    gain = float((output * wanted).sum() / (wanted * wanted).sum())
    return within(abs(gain - 1), GAIN, gain=gain)


def saved(after: bool, subject: Subject) -> Figure:
    """A copy taken before or after the first forward, through state_dict or `save_pretrained`, against the original."""
    module, x = fresh(subject)
    first = run(module, x) if after else None
    if subject.case.model == LAYER:
        kept = {name: value.clone() for name, value in module.state_dict().items()}
        wanted = first if first is not None else run(module, x)
        return equal(run(restored(subject, kept), x), wanted)
    options: dict[str, Any] = {
        "dtype": TORCH_DTYPES[subject.arguments.dtype],
        "attn_implementation": checkpoints.ATTENTION,
        "device_map": {"": subject.case.device},
    }
    with tempfile.TemporaryDirectory() as folder, checkpoints.quiet():
        module.save_pretrained(folder)  # type: ignore[operator]  # a PreTrainedModel
        wanted = first if first is not None else run(module, x)
        reopened = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options).eval()
        return equal(run(reopened, x), wanted, x)


def restored(subject: Subject, kept: Mapping[str, Tensor]) -> nn.Module:
    """A layer from what another's state_dict held, as transformers loads it."""
    module = build(subject, weight())  # not of zeros: double quantization of equal scales divides 0 by 0
    device = subject.device.torch_device
    if format_of(subject.method).int8:
        module.load_state_dict(dict(kept))
        return module.to(device).eval()
    state = {name.removeprefix("weight."): value for name, value in kept.items() if name.startswith("weight.")}
    module.weight = bitsandbytes.nn.Params4bit.from_prequantized(kept["weight"], state, device=device, module=module)
    module.quant_state = module.weight.quant_state  # type: ignore[union-attr]
    return module.eval()


def state_dict(subject: Subject) -> Figure:
    """A model's logits, or a layer's error to the unquantized product, before and after `state_dict()`."""
    module, x = fresh(subject)
    before = run(module, x)
    module.state_dict()
    after = run(module, x)
    if subject.case.model != LAYER:
        return equal(after, before, x)
    wanted = x @ weight().T
    error = relative(before, wanted)
    holds = torch.equal(before, after)
    return Figure(relative(after, wanted), "", detail={"holds": holds, "limit": f"{error:.4g}", "before": error})


def rows(subject: Subject) -> Figure:
    """Each text, or some rows, alone against itself in a batch; a layer's has an outlier in its first row."""
    module, x = fresh(subject)
    places: tuple[int, ...] = tuple(range(BATCH))
    if subject.case.model == LAYER:
        x[0, 5] = OUTLIER
        places = (1, 31, 63)
    together = run(module, x)
    return within(max(relative(run(module, x[i : i + 1]), together[i : i + 1]) for i in places), ROW)


def again(evaluated: bool, subject: Subject) -> Figure:
    """The same output twice; or after train() and eval() between."""
    module, x = fresh(subject)
    before = run(module, x)
    if evaluated:
        module.train()
        module.eval()
    return equal(run(module, x), before)


def moved(subject: Subject) -> Figure:
    """A forward on the CPU, then a move to the case's device: the same output as without it."""
    module, x = fresh(subject)
    wanted = run(module, x)
    if subject.case.model == LAYER:
        module = build(subject, weight()).to("cpu")
    else:
        module = subject.method.load(subject.checkpoint, subject.arguments, "cpu")
    run(module, x)
    return equal(run(module.to(subject.device.torch_device), x), wanted)


def double(after: bool, subject: Subject) -> Figure:
    """Bytes with double quantization over those of the same method without."""
    plain = catalog.methods().get(subject.method.name.removesuffix("-dq"))
    if plain is None:
        raise HarnessError(f"{subject.method.name} has no method without double quantization to stand beside")
    held = []
    for method in (subject.method, plain):
        module, x = fresh(subject, method)
        if after:
            run(module, x[:1])
        held.append(sizes.storage_bytes(module))
    detail = {"holds": held[0] < held[1], "limit": "below 1", "double": held[0], "plain": held[1]}
    return Figure(held[0] / held[1], "", detail=detail)


def shape(text: str, subject: Subject) -> Figure:
    """A layer whose columns or rows divide by no block loads, runs and is as good as any."""
    width, outputs = map(int, text.split("x"))
    values, x = weight(width, outputs), inputs(8, width)
    return within(relative(run(build(subject, values), x), x @ values.T), SHAPE_ERROR)


def misspelt(subject: Subject) -> Figure:
    """Options that transformers would ignore in silence: each must be refused by name."""
    chosen = bnb.options(format_of(subject.method), subject.arguments, [])
    taken = []
    for wrong in ("bnb_4bit_qant_type", "llm_int8_treshold", "load_in_4bits"):
        try:
            bnb.configuration({**chosen, wrong: True})
            taken.append(wrong)
        except UnknownName:
            continue
    return within(float(len(taken)), 0, taken=taken)


def skip_list(subject: Subject) -> Figure:
    """A user's own skip list, which names one module and not the head: is the head left as it is?"""
    plain = checkpoints.sketch_model(checkpoints.read_config(subject.checkpoint), subject.arguments.dtype)
    first = subject.method.targets(plain, subject.arguments)[0]
    config = bnb.configuration(bnb.options(format_of(subject.method), subject.arguments, [first]))
    model: Any = checkpoints.open_model(
        subject.checkpoint, subject.arguments.dtype, subject.case.device, quantization_config=config
    )
    head = model.get_output_embeddings()
    quantized = not head.weight.is_floating_point()
    return within(float(quantized), 0, head=type(head).__name__, skipped=first)


CHECKS: dict[str, Callable[[Subject], Figure]] = {
    **{f"product.{dtype}": functools.partial(product, dtype) for dtype in PRODUCT},
    "scale": scale,
    "saved_before": functools.partial(saved, False),
    "state_dict": state_dict,
    "saved_after": functools.partial(saved, True),
    "rows": rows,
    "eval_again": functools.partial(again, True),
    "run_twice": functools.partial(again, False),
    "moved": moved,
    "double_before": functools.partial(double, False),
    "double_after": functools.partial(double, True),
    **{f"shape.{text}": functools.partial(shape, text) for text in SHAPES},
    "misspelt": misspelt,
    "skip_list": skip_list,
}
