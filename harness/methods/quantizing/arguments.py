"""A method's specification with every default written out, and the weights that its scope selects.

No torch at import.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from harness.core.contracts import DEFAULT_DTYPES, DTYPES, Arguments, Method, Scope
from harness.core.errors import BadSpecification, HarnessError, UnknownName
from harness.core.specification import Specification

if TYPE_CHECKING:  # annotations only
    from torch import nn

PARTS = ("linear", "attention", "mlp", "all")
KEYS = ("layers", "names")  # arguments of a specification that belong to the scope
# What model families call the two halves of a decoder layer, at the first name below the layer: self_attn, attn,
# attention; mlp, feed_forward, ffn, block_sparse_moe, and OPT's bare fc1 and fc2.
HALVES = {"attention": re.compile(r"attn|attention", re.I), "mlp": re.compile(r"mlp|feed_?forward|ffn|moe|^fc\d", re.I)}


def resolve(specification: Specification, method: Method, device: str) -> Arguments:
    """Type the arguments of a specification and fill in what it leaves out.

    Args:
        specification: 'nf4:attention:block=128', already known to name `method`.
        method: whose parameters these are.
        device: 'cpu' or 'cuda', which decides the default dtype.

    Raises:
        UnknownName: an argument or scope that the method does not have; lists those it has.
        BadSpecification: a value of the wrong type, outside the choices, or a scope where there is none.
    """
    given = dict(specification.arguments)
    known = {"dtype", *method.parameters, *(KEYS if method.scoped else ())}
    if unknown := [key for key in given if key not in known]:
        raise UnknownName(f"argument of {method.name}", unknown[0], known)
    if specification.words and not method.scoped:
        raise BadSpecification(f"'{specification}': {method.name} takes no scope, write {method.name}:key=value")
    dtype = given.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        raise BadSpecification(f"'{specification}': dtype is one of {', '.join(DTYPES)}, not '{dtype}'")
    if method.dtype and dtype not in (None, method.dtype):
        raise BadSpecification(f"'{specification}': {method.name} is a reference in {method.dtype}, drop dtype=")
    scope = parse_scope(specification.words, given) if method.scoped else None
    values = {key: parameter.default for key, parameter in method.parameters.items()}
    for key, parameter in method.parameters.items():
        if key not in given:
            continue
        try:
            value = parameter.kind(given[key])
        except ValueError:
            value = None
        kind = {int: "a whole number", float: "a number", str: "a word"}[parameter.kind]
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            raise BadSpecification(f"'{specification}': {key} is {kind} ({parameter.help}), not '{given[key]}'")
        if parameter.choices and value not in parameter.choices:
            choices = ", ".join(map(str, parameter.choices))
            raise BadSpecification(f"'{specification}': {key} is one of {choices}, not '{given[key]}'")
        values[key] = value
    return Arguments(method.dtype or dtype or DEFAULT_DTYPES[device], scope, values)


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
    part, names, text = words[0] if words else "linear", arguments.get("names", ""), arguments.get("layers")
    if text is None:
        return Scope(part, None, names)
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text, re.ASCII)
    if not found:
        raise BadSpecification(f"'layers={text}' is no range of layers: write layers=0-11 or layers=3")
    first, last = int(found[1]), int(found[2] or found[1])
    if last < first:
        raise BadSpecification(f"'layers={text}' runs backwards: write layers={last}-{first}")
    return Scope(part, (first, last), names)


def method_id(method: Method, arguments: Arguments, batch_size: int) -> str:
    """The method with everything that can move a number: 'nf4:linear:batch=1:block=64:dtype=fp32:layers=all:names=*'.

    Equal ids mean equal arguments, however they were written.
    """
    scope = arguments.scope
    written: Mapping[str, object] = {
        **arguments.values,
        **(scope_arguments(scope) if scope else {}),
        "batch": batch_size or "auto",
        "dtype": arguments.dtype,
    }
    pairs = tuple(sorted((key, str(value)) for key, value in written.items()))
    return str(Specification(method.name, (scope.part,) if scope else (), pairs))


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
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from harness.methods.quantizing import stored

    stack, depth = decoder_layers(model)
    kind, text = type(model).__name__, scope_text(scope)
    if scope.layers and scope.layers[1] >= depth:
        raise BadSpecification(f"scope '{text}' reaches beyond {kind}: its {depth} layers are 0-{depth - 1}")

    def covers(name: str) -> bool:
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

    projections = nn.Module if scope.part == "all" else (nn.Linear, Conv1D, stored.QuantizedLinear)
    chosen = [
        first
        for first, names in stored.weight_owners(model).items()
        if any(covers(name) and isinstance(model.get_submodule(name), projections) for name in names)
    ]
    # a matrix that hides in another parameter than `weight` would be left unquantized in silence
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items() if covers(name) else ():
            if parameter is not None and (parameter.dim() > 2 or (parameter.dim() == 2 and key != "weight")):
                shape = "x".join(map(str, parameter.shape))
                raise HarnessError(
                    f"scope '{text}' covers {name}.{key} ({shape}, {type(module).__name__}), which no weight method "
                    "quantizes: narrow it with names=GLOB"
                )
    if not chosen:
        layer = model.get_submodule(f"{stack}.0")
        inside = [name for name, module in layer.named_modules() if "weight" in module._parameters]
        hint = "; lm_head, embeddings and norms need the scope 'all'" if scope.names and scope.part != "all" else ""
        raise BadSpecification(
            f"scope '{text}' selects nothing in {kind}: it has layers 0-{depth - 1} ({stack}.N), each with "
            f"{', '.join(inside)}{hint}"
        )
    return chosen
