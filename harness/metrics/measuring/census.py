"""What a quantized model is made of: which modules were quantized and which were left, and the bits they take."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from harness.core.contracts import Arguments, Method
from harness.core.errors import IncompleteQuantization
from harness.core.values import digest
from harness.inputs.models import sizes

NAMED = 3  # modules that an error names: enough to recognise the layer, short enough for a line


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
        state, each storage once; `bits_per_weight`, 8 * stored bytes / elements over the quantized weights (of a
        reference its dtype's bits); `names`, sha256 over the sorted names of the quantized modules.

    Raises:
        IncompleteQuantization: modules quantized are not the targets; names the first ones.
    """
    weights = list(method.quantized(model))
    names, targets = {weight.name for weight in weights}, method.targets(original_modules[""], arguments)
    missing, extra = sorted(set(targets) - names), sorted(names - set(targets))
    if off := missing or extra:
        first = ", ".join(off[:NAMED]) + (", ..." if len(off) > NAMED else "")
        left_out = f"left {len(missing)} of {len(targets)} modules unquantized"
        what = left_out if missing else f"quantized {len(extra)} modules it was not asked to"
        raise IncompleteQuantization(f"{method.name} {what}: {first}")
    others: Counter[tuple[str, str]] = Counter()  # (module, class): elements of what is no quantized weight
    seen: set[int] = set()
    for name, module in model.named_modules():
        original = original_modules.get(name, module)
        for key, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen:  # tied ones once
                continue
            if name in names and (key == "weight" or key not in original._parameters):
                continue  # codes under a library's name
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
        "bits_per_weight": sizes.bits_per_weight(weights, arguments.dtype),
        "names": digest(sorted(weight.name for weight in weights)),
    }


def _folded(entries: Iterable[tuple[str, str, int]]) -> list[dict[str, Any]]:
    """Entries that differ in numbers of the name only, counted together; sorted by name and class."""
    counts: Counter[tuple[str, str]] = Counter()
    elements: Counter[tuple[str, str]] = Counter()
    for name, kind, size in entries:
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), kind
        counts[pattern] += 1
        elements[pattern] += size
    return [
        {"modules": pattern, "class": kind, "count": counts[pattern, kind], "elements": elements[pattern, kind]}
        for pattern, kind in sorted(counts)
    ]
