"""A method's specification with every default written out. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping

from harness.core.contracts import DTYPES, Arguments, Method, Parameter
from harness.core.errors import BadSpecification, UnknownName
from harness.core.specification import Specification
from harness.methods.quantizing import scopes

DEFAULT_DTYPES = {"cpu": "fp32", "cuda": "fp16"}  # fp16 is slow or missing in CPU kernels


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
    known = {"dtype", *method.parameters, *(scopes.KEYS if method.scoped else ())}
    for key in given:
        if key not in known:
            raise UnknownName(f"argument of {method.name}", key, known)
    if specification.words and not method.scoped:
        raise BadSpecification(f"'{specification}': {method.name} takes no scope, write {method.name}:key=value")
    dtype = _dtype(specification, method, given.get("dtype"), device)
    scope = scopes.parse_scope(specification.words, given) if method.scoped else None
    values = {
        key: _typed(specification, key, given[key], parameter) if key in given else parameter.default
        for key, parameter in method.parameters.items()
    }
    return Arguments(dtype, scope, values)


def _dtype(specification: Specification, method: Method, given: str | None, device: str) -> str:
    if given is not None and given not in DTYPES:
        raise BadSpecification(f"'{specification}': dtype is one of {', '.join(DTYPES)}, not '{given}'")
    if method.dtype:
        if given not in (None, method.dtype):
            raise BadSpecification(f"'{specification}': {method.name} is a reference in {method.dtype}, drop dtype=")
        return method.dtype
    return given or DEFAULT_DTYPES[device]


def _typed(specification: Specification, key: str, text: str, parameter: Parameter) -> int | float | str:
    try:
        value = parameter.kind(text)
    except ValueError:
        value = None
    kind = {int: "a whole number", float: "a number", str: "a word"}[parameter.kind]
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        raise BadSpecification(f"'{specification}': {key} is {kind} ({parameter.help}), not '{text}'")
    if parameter.choices and value not in parameter.choices:
        choices = ", ".join(map(str, parameter.choices))
        raise BadSpecification(f"'{specification}': {key} is one of {choices}, not '{text}'")
    return value


def method_id(method: Method, arguments: Arguments, batch_size: int) -> str:
    """The method with everything that can move a number: 'nf4:linear:batch=1:block=64:dtype=fp32:layers=all:names=*'.

    Equal ids mean equal arguments, however they were written.
    """
    scope = arguments.scope
    written: Mapping[str, object] = {
        **arguments.values,
        **(scopes.scope_arguments(scope) if scope else {}),
        "batch": batch_size or "auto",
        "dtype": arguments.dtype,
    }
    pairs = tuple(sorted((key, str(value)) for key, value in written.items()))
    return str(Specification(method.name, (scope.part,) if scope else (), pairs))
