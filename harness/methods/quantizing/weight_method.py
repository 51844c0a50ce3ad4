"""Factories of methods: a quantizer is two functions, a reference is a dtype. No torch at import."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from harness.core.contracts import AS_MODEL, Arguments, Checkpoint, Method, Parameter, QuantizedWeight, Scope
from harness.methods.quantizing import scopes
from harness.methods.quantizing.fused import FUSED

if TYPE_CHECKING:  # annotations only: methods are listed without torch
    from torch import Tensor, nn

    from harness.methods.quantizing import stored
    from harness.methods.quantizing.fused import Loops
    from harness.methods.quantizing.rounding import Rounding


COMPUTE = Parameter(
    str, AS_MODEL, "dtype of the products: bf16 rounds activations to it; 'dtype' is the model's", (AS_MODEL, "bf16")
)
COMPUTE_OR_FUSED = Parameter(
    str,
    AS_MODEL,
    f"as elsewhere, or '{FUSED}': many rows too are multiplied while codes are unpacked, in the cache",
    (*COMPUTE.choices, FUSED),
    requires=dict.fromkeys((*COMPUTE.choices, FUSED), "numba"),
)


def weight_method(
    *,
    name: str,
    summary: str,
    bits: float,
    quantize: Callable[..., dict[str, Tensor]],
    dequantize: Callable[..., Tensor],
    parameters: Mapping[str, Parameter] | None = None,
    tables: Mapping[str, tuple[float, ...]] | None = None,
    product: Callable[..., Tensor] | None = None,
    computes: bool = False,
    fused: Callable[..., Loops | None] | None = None,
    compiled: Callable[..., Rounding | None] | None = None,
    grain: str = "",
    grid: str = "",
    core: bool = True,
) -> Method:
    """A weight-only method from the two functions that define it.

    Args:
        name: as users write it, 'nf4'.
        summary: one line.
        bits: of a code, scales not counted.
        quantize: (weight (out, in) fp32, **values) -> what is stored, by name. Conv1D weights come transposed, 1-D
            weights as one row. Integers and fp32 scales; must work on meta tensors, which predicts the bytes.
        dequantize: (stored, shape (out, in), **values) -> (out, in) fp32, a tensor of its own; `stored` holds the
            tables too. Runs at every forward.
        parameters: the method's arguments, handed to both functions as **values.
        tables: code tables, fp32, stored once a model.
        product: (x (..., in), stored, shape, bias or None, **values) -> (..., out) in x's dtype, where that is
            faster than F.linear on the dequantized weight; None for the latter.
        computes: `product` takes the argument `compute` (COMPUTE), as every method without one does.
        fused: (stored, shape, **values) -> the loops of `fused`, which multiply few rows of fp32 and unpack
            the weight for more on a CPU, or None where the codes do not fit them.
        compiled: (shape, **values) -> the loop of `rounding` that gives what `quantize` does, to the bit, on a
            CPU, or None where it does not fit the shape.
        grain: 'row' or 'block' where no row, or block of `values["block"]` flattened weights, depends on another: the
            weight is then quantized piece by piece, in the cache. '' quantizes it whole.
        grid: 'affine4:32' where the codes can represent such a grid exactly.
        core: planned by default.

    Returns:
        A Method that takes a scope, loads, sketches and counts.
    """
    takes = (computes or product is None) and "compute" not in (parameters or {})  # an own one is the method's

    def recipe(arguments: Arguments) -> stored.Recipe:
        from harness.methods.quantizing import stored

        values = dict(arguments.values)
        asked = str(values.pop("compute", AS_MODEL)) if takes else AS_MODEL
        compute, slabs = (AS_MODEL, True) if asked == FUSED else (asked, False)
        chosen = functools.partial(product, compute=compute) if product and takes else product
        loops = fused, slabs, compiled
        return stored.Recipe(name, quantize, dequantize, tables or {}, chosen, values, compute, grain, *loops)

    def targets(model: nn.Module, arguments: Arguments) -> list[str]:
        return scopes.select(model, arguments.scope or Scope())

    def sketch(model: nn.Module, arguments: Arguments) -> None:
        from harness.methods.quantizing import stored

        stored.apply(model, recipe(arguments), targets(model, arguments))

    def load(checkpoint: Checkpoint, arguments: Arguments, device: str) -> nn.Module:
        from harness.inputs.models import checkpoints
        from harness.methods.quantizing import streaming

        if device == "cpu":
            wanted = functools.partial(targets, arguments=arguments)
            streamed = streaming.quantized_model(checkpoint, arguments.dtype, recipe(arguments), wanted)
            if streamed is not None:
                return streamed
        model = checkpoints.open_model(checkpoint, arguments.dtype, device)
        sketch(model, arguments)
        return model

    def weights(model: nn.Module) -> Iterator[QuantizedWeight]:
        from harness.methods.quantizing import stored

        return stored.weights(model)

    every = {**(parameters or {}), **({"compute": COMPUTE_OR_FUSED if fused else COMPUTE} if takes else {})}
    facts: Any = {"scoped": True, "grid": grid, "core": core, "concurrent": True}
    return Method(name, summary, bits, load, sketch, weights, targets, every, **facts)


def reference_method(*, name: str, summary: str, bits: float) -> Method:
    """A reference: the unquantized model in the dtype that the name is."""

    def load(checkpoint: Checkpoint, arguments: Arguments, device: str) -> nn.Module:
        from harness.inputs.models import checkpoints

        return checkpoints.open_model(checkpoint, arguments.dtype, device)

    def sketch(model: nn.Module, arguments: Arguments) -> None:
        """Leaves the model as it is."""

    def weights(model: nn.Module) -> Iterator[QuantizedWeight]:
        return iter(())

    def targets(model: nn.Module, arguments: Arguments) -> list[str]:
        return []

    return Method(name, summary, bits, load, sketch, weights, targets, dtype=name, concurrent=True)
