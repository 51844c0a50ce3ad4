"""What a quantized model is made of: which modules were quantized and which were left, and the bits they take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from harness.core.contracts import Arguments, Method, Scope
from harness.core.errors import HarnessError, IncompleteQuantization
from harness.core.values import digest
from harness.inputs.models import checkpoints, sizes
from harness.methods.quantizing.arguments import NAMED, folded, hold, reach

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def census(
    model: nn.Module, method: Method, arguments: Arguments, original_modules: Mapping[str, nn.Module]
) -> dict[str, Any]:
    """Count a loaded or sketched model, and hold it to what the method was asked.

    Args:
        model: under the method.
        method: whose `quantized` and `targets` are compared.
        arguments: with which it was loaded.
        original_modules: dict(named_modules()) of the unquantized model, "" its root; a meta sketch will do.

    Returns:
        JSON: `quantized` and `left` lists of {modules, class, count, elements}, layer numbers folded to '*' (a tied
        weight once, under its first name; `left` counts biases and other parameters too); `quantized_modules`,
        `quantized_elements`, `left_elements`, `elements`; `bytes_by_dtype` over parameters, buffers and quantization
        state, each storage once; `bits_per_weight`, 8 * stored bytes / elements over the quantized weights and over
        the matrices that the scope names and the method did not reach (of a reference its dtype's bits); `names`,
        sha256 over the sorted names of the quantized weights; `matrices`, what `arguments.reach` says of a method.

    Raises:
        IncompleteQuantization: modules quantized are not the targets, or a method of ours reached less than 95% of
            the matrices that its scope names; names the first ones.
    """
    weights = list(method.quantized(model))
    names, targets = {weight.name for weight in weights}, method.targets(original_modules[""], arguments)
    missing, extra = sorted(set(targets) - names), sorted(names - set(targets))
    if off := missing or extra:
        first = ", ".join(off[:NAMED]) + (", ..." if len(off) > NAMED else "")
        left_out = f"left {len(missing)} of {len(targets)} modules unquantized"
        what = left_out if missing else f"quantized {len(extra)} modules it was not asked to"
        raise IncompleteQuantization(f"{method.name} {what}: {first}")
    found = reached(original_modules[""], method, arguments, names)
    others: Counter[tuple[str, str]] = Counter()  # (module, class): elements of what is no quantized weight
    seen: set[int] = set()
    for name, module in model.named_modules():
        original = original_modules.get(name, module)
        for key, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:  # tied ones once
                continue
            if name in names and (key == "weight" or key not in original._parameters):
                continue  # codes under a library's name
            if f"{name}.{key}" in names:
                continue  # packed experts, whose codes lie in their place
            seen.add(id(parameter))
            others[name, type(original).__name__] += parameter.numel()
    quantized = _folded((weight.name, weight.kind, weight.elements) for weight in weights)
    left = _folded((*place, elements) for place, elements in others.items() if elements)
    quantized_elements, left_elements = (sum(entry["elements"] for entry in part) for part in (quantized, left))
    storages: dict[int, tuple[str, int]] = {}  # each once, under the dtype of the first tensor that looks into it
    for tensor in sizes.held(model):
        storage = tensor.untyped_storage()
        storages.setdefault(storage._cdata, (str(tensor.dtype).removeprefix("torch."), storage.nbytes()))
    counts: Counter[str] = Counter()
    for dtype, size in storages.values():
        counts[dtype] += size
    return {
        "quantized": quantized,
        "left": left,
        "quantized_modules": len(weights),
        "quantized_elements": quantized_elements,
        "left_elements": left_elements,
        "elements": quantized_elements + left_elements,
        "bytes_by_dtype": dict(sorted(counts.items())),
        "bits_per_weight": truthful(
            sizes.bits_per_weight(weights, arguments.dtype), quantized_elements, found, arguments
        ),
        "names": digest(sorted(weight.name for weight in weights)),
        **({"matrices": found} if found else {}),
    }


def reached(model: nn.Module, method: Method, arguments: Arguments, names: Iterable[str]) -> dict[str, Any]:
    """`arguments.reach` of a method on the unquantized model, {} of a reference; what is ours is held to it.

    {} too of a method without a scope on a model without a list of layers: it quantizes what it finds.
    """
    if method.dtype:
        return {}
    try:
        found = reach(model, arguments.scope or Scope(), set(names))
    except HarnessError:
        if method.scoped:
            raise
        return {}
    if method.scoped and not method.requires:
        hold(method.name, found)
    return found


def truthful(bits: float, elements: int, found: Mapping[str, Any], arguments: Arguments) -> float:
    """Bits per weight over so many quantized weights, and over what should have been quantized with them."""
    left = found["named"] - found["reached"] if found else 0
    kept = 8 * checkpoints.TORCH_DTYPES[arguments.dtype].itemsize
    return (bits * elements + kept * left) / (elements + left) if left else bits


def predicted(
    config: PretrainedConfig, method: Method, arguments: Arguments, bits: float, elements: int
) -> dict[str, Any]:
    """The same from a configuration: `matrices` and `bits_per_weight`, of a reference nothing.

    Args:
        config: of the unquantized model.
        method: and its arguments.
        arguments: of the method.
        bits: per quantized weight.
        elements: weights that are quantized.
    """
    model = checkpoints.sketch_model(config, arguments.dtype)
    found = reached(model, method, arguments, method.targets(model, arguments))
    return {"matrices": found, "bits_per_weight": truthful(bits, elements, found, arguments)} if found else {}


def _folded(entries: Iterable[tuple[str, str, int]]) -> list[dict[str, Any]]:
    """Entries that differ in numbers of the name only, counted together; sorted by name and class."""
    counts: Counter[tuple[str, str]] = Counter()
    elements: Counter[tuple[str, str]] = Counter()
    for name, kind, size in entries:
        pattern = folded(name), kind
        counts[pattern] += 1
        elements[pattern] += size
    return [
        {"modules": pattern, "class": kind, "count": counts[pattern, kind], "elements": elements[pattern, kind]}
        for pattern, kind in sorted(counts)
    ]
