"""Factories of methods: a quantizer is its codes, or two functions; a reference is a dtype. No torch at import."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from harness.core.contracts import AS_MODEL, Arguments, Checkpoint, Method, Parameter, QuantizedWeight, Scope
from harness.core.errors import BadSpecification
from harness.methods.quantizing import calibration, scopes
from harness.methods.quantizing.codes import Codes, Functions, Recipe
from harness.methods.quantizing.int4 import BLOCK

if TYPE_CHECKING:  # annotations only: methods are listed without torch
    from torch import Tensor, nn


def weight_method(
    *,
    name: str,
    summary: str,
    bits: float,
    codes: Codes | None = None,
    quantize: Callable[..., dict[str, Tensor]] | None = None,
    dequantize: Callable[..., Tensor] | None = None,
    parameters: Mapping[str, Parameter] | None = None,
    grid: str = "",
    core: bool = True,
) -> Method:
    """A weight-only method from how its codes lie, or from two functions.

    Args:
        name: as users write it, 'nf4'.
        summary: one line.
        bits: of a code, scales not counted.
        codes: what is stored and how it is used: `int8.Rows8`, `int4.Blocks4`, or one's own.
        quantize: in their place, with `dequantize`: a weight (out, in) fp32, meta tensors too, and **values to tensors
            by name.
        dequantize: these tensors, the shape (out, in) and **values to the weight (out, in) fp32.
        parameters: arguments that both functions take as **values.
        grid: 'affine4:32' where the codes can represent such a grid exactly.
        core: planned by default.

    Returns:
        A Method that takes a scope, loads, sketches and counts.
    """
    if codes is None:
        if quantize is None or dequantize is None:
            raise TypeError(f"the method {name} needs codes, or both quantize and dequantize")
        lying: Codes = Functions(quantize, dequantize, parameters or {})
    elif quantize or dequantize or parameters:
        raise TypeError(f"the method {name} has codes, which bring their own functions and parameters")
    else:
        lying = codes
    choice = {} if lying.compute is None or "compute" in lying.parameters else {"compute": lying.compute}

    def recipe(arguments: Arguments) -> Recipe:
        values = dict(arguments.values)
        compute = (
            str(values.pop("compute", AS_MODEL)) if choice else AS_MODEL
        )  # else it is the codes' own, or there is none
        return Recipe(name, lying, values, compute)

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

    return Method(
        name,
        summary,
        bits,
        load,
        sketch,
        stored_weights,
        targets,
        {**lying.parameters, **choice},
        scoped=True,
        grid=grid,
        core=core,
        concurrent=True,
        uses=("numba",) if lying.uses_numba else (),
    )


def stored_weights(model: nn.Module) -> Iterator[QuantizedWeight]:
    """The quantized weights of a loaded or sketched model, where layers of ours hold them."""
    from harness.methods.quantizing import stored

    return stored.weights(model)


def calibrated_method(
    *,
    name: str,
    summary: str,
    calibrate: Callable[..., None],
    parameters: Mapping[str, Parameter] | None = None,
    requires: tuple[str, ...] = (),
    concurrent: bool = False,
) -> Method:
    """A method that stores what `linear-int4` does, its codes chosen by looking at a text; planned when named.

    Args:
        name: as users write it, 'gptq-int4'.
        summary: one line.
        calibrate: (model, names of the modules to quantize, windows of token ids, checkpoint, arguments, device):
            quantizes them in place.
        parameters: the method's own, beside `block` and those of a calibration.
        requires: distributions.
        concurrent: as `Method.concurrent`.
    """

    def targets(model: nn.Module, arguments: Arguments) -> list[str]:
        scope = arguments.scope or Scope()
        if scope.part == "all":  # embeddings, head and norms have no inputs to calibrate on
            raise BadSpecification(f"{name} quantizes projections inside the layers: write linear, attention or mlp")
        return scopes.select(model, scope)

    def sketch(model: nn.Module, arguments: Arguments) -> None:
        from harness.methods.quantizing import gptq, stored

        stored.apply(model, gptq.recipe(name, int(arguments.values["block"])), targets(model, arguments))

    def load(checkpoint: Checkpoint, arguments: Arguments, device: str) -> nn.Module:
        from harness.inputs.models import checkpoints
        from harness.methods.quantizing import gptq

        model = checkpoints.open_model(checkpoint, arguments.dtype, device)
        names = targets(model, arguments)
        for target in names:  # refused before minutes of work
            gptq.refuse_ragged(gptq.inputs_of(model.get_submodule(target)), int(arguments.values["block"]), name)
        windows, facts = calibration.windows(model, checkpoint, arguments)
        calibrate(model, names, windows, checkpoint, arguments, device)
        model.calibration = facts  # type: ignore[assignment]
        return model

    every = {"block": BLOCK, **(parameters or {}), **calibration.PARAMETERS}
    kind: Any = {"scoped": True, "requires": requires, "core": False, "calibrated": True, "concurrent": concurrent}
    return Method(name, summary, 4, load, sketch, stored_weights, targets, every, **kind)


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
