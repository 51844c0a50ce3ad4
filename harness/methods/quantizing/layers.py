"""Methods of optional libraries that quantize one linear layer at a time: what all of them share.

A library's file says how a layer is replaced, what tensors it then holds and how they are read back. From that come
scopes (Conv1D too, as the equal Linear), the census, predicted bytes and the check that no module was left out. A
library that is not installed is a visible `missing` with its pip command; nothing here imports one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from harness.core.contracts import Arguments, Checkpoint, Method, Parameter, QuantizedWeight, Scope
from harness.methods.quantizing import scopes

if TYPE_CHECKING:  # annotations only: methods are listed without torch
    from torch import Tensor, nn

GROUP = Parameter(int, 64, "weights of a row that share a scale", choices=(16, 32, 64, 128, 256))


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
        replace: (nn.Linear, **values) -> the library's layer in its place; frozen, ready to run. A Conv1D comes as the
            equal Linear.
        tensors: a replaced layer -> what holds its weight (scales and zero points too, no bias).
        read: a replaced layer -> (out, in), the weight it stands for.
        sketch: as `replace` for a layer on the meta device, where `replace` itself cannot run there.
        parameters: the method's arguments, handed to `replace` as **values.

    Returns:
        A Method that takes a scope.
    """

    def targets(model: nn.Module, arguments: Arguments) -> list[str]:
        return scopes.select(model, arguments.scope or Scope())

    def rebuild(model: nn.Module, arguments: Arguments, build: Callable[..., nn.Module]) -> None:
        for target in targets(model, arguments):
            module = model.get_submodule(target)
            replaced = build(as_linear(module), **arguments.values)
            replaced.original_kind = type(module).__name__  # type: ignore[assignment]
            model.set_submodule(target, replaced)

    def load(checkpoint: Checkpoint, arguments: Arguments, device: str) -> nn.Module:
        from harness.inputs.models import checkpoints

        model = checkpoints.open_model(checkpoint, arguments.dtype, device)
        rebuild(model, arguments, replace)
        return model.requires_grad_(False).eval()

    def sketched(model: nn.Module, arguments: Arguments) -> None:
        rebuild(model, arguments, sketch or replace)

    def quantized(model: nn.Module) -> Iterator[QuantizedWeight]:
        return found_in(model, tensors, read)

    return Method(
        name,
        summary,
        bits,
        load,
        sketched,
        quantized,
        targets,
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
    with_meta = nn.Linear(weight.shape[0], weight.shape[1], bias=True, device="meta", dtype=weight.dtype)
    with_meta.weight = nn.Parameter(weight.detach().T.contiguous(), requires_grad=False)
    with_meta.bias = nn.Parameter(module.bias.detach(), requires_grad=False)
    return with_meta.eval()


def found_in(
    model: nn.Module, tensors: Callable[[Any], Iterable[Any]], read: Callable[[Any], Tensor]
) -> Iterator[QuantizedWeight]:
    """Every replaced layer of a model."""
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
