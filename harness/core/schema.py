"""Files that a stranger may have written, held to a type: what does not fit is one line with the file and the place.

A type that says `schema: int` is of a versioned file: a newer one is refused by its number. A file that carries a
digest of its content (`values.sealed`) is held to it. No torch.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import msgspec

from harness.core.errors import BadFile
from harness.core.files import read_plain
from harness.core.values import broken, parse_json, unsealed

T = TypeVar("T")
SCHEMA = 1  # of measurements.jsonl, baselines, bounds and known faults
DEEPEST = 32  # levels of nesting in YAML; ours have eight
ALTERED = "was changed after it was written"
SHOWN = 60  # characters of a wrong value
STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")  # of msgspec's '$.entries[0].value'; '[...]' is a key of a dict
ERROR = re.compile(r"(.*?)(?: - at `(key` in `)?\$(.*)`)?", re.DOTALL)
WORDS = {"object": "a table", "array": "a list", "str": "text", "int": "a whole number", "float": "a number"}
ITEMS = {str: "texts", int: "whole numbers", float: "numbers"}
WORDS |= {"bool": "true or false"}


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of a file in which no other keys than its fields may stand; `__post_init__` may raise ValueError."""


class Newer(ValueError):
    """A file of a later harness; the message holds the fix."""


def check(data: Any, kind: type[T], *, strict: bool = True) -> T:
    """The data as that type; ValueError, one line, names the place and what belongs there.

    Not `strict`, text may stand for a number: 'nan', 'inf' and '-inf', which JSON has no digits for.
    """
    if "schema" in _hints(cast(Any, kind)) and isinstance(data, dict):
        if "schema" not in data:
            raise ValueError(f"no schema number: begin with schema {SCHEMA}")
        if type(data["schema"]) is int and data["schema"] > SCHEMA:
            raise Newer(f"schema {data['schema']} is newer than this harness reads ({SCHEMA}): upgrade the harness")
    try:
        return msgspec.convert(data, kind, strict=strict)
    except msgspec.ValidationError as error:
        raise ValueError(_told(str(error), data, kind)) from error
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def fit(data: Any, kind: type[T], where: str, fix: str = "") -> T:
    """`check` for part of a file; BadFile begins with `where` and ends with `fix`."""
    try:
        return check(data, kind)
    except ValueError as error:
        ending = f"; {fix}" if fix and not isinstance(error, Newer) else ""
        raise BadFile(f"{where}: {error}{ending}") from error


def read_toml(path: Path, kind: type[T], fix: str = "") -> T:
    """A TOML file as that type; BadFile names the file, the place and what belongs there."""
    return _read(path, kind, fix, "TOML", lambda data: tomllib.loads(data.decode()))


def read_json(path: Path, kind: type[T], fix: str = "") -> T:
    """The same for JSON."""
    return _read(path, kind, fix, "JSON", parse_json)


def read_yaml(path: Path, kind: type[T], fix: str = "") -> T:
    """The same for YAML, without aliases and beyond-reason nesting."""
    return _read(path, kind, fix, "YAML", _parse_yaml)


def _read(path: Path, kind: type[T], fix: str, language: str, parse: Callable[[bytes], Any]) -> T:
    try:
        data = parse(read_plain(path))
    except OSError as error:
        raise BadFile(f"{path} cannot be read as {language}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadFile(f"{path} cannot be read as {language}: {first}" + (f"; {fix}" if fix else "")) from error
    if isinstance(data, dict):
        if broken(data):
            raise BadFile(f"{path} {ALTERED}" + (f"; {fix}" if fix else ""))
        data = unsealed(data)
    return fit(data, kind, str(path), fix)


def _parse_yaml(data: bytes) -> Any:
    """ValueError for what is no YAML, and for what the loader would die of: deep nesting, aliases without end."""
    import yaml  # local: a session without baselines needs none

    loader = _loader()
    text, depth = data.decode(), 0
    try:
        for event in yaml.parse(text, Loader=loader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError("it is nested too deep")
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it holds an alias, which no baseline needs")
        return yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


@functools.cache
def _loader() -> Any:
    """The safe loader, in C (ten times as fast) where it is there; a key that stands twice would hide the first."""
    import yaml

    base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    def construct_mapping(self: Any, node: Any, deep: bool = False) -> Any:
        pairs = node.value if isinstance(node, yaml.MappingNode) else ()
        keys = [key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            raise ValueError(f"'{next(key for key in keys if keys.count(key) > 1)}' stands twice in one table")
        return base.construct_mapping(self, node, deep)

    return type("Loader", (base,), {"construct_mapping": construct_mapping})


def _told(message: str, data: Any, kind: Any) -> str:
    """A message of msgspec's with the whole place, the value that stands there and what is known there."""
    match = ERROR.fullmatch(message)
    assert match, message
    text, words, value, kind = match[1], *_follow(data, kind, match[3] or "")
    name = text.partition("`")[2].rstrip("`")
    at = f"{words}: " if words else ""
    if match[2]:
        return f"{at}a key must be text"
    if text.startswith("Object contains unknown field"):
        return f"{at}no place for '{name}' (known: {', '.join(_hints(kind))})"
    if text.startswith("Object missing required field"):
        return f"{at}no '{name}'"
    if text.startswith("Invalid enum value"):
        choices = ", ".join(repr(str(choice)) for choice in (get_args(kind) or kind))
        return f"{words} must be one of {choices}, not {_brief(value)}"
    if text.startswith("Expected"):
        expected = re.sub(r", got .*| \| null", "", text.removeprefix("Expected ").replace("\n", " "))
        items = ITEMS.get(_present(next(iter(get_args(kind)), None)), "tables")
        expected = re.sub(r"`([^`]*)`", lambda name: WORDS.get(name[1], name[1]), expected)
        expected = expected.replace("a list", f"a list of {items}")
        return f"{words or 'it'} must be {expected}, not {_brief(value)}"
    return at + " ".join(text.split())


def _follow(data: Any, kind: Any, place: str) -> tuple[str, Any, Any]:
    """Where a place of msgspec's leads: its steps in words (lists count from 1), the value there and its type."""
    words = ""
    for name, index in STEP.findall(place):
        kind = _present(kind)
        if name:
            data, kind = data[name], _hints(kind)[name]
            words += f".{name}"
        elif index == "...":
            kind = get_args(kind)[1]
            key = next(key for key, value in data.items() if not _fits(value, kind))
            data, words = data[key], f"{words}.{key}"
        else:
            kind, data = get_args(kind)[0], data[int(index)]
            words += f" {int(index) + 1}"
    return words.removeprefix("."), data, _present(kind)


def _present(kind: Any) -> Any:
    """The type of a value that may be absent too."""
    if get_origin(kind) in (Union, UnionType):
        kind = next(each for each in get_args(kind) if each is not NoneType)
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _fits(value: Any, kind: Any) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """The fields of a type, as they are called in a file, with their types; {} for what has none."""
    if get_origin(kind) is not None or not hasattr(kind, "__annotations__"):
        return {}
    hints = get_type_hints(kind, include_extras=True)
    if issubclass(kind, msgspec.Struct):
        return {field.encode_name: hints[field.name] for field in msgspec.structs.fields(kind)}
    return hints


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
