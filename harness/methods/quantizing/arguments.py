"""A method's specification with every default written out, and the weights that its scope selects.

No torch at import.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from harness.core.contracts import DEFAULT_DTYPES, DTYPES, Arguments, Method, Scope
from harness.core.errors import BadSpecification, HarnessError, IncompleteQuantization, UnknownName
from harness.core.specification import Specification

if TYPE_CHECKING:  # annotations only
    from torch import nn

PARTS = ("linear", "attention", "mlp", "all")
KEYS = ("layers", "names")  # arguments of a specification that belong to the scope
# What model families call the two halves of a decoder layer, at the first name below the layer: self_attn, attn,
# attention; mlp, feed_forward, ffn, block_sparse_moe, and OPT's bare fc1 and fc2.
HALVES = {
    "attention": re.compile(r"attn|attention", re.I),
    "mlp": re.compile(r"mlp|feed_?forward|ffn|moe|^fc\d|^experts$|^router$", re.I),
}
LEAST = 0.95  # of the matrices that its scope names: less is another quantization than the one asked for
NAMED = 3  # weights that an error names: enough to recognise the layer, short enough for a line


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
    """Name and length of the text model's stack of layers; of several (`layer_lists`) the first, and the longest."""
    lists = layer_lists(model)
    return next(iter(lists)), max(lists.values())


def layer_lists(model: nn.Module) -> dict[str, int]:
    """The lists of layers of the text model, by name, with their lengths; most models have one.

    Layers are found by their role: inside what transformers calls the decoder of a causal model, beside which vision
    towers and other encoders lie, the nearest lists of modules that have parts. Lists further down belong to those
    layers (experts) or to encoders that hang on the embeddings; lists of single matrices are no layers. Several at one
    depth share the work of one stack (XLM's attentions and feed-forward parts) or follow each other (BLT).

    Raises:
        HarnessError: there is none.
    """
    from torch import nn

    from harness.methods.quantizing.stored import StoredWeight

    def layers(module: nn.Module) -> bool:
        children = (child for element in module.children() for child in element.children())
        return any(not isinstance(child, StoredWeight) for child in children)

    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    home = _decoder(model)
    inside = [name for name in outer if name.startswith(f"{home}.")] if home else outer
    found = [name for name in inside if layers(lists[name])] or [name for name in outer if layers(lists[name])] or outer
    if not found:
        raise HarnessError(f"{type(model).__name__} has no list of layers: a scope cannot be found in it")
    nearest = min(name.count(".") for name in found)
    return {name: len(lists[name]) for name in found if name.count(".") == nearest}


def _decoder(model: Any) -> str:
    """The name of what transformers calls the model's decoder; '' of the whole model, or where it names none."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return next((name for name, module in model.named_modules() if module is decoder), "")


@dataclass(frozen=True)
class Covering:
    """A scope, read on a model: which names lie in it."""

    scope: Scope
    lists: Mapping[str, int]  # of layers

    def below(self, name: str) -> tuple[int, str] | None:
        """The number of the layer that a weight lies in, and which part of it: 'self_attn'; None outside of the layers.

        Where a list holds one part of every layer (XLM), its name is that part's.
        """
        for stack in self.lists:
            if name.startswith(f"{stack}."):
                number, _, inner = name.removeprefix(f"{stack}.").partition(".")
                own = stack.rpartition(".")[2] if len(self.lists) > 1 else ""
                part = own if any(half.search(own) for half in HALVES.values()) else inner.partition(".")[0]
                return int(number), part
        return None

    def covers(self, name: str, module: str = "") -> bool:
        """Whether a weight's name, or its module's, lies in the scope; of its class nothing is asked."""
        at, layers = self.below(name), self.scope.layers
        if (layers or self.scope.part != "all") and at is None:
            return False
        if layers and at and not layers[0] <= at[0] <= layers[1]:
            return False
        half = HALVES.get(self.scope.part)
        if half and at and not half.search(at[1]):
            return False
        glob = self.scope.names or "*"
        return fnmatchcase(name, glob) or fnmatchcase(module, glob)


def read_scope(model: nn.Module, scope: Scope) -> Covering:
    """A scope on a model; BadSpecification where `layers` reaches beyond it."""
    lists = layer_lists(model)
    depth = max(lists.values())
    if scope.layers and scope.layers[1] >= depth:
        raise BadSpecification(
            f"scope '{scope_text(scope)}' reaches beyond {type(model).__name__}: its {depth} layers are 0-{depth - 1}"
        )
    return Covering(scope, lists)


def select(model: nn.Module, scope: Scope, *, linear: bool = False) -> list[str]:
    """Names of the weights that the scope selects, in the order of the model (`stored` says how weights are named).

    Every matrix that a forward multiplies by: linear layers, packed experts, routers; under 'all' whatever is a
    module's `weight` too. A tied weight is one weight: it stands under its first name, and is selected where any of
    its names is. Works on a quantized model too, with the same answer.

    Args:
        model: quantized or not.
        scope: what to select.
        linear: of nn.Linear and Conv1D alone, which is what libraries know; a tied weight stands under that name.

    Raises:
        BadSpecification: nothing is selected, or `layers` reaches beyond the model.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from harness.methods.quantizing import stored

    covering = read_scope(model, scope)
    chosen = []
    for first, names in stored.owners(model).items():
        for name in names:
            module, key = stored.place(model, name)
            if linear:
                wanted = isinstance(module, (nn.Linear, Conv1D, stored.QuantizedLinear))
            else:
                wanted = scope.part == "all" or _is_matrix(module, key)
            if wanted and covering.covers(name, name.removesuffix(f".{key}")):
                chosen.append(name if linear else first)
                break
    if not chosen:
        stack, depth = decoder_layers(model)
        layer = model.get_submodule(f"{stack}.0")
        inside = [name for name in stored.owners(layer) if name]
        hint = "; lm_head, embeddings and norms need the scope 'all'" if scope.names and scope.part != "all" else ""
        raise BadSpecification(
            f"scope '{scope_text(scope)}' selects nothing in {type(model).__name__}: it has layers 0-{depth - 1} "
            f"({stack}.N), each with {', '.join(inside)}{hint}"
        )
    return chosen


def _is_matrix(module: nn.Module, key: str) -> bool:
    from harness.methods.quantizing import stored

    weight = dict(stored.held(module))[key]
    return stored.is_matrix(module, key, weight.layout if isinstance(weight, stored.StoredWeight) else weight.shape)


def reach(model: nn.Module, scope: Scope, quantized: Collection[str]) -> dict[str, Any]:
    """How much of what a model multiplies by, inside a scope, a method reached.

    Args:
        model: unquantized; without weights will do.
        scope: of the method; the default one of methods that take none.
        quantized: names of the weights that were quantized.

    Returns:
        JSON. `stack`: the lists of layers. `named`: elements of matrices that the scope names, `reached`: those of them
        that were quantized, `share`: their ratio. `left`: the others', by name, layer numbers folded to '*'.
        `elsewhere`: elements of matrices outside the layers that the scope does not name, by the part of the model
        that they lie in (the head, a vision tower, an encoder).
    """
    from harness.methods.quantizing import stored

    covering, taken = read_scope(model, scope), set(quantized)
    left, elsewhere = Counter[str](), Counter[str]()
    named = 0
    for names in stored.owners(model).values():
        places = {name: stored.place(model, name) for name in names}
        matrices = [name for name, (module, key) in places.items() if _is_matrix(module, key)]
        if not matrices:
            continue
        module, key = places[matrices[0]]
        weight = module._parameters[key]
        elements = 0 if weight is None else weight.numel()
        if any(covering.covers(name, name.removesuffix(f".{places[name][1]}")) for name in matrices):
            named += elements
            if taken.isdisjoint(names):
                left[folded(matrices[0])] += elements
        elif all(covering.below(name) is None for name in names):
            elsewhere[_branch(matrices[0], next(iter(covering.lists)))] += elements
    reached = named - left.total()
    return {
        "stack": ", ".join(covering.lists),
        "named": named,
        "reached": reached,
        "share": reached / named if named else 1.0,
        "left": dict(left),
        "elsewhere": dict(elsewhere),
    }


def hold(method: str, found: Mapping[str, Any]) -> None:
    """IncompleteQuantization where a method of ours reached less than LEAST of what its scope names."""
    if found["share"] < LEAST:
        raise IncompleteQuantization(
            f"{method} reaches {found['share']:.1%} of the matrices that its scope names, and leaves "
            f"{left_out(found)}: narrow the scope (attention, or names=GLOB), or take another method"
        )


def left_out(found: Mapping[str, Any]) -> str:
    """The largest weights that were not reached, in words."""
    largest = sorted(found["left"], key=lambda name: (-found["left"][name], name))
    return ", ".join(largest[:NAMED]) + (", ..." if len(largest) > NAMED else "")


def folded(name: str) -> str:
    """A module's or weight's name with '*' for numbers of layers and experts."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _branch(name: str, stack: str) -> str:
    """The part of a model that a name lies in: as much of it as the layers' name does not share, and one word more."""
    parts, other = name.split("."), stack.split(".")
    common = next((at for at, pair in enumerate(zip(parts, other, strict=False)) if pair[0] != pair[1]), len(other))
    return ".".join(parts[: common + 1])
