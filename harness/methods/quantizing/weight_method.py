"""Factories of methods: a quantizer is its codes, or two functions; a reference is a dtype. No torch at import.

A library that quantizes one linear layer at a time says how a layer is replaced, what tensors it then holds and how
they are read back (`layer_method`). From that come scopes (Conv1D too, as the equal Linear), the census, predicted
bytes and the check that no module was left out. One that is not installed is a visible `missing` with its pip command.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from harness.core.contracts import AS_MODEL, Arguments, Checkpoint, Method, Parameter, QuantizedWeight, Scope
from harness.core.errors import BadSpecification
from harness.methods.quantizing import calibration
from harness.methods.quantizing.arguments import hold, reach, select
from harness.methods.quantizing.codes import Codes, Functions, Recipe
from harness.methods.quantizing.int4 import BLOCK

if TYPE_CHECKING:  # annotations only: methods are listed without torch
    from torch import Tensor, nn

GROUP = Parameter(int, 64, "weights of a row that share a scale", choices=(16, 32, 64, 128, 256))


def targets(model: nn.Module, arguments: Arguments) -> list[str]:
    """The weights that the scope selects."""
    return select(model, arguments.scope or Scope())


def linear_targets(model: nn.Module, arguments: Arguments) -> list[str]:
    """The linear layers that the scope selects: what is quantized a layer at a time, or by looking at its inputs."""
    return select(model, arguments.scope or Scope(), linear=True)


def opened(checkpoint: Checkpoint, arguments: Arguments, device: str) -> nn.Module:
    """The unquantized model."""
    from harness.inputs.models import checkpoints

    return checkpoints.open_model(checkpoint, arguments.dtype, device)


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
        compute = str(values.pop("compute", AS_MODEL)) if choice else AS_MODEL  # else it is the codes' own, or none
        return Recipe(name, lying, values, compute)

    def sketch(model: nn.Module, arguments: Arguments) -> None:
        from harness.methods.quantizing import stored

        stored.apply(model, recipe(arguments), targets(model, arguments))

    def load(checkpoint: Checkpoint, arguments: Arguments, device: str) -> nn.Module:
        from harness.methods.quantizing import streaming

        if device == "cpu":
            streamed = streaming.quantized_model(
                checkpoint, arguments.dtype, recipe(arguments), lambda model: targets(model, arguments)
            )
            if streamed is not None:
                return streamed
        model = opened(checkpoint, arguments, device)
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

    def projections(model: nn.Module, arguments: Arguments) -> list[str]:
        if arguments.scope and arguments.scope.part == "all":  # head, embeddings, norms: no inputs to calibrate on
            raise BadSpecification(f"{name} quantizes projections inside the layers: write linear, attention or mlp")
        return linear_targets(model, arguments)

    def sketch(model: nn.Module, arguments: Arguments) -> None:
        from harness.methods.quantizing import gptq, stored

        stored.apply(model, gptq.recipe(name, int(arguments.values["block"])), projections(model, arguments))

    def load(checkpoint: Checkpoint, arguments: Arguments, device: str) -> nn.Module:
        from harness.methods.quantizing import gptq

        model = opened(checkpoint, arguments, device)
        names = projections(model, arguments)
        if not requires:  # refused before minutes of work
            hold(name, reach(model, arguments.scope or Scope(), names))
        for target in names:
            module: Any = model.get_submodule(target)
            inputs = getattr(module, "nx", None) or module.in_features  # nx: of Conv1D
            gptq.refuse_ragged(inputs, int(arguments.values["block"]), name)
        windows, facts = calibration.windows(model, checkpoint, arguments)
        calibrate(model, names, windows, checkpoint, arguments, device)
        model.calibration = facts  # type: ignore[assignment]
        return model

    return Method(
        name,
        summary,
        4,
        load,
        sketch,
        stored_weights,
        projections,
        {"block": BLOCK, **(parameters or {}), **calibration.PARAMETERS},
        scoped=True,
        requires=requires,
        core=False,
        calibrated=True,
        concurrent=concurrent,
    )


def reference_method(*, name: str, summary: str, bits: float) -> Method:
    """A reference: the unquantized model in the dtype that the name is."""
    return Method(
        name,
        summary,
        bits,
        load=opened,
        sketch=lambda model, arguments: None,
        quantized=lambda model: iter(()),
        targets=lambda model, arguments: [],
        dtype=name,
        concurrent=True,
    )


def layer_method(
    *,
    name: str,
    summary: str,
    bits: float,
    requires: tuple[str, ...],
    replace: Callable[..., nn.Module],
    tensors: Callable[[Any], Iterable[Any]],
    read: Callable[[Any], Tensor],
    sketch: Callable[..., nn.Module] | None = None,
    parameters: Mapping[str, Parameter] | None = None,
) -> Method:
    """A method of a library that quantizes one linear layer at a time; planned when named, or with all-installed.

    Args:
        name: as users write it.
        summary: one line.
        bits: of a code, scales not counted.
        requires: distributions, a missing one is said with its pip command.
        replace: (nn.Linear, **values) -> the library's layer in its place, ready to run; called without gradients. A
            Conv1D comes as the equal Linear.
        tensors: a replaced layer -> what holds its weight (scales and zero points too, no bias).
        read: a replaced layer -> (out, in), the weight it stands for.
        sketch: as `replace` for a layer on the meta device, where `replace` itself cannot run there.
        parameters: the method's arguments, handed to `replace` as **values.

    Returns:
        A Method that takes a scope.
    """

    def rebuild(model: nn.Module, arguments: Arguments, build: Callable[..., nn.Module] = sketch or replace) -> None:
        import torch

        for target in linear_targets(model, arguments):
            module = model.get_submodule(target)
            with torch.no_grad():  # what is made of a weight keeps no graph of how
                replaced = build(as_linear(module), **arguments.values)
            replaced.original_kind = type(module).__name__  # type: ignore[assignment]
            for place in [name for name, other in model.named_modules(remove_duplicate=False) if other is module]:
                model.set_submodule(place, replaced)  # a module may stand at several places

    def load(checkpoint: Checkpoint, arguments: Arguments, device: str) -> nn.Module:
        model = opened(checkpoint, arguments, device)
        rebuild(model, arguments, replace)
        return model.eval()

    def quantized(model: nn.Module) -> Iterator[QuantizedWeight]:
        from harness.inputs.models import sizes

        for name, module in model.named_modules():
            kind = vars(module).get("original_kind")
            if kind is None:
                continue

            def dequantize(module: Any = module, kind: str = kind) -> Tensor:
                weight = read(module).detach().float()  # (out, in)
                return weight.T.contiguous() if kind == "Conv1D" else weight

            elements = int(vars(module)["in_features"]) * int(vars(module)["out_features"])
            yield QuantizedWeight(name, kind, elements, sizes.bytes_of(sizes.tensors(*tensors(module))), dequantize)

    return Method(
        name,
        summary,
        bits,
        load,
        rebuild,
        quantized,
        linear_targets,
        parameters or {},
        scoped=True,
        requires=requires,
        core=False,
        reloads=False,  # libraries save in their own ways
    )


def as_linear(module: nn.Module) -> nn.Linear:
    """The layer itself, or the nn.Linear that equals a Conv1D."""
    from torch import Tensor, nn
    from transformers.pytorch_utils import Conv1D

    if not isinstance(module, Conv1D):
        assert isinstance(module, nn.Linear)
        return module
    weight = module.weight  # (in, out)
    assert isinstance(weight, Tensor)
    linear = nn.Linear(weight.shape[0], weight.shape[1], bias=True, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach().T.contiguous(), requires_grad=False)
    linear.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    return linear.eval()
