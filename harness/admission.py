"""Whether a method or a metric from elsewhere keeps the declared part of its contract. No torch.

What only running shows (shapes, dtypes, determinism, bytes) is held by `harness.cases.test_contracts`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from harness.contracts import DTYPES, Method, Metric
from harness.specifications import NAME

BETTER = ("lower", "higher", "neither")


def faults(value: Method | Metric) -> Iterator[str]:
    """What is wrong with a declaration, in words; nothing where all is well."""
    yield from _method(value) if isinstance(value, Method) else _metric(value)


def _method(method: Method) -> Iterator[str]:
    if not (isinstance(method.name, str) and NAME.fullmatch(method.name)):
        yield f"its name {method.name!r} is no name that a specification can hold (letters, digits, '.', '_', '-')"
    if not method.bits > 0:
        yield f"its bits are {method.bits!r}, not a number above 0"
    for part in ("load", "sketch", "quantized", "targets"):
        if not callable(getattr(method, part)):
            yield f"its {part} is {getattr(method, part)!r}, which cannot be called"
    if method.dtype not in ("", *DTYPES):
        yield f"its dtype is {method.dtype!r}, not one of {', '.join(DTYPES)} or ''"
    for key, parameter in method.parameters.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", key) or key in ("dtype", "layers", "names", "batch"):
            yield f"its argument '{key}' is named as no argument can be"
        if not isinstance(parameter.default, parameter.kind):
            yield f"its argument '{key}' is of type {parameter.kind.__name__}, its default {parameter.default!r} is not"
        elif parameter.choices and parameter.default not in parameter.choices:
            yield f"its argument '{key}' has the default {parameter.default!r}, which is none of its choices"


def _metric(metric: Metric) -> Iterator[str]:
    if not (isinstance(metric.family, str) and NAME.fullmatch(metric.family)):
        yield f"its family {metric.family!r} is no name"
    if not metric.members:
        yield "it has no members"
    if not callable(metric.measure):
        yield f"its measure is {metric.measure!r}, which cannot be called"
    names = [member.name for member in metric.members]
    for member in metric.members:
        if member.name != metric.family and not member.name.startswith(f"{metric.family}."):
            yield f"its member '{member.name}' does not start with '{metric.family}.'"
        if names.count(member.name) > 1:
            yield f"its member '{member.name}' is there twice"
        if member.better not in BETTER:
            yield f"its member '{member.name}' is better {member.better!r}, not one of {', '.join(BETTER)}"
