"""The checks on one layer of bitsandbytes, built without a model. Each builds its own: nothing is shared."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import bitsandbytes
import torch
from torch import Tensor, nn

from harness.core.contracts import Subject
from harness.core.errors import HarnessError, UnknownName
from harness.core.records import Figure
from harness.inputs.models import sizes
from harness.inputs.models.checkpoints import TORCH_DTYPES
from harness.methods.quantizing import bnb, bnb_layers
from harness.methods.quantizing.bnb import Format
from harness.metrics.measuring.checks import SHAPES, equal, relative, smaller, within

INPUTS, OUTPUTS = 256, 1024  # multiples of every block; large enough that a norm averages 2^18 codes
ROWS = (1, 8, 64, 512)  # one token, a small batch, a batch, a window: kernels are chosen by it
PRODUCT = {"fp32": 1e-5, "bf16": 4e-3, "fp16": 5e-4}  # see harness.metrics.invariant
PRODUCT_INT8 = 2e-2
GAIN = 0.0075
SHAPE_ERROR = 0.2  # a 4-bit code costs 0.09 to 0.13; beyond 0.2 something else is wrong
ROW = 1e-5
OUTLIER = 40.0  # far beyond LLM.int8's threshold of 6
SEED = 20_251_124


def weight(inputs: int = INPUTS, outputs: int = OUTPUTS) -> Tensor:
    """(outputs, inputs) fp32: Gaussian rows of log-normal scale."""
    seeded = torch.Generator().manual_seed(SEED)
    rows = torch.exp(torch.randn(outputs, 1, generator=seeded))
    return torch.randn(outputs, inputs, generator=seeded) * rows * 0.02  # 0.02: as models are initialised


def inputs(rows: int, width: int = INPUTS) -> Tensor:
    """(rows, width) fp32 Gaussian."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(SEED + rows))


def format_of(subject: Subject) -> Format:
    """The library's format of a method."""
    format = bnb.format_of(subject.method)
    if format is None:
        raise HarnessError(f"{subject.method.name} has no layer of a library: its checks run on models")
    return format


def build(subject: Subject, values: Tensor, dtype: str = "fp32", format: Format | None = None) -> nn.Module:
    """The library's layer with these weights (out, in), quantized, in eval mode on the case's device."""
    format = format or format_of(subject)
    chosen = bnb.options(format, replace(subject.arguments, dtype=dtype), [])
    outputs, width = values.shape
    module: Any
    if format.int8:
        module = bitsandbytes.nn.Linear8bitLt(
            width, outputs, bias=False, has_fp16_weights=False, threshold=chosen["llm_int8_threshold"]
        )
        module.weight = bitsandbytes.nn.Int8Params(
            values.to(TORCH_DTYPES[dtype]).clone(), requires_grad=False, has_fp16_weights=False
        )
    else:
        settings = {"quant_type": format.kind, "compress_statistics": format.double}
        module = bitsandbytes.nn.Linear4bit(
            width, outputs, bias=False, compute_dtype=getattr(torch, chosen["bnb_4bit_compute_dtype"]), **settings
        )
        module.weight = bitsandbytes.nn.Params4bit(
            values.to(TORCH_DTYPES[dtype]).clone(), requires_grad=False, module=module, **settings
        )
    module.source_cls = nn.Linear  # as transformers marks it
    built: nn.Module = module.to(subject.device.torch_device).eval()
    return built


def run(module: nn.Module, x: Tensor) -> Tensor:
    """The module's output on the host."""
    device = next(module.parameters()).device
    with torch.inference_mode():
        return module(x.to(device)).cpu()  # type: ignore[no-any-return]


def dequantized(module: nn.Module) -> Tensor:
    """W' (out, in) fp64 of a layer that has not run yet."""
    (kept,) = bnb_layers.quantized(module)
    return kept.dequantize().double().cpu()


def product(dtype: str, subject: Subject) -> Figure:
    """The layer against a plain product with its own dequantized weight."""
    module = build(subject, weight(), dtype)
    kept = dequantized(module)
    errors = {}
    for rows in ROWS:
        x = inputs(rows).to(TORCH_DTYPES[dtype])
        errors[str(rows)] = relative(run(module, x), x.double() @ kept.T)
    limit = PRODUCT_INT8 if format_of(subject).int8 else PRODUCT[dtype]
    return within(max(errors.values()), limit, by_rows=errors)


def scale(subject: Subject) -> Figure:
    """How much larger the layer's output is than the unquantized one's, in least squares."""
    values, x = weight(), inputs(64)
    output, wanted = run(build(subject, values), x).double(), x.double() @ values.double().T
    gain = float((output * wanted).sum() / (wanted * wanted).sum())
    return within(abs(gain - 1), GAIN, gain=gain)


def saved(after: bool, subject: Subject) -> Figure:
    """A copy through state_dict, taken before or after the first forward, against the layer itself."""
    module, x = build(subject, weight()), inputs(64)
    first = run(module, x) if after else None
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    wanted = first if first is not None else run(module, x)
    return equal(run(restored(subject, kept), x), wanted)


def restored(subject: Subject, kept: Mapping[str, Tensor]) -> nn.Module:
    """A layer from what another's state_dict held, as transformers loads it."""
    format = format_of(subject)
    module = build(subject, weight())  # not of zeros: double quantization of equal scales divides 0 by 0
    device = subject.device.torch_device
    if format.int8:
        module.load_state_dict(dict(kept))
        return module.to(device).eval()
    state = {name.removeprefix("weight."): value for name, value in kept.items() if name.startswith("weight.")}
    module.weight = bitsandbytes.nn.Params4bit.from_prequantized(kept["weight"], state, device=device, module=module)
    module.quant_state = module.weight.quant_state  # type: ignore[union-attr]
    return module.eval()


def state_dict(subject: Subject) -> Figure:
    """The error to the unquantized product before and after `state_dict()` behind a forward."""
    values, x = weight(), inputs(64)
    module, wanted = build(subject, values), x @ values.T
    before = run(module, x)
    module.state_dict()
    after = run(module, x)
    error = relative(before, wanted)
    holds = torch.equal(before, after)
    return Figure(relative(after, wanted), "", detail={"holds": holds, "limit": f"{error:.4g}", "before": error})


def rows(subject: Subject) -> Figure:
    """Each of a few rows alone against itself in a batch whose first row has an outlier."""
    module, x = build(subject, weight()), inputs(64)
    x[0, 5] = OUTLIER
    together = run(module, x)
    return within(max(relative(run(module, x[i : i + 1]), together[i : i + 1]) for i in (1, 31, 63)), ROW)


def eval_again(subject: Subject) -> Figure:
    """The same output after train() and eval()."""
    module, x = build(subject, weight()), inputs(64)
    before = run(module, x)
    module.train()
    module.eval()
    return equal(run(module, x), before)


def run_twice(subject: Subject) -> Figure:
    """The same output twice."""
    module, x = build(subject, weight()), inputs(64)
    before = run(module, x)
    return equal(run(module, x), before)


def moved(subject: Subject) -> Figure:
    """A CPU forward, then a move to the case's device: the same output as without the forward before."""
    x = inputs(64)
    wanted = run(build(subject, weight()), x)
    module = build(subject, weight()).to("cpu")
    run(module, x)
    return equal(run(module.to(subject.device.torch_device), x), wanted)


def double(after: bool, subject: Subject) -> Figure:
    """Bytes with double quantization over bytes without."""
    format, values, held = format_of(subject), weight(), []
    for one in (format, replace(format, double=False)):
        module = build(subject, values, format=one)
        if after:
            run(module, inputs(8))
        held.append(sizes.storage_bytes(module))
    return smaller(*held)


def shape(text: str, subject: Subject) -> Figure:
    """A layer whose columns or rows divide by no block loads, runs and is as good as any."""
    width, outputs = map(int, text.split("x"))
    values, x = weight(width, outputs), inputs(8, width)
    return within(relative(run(build(subject, values), x), x @ values.T), SHAPE_ERROR)


def misspelt(subject: Subject) -> Figure:
    """Options that transformers would ignore in silence: each must be refused by name."""
    chosen = bnb.options(format_of(subject), subject.arguments, [])
    taken = []
    for wrong in ("bnb_4bit_qant_type", "llm_int8_treshold", "load_in_4bits"):
        try:
            bnb.configuration({**copy.deepcopy(chosen), wrong: True})
            taken.append(wrong)
        except UnknownName:
            continue
    return within(float(len(taken)), 0, taken=taken)


CHECKS: dict[str, Callable[[Subject], Figure]] = {
    **{f"product.{dtype}": functools.partial(product, dtype) for dtype in PRODUCT},
    "scale": scale,
    "saved_before": functools.partial(saved, False),
    "state_dict": state_dict,
    "saved_after": functools.partial(saved, True),
    "rows": rows,
    "eval_again": eval_again,
    "run_twice": run_twice,
    "moved": moved,
    "double_before": functools.partial(double, False),
    "double_after": functools.partial(double, True),
    **{f"shape.{text}": functools.partial(shape, text) for text in SHAPES},
    "misspelt": misspelt,
}
