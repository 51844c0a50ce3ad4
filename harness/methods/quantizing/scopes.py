"""Which weights a method quantizes: words of a specification -> Scope -> module names. No torch at import."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from harness.core.contracts import Scope
from harness.core.errors import BadSpecification, HarnessError, UnknownName

if TYPE_CHECKING:  # annotations only
    from torch import nn

PARTS = ("linear", "attention", "mlp", "all")
KEYS = ("layers", "names")  # arguments of a specification that belong to the scope
# What model families call the two halves of a decoder layer, at the first name below the layer: self_attn, attn,
# attention; mlp, feed_forward, ffn, block_sparse_moe, and OPT's bare fc1 and fc2.
HALVES = {"attention": re.compile(r"attn|attention", re.I), "mlp": re.compile(r"mlp|feed_?forward|ffn|moe|^fc\d", re.I)}


def parse_scope(words: Sequence[str], arguments: Mapping[str, str]) -> Scope:
    """Read a scope: at most one of PARTS, `layers=FIRST-LAST` (inclusive) or `layers=N`, `names=GLOB`.

    Args:
        words: of the specification.
        arguments: of the specification; only KEYS are read.

    Raises:
        UnknownName: a word that is no part.
        BadSpecification: two parts, or a range that does not read.
    """
    for word in words:
        if word not in PARTS:
            raise UnknownName("scope", word, PARTS)
    if len(words) > 1:
        raise BadSpecification(f"scopes '{words[0]}' and '{words[1]}' exclude each other: write one")
    part = words[0] if words else "linear"
    return Scope(part, _layers(arguments.get("layers")), arguments.get("names", ""))


def _layers(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text, re.ASCII)
    if not found:
        raise BadSpecification(f"'layers={text}' is no range of layers: write layers=0-11 or layers=3")
    first, last = int(found[1]), int(found[2] or found[1])
    if last < first:
        raise BadSpecification(f"'layers={text}' runs backwards: write layers={last}-{first}")
    return first, last


def scope_arguments(scope: Scope) -> dict[str, str]:
    """KEYS of a scope written out, whether narrowed or not."""
    layers = f"{scope.layers[0]}-{scope.layers[1]}" if scope.layers else "all"
    return {"layers": layers, "names": scope.names or "*"}


def scope_text(scope: Scope) -> str:
    """As a user would write it: 'linear:layers=0-11'."""
    written = scope_arguments(scope)
    narrow = [f"layers={written['layers']}"] * bool(scope.layers) + [f"names={scope.names}"] * bool(scope.names)
    return ":".join((scope.part, *narrow))


def decoder_layers(model: nn.Module) -> tuple[str, int]:
    """Name and length of the model's stack of layers: the longest ModuleList that lies in no other.

    (A list inside a list holds the experts of a layer, of which there may be more than layers.)
    """
    from torch import nn

    lists = {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = {name: size for name, size in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    if not outer:
        raise HarnessError(f"{type(model).__name__} has no list of layers: a scope cannot be found in it")
    longest = max(outer, key=outer.__getitem__)
    return longest, outer[longest]


def select(model: nn.Module, scope: Scope) -> list[str]:
    """Names of the modules whose weight the scope selects, in the order of the model.

    A tied weight is one weight: it stands under its first name, and is selected where any of its names is. Works on
    a quantized model too, with the same answer.

    Raises:
        BadSpecification: nothing is selected, or `layers` reaches beyond the model.
        HarnessError: the scope covers a weight that is neither a matrix nor a vector (packed experts, convolutions).
    """
    from harness.methods.quantizing import stored

    stack, depth = decoder_layers(model)
    if scope.layers and scope.layers[1] >= depth:
        raise BadSpecification(
            f"scope '{scope_text(scope)}' reaches beyond {type(model).__name__}: its {depth} layers are 0-{depth - 1}"
        )
    chosen = [
        first
        for first, names in stored.weight_owners(model).items()
        if any(_covers(scope, name, stack) and _is_of_part(model, name, scope.part) for name in names)
    ]
    _refuse_unreachable(model, scope, stack)
    if not chosen:
        raise BadSpecification(_nothing(model, scope, stack, depth))
    return chosen


def _covers(scope: Scope, name: str, stack: str) -> bool:
    """Whether a module's name lies in the scope; of its class nothing is asked."""
    below = name.removeprefix(f"{stack}.") if name.startswith(f"{stack}.") else ""
    number, _, inner = below.partition(".")
    if scope.layers and not (below and scope.layers[0] <= int(number) <= scope.layers[1]):
        return False
    if scope.part != "all" and not below:
        return False
    half = HALVES.get(scope.part)
    if half and not half.search(inner.partition(".")[0]):
        return False
    return fnmatchcase(name, scope.names or "*")


def _is_of_part(model: nn.Module, name: str, part: str) -> bool:
    """Whether the module holds a weight that the part takes: any for 'all', else that of a projection."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from harness.methods.quantizing import stored

    projections = (nn.Linear, Conv1D, stored.QuantizedLinear)
    return part == "all" or isinstance(model.get_submodule(name), projections)


def _refuse_unreachable(model: nn.Module, scope: Scope, stack: str) -> None:
    """A matrix that hides in another parameter than `weight` would be left unquantized in silence."""
    for name, module in model.named_modules():
        if not _covers(scope, name, stack):
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None and (parameter.dim() > 2 or (parameter.dim() == 2 and key != "weight")):
                shape = "x".join(map(str, parameter.shape))
                raise HarnessError(
                    f"scope '{scope_text(scope)}' covers {name}.{key} ({shape}, {type(module).__name__}), which no "
                    "weight method quantizes: narrow it with names=GLOB"
                )


def _nothing(model: nn.Module, scope: Scope, stack: str, depth: int) -> str:
    first = model.get_submodule(f"{stack}.0")
    inside = ", ".join(name for name, module in first.named_modules() if "weight" in module._parameters)
    hint = "; lm_head, embeddings and norms need the scope 'all'" if scope.names and scope.part != "all" else ""
    return (
        f"scope '{scope_text(scope)}' selects nothing in {type(model).__name__}: it has layers 0-{depth - 1} "
        f"({stack}.N), each with {inside}{hint}"
    )
