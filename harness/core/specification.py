r"""Specifications: NAME or NAME:ARG:ARG, ARG a word or key=value; lists are separated by commas.

One grammar for models, methods, datasets and protocols. A *source* (`path:`, `hub:`, `package:`, `text:`, `text-raw:`,
`ptb:`) takes everything behind its first colon as one word, since paths hold colons; a dataset's may end in
`:column=NAME`. In a list `\,` is a comma that belongs to an item.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote

from harness.core.errors import BadSpecification

SOURCES = frozenset({"path", "hub", "package", "text", "text-raw", "ptb"})
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
OF_SOURCE = re.compile(rf"(?:[^:=,]+=)?(?:{'|'.join(sorted(SOURCES))}):")  # what a list's item begins with
COLUMN = ":column="


@dataclass(frozen=True, order=True)
class Specification:
    """A parsed specification. `words` keep their order; `arguments` are (key, value) sorted by key.

    `source` changes where a model lies, not what it is called: texts and comparisons leave it out.
    """

    name: str
    words: tuple[str, ...] = ()
    arguments: tuple[tuple[str, str], ...] = ()
    source: str = field(default="", compare=False)  # of a model: what its name is read from, as the user said
    model: str = ""  # of a reference: the other model that it is of

    def __str__(self) -> str:
        """The canonical text: equal specifications have equal texts, and the text parses back."""
        pairs = tuple(f"{key}={value}" for key, value in self.arguments)
        text = ":".join((self.name, *self.words, *pairs))
        return f"{text}={self.model}" if self.model else text

    @property
    def filename(self) -> str:
        """An injective file name: ':' reads '+', anything unusual is percent-encoded ('@' and '+' too)."""
        return quote(str(self), safe="-_.=,:").replace(":", "+")


def parse(text: str) -> Specification:
    """Read one specification; BadSpecification quotes the text and says what is wrong with it."""
    text = text.strip()
    name, _, rest = text.partition(":")
    if not NAME.fullmatch(name):
        raise BadSpecification(f"'{text}' is no specification: write NAME or NAME:ARG:key=value")
    if name in SOURCES:
        if not rest:
            raise BadSpecification(f"'{text}' names no source: write {name}:WHAT")
        return Specification(name, (rest,))
    words: list[str] = []
    arguments: dict[str, str] = {}
    for part in rest.split(":") if rest or text.endswith(":") else ():
        key, equals, value = part.partition("=")
        if not part or (equals and not (key and value)):
            raise BadSpecification(f"'{text}' has an empty argument: write NAME:ARG:key=value")
        if not equals:
            words.append(part)
        elif key in arguments:
            raise BadSpecification(f"'{text}' gives '{key}' twice")
        else:
            arguments[key] = value
    return Specification(name, tuple(words), tuple(sorted(arguments.items())))


def parse_model(text: str) -> Specification:
    """Read a model: a specification, or NAME=SPEC, which keeps NAME and takes the weights from SPEC."""
    name, equals, source = text.strip().partition("=")
    if not equals or not NAME.fullmatch(name):  # an "=" behind a colon belongs to a source or an argument
        return parse(text)
    return replace(parse(name), source=str(parse(source)))


def with_column(argument: str) -> tuple[str, str]:
    """What a source names without its `:column=NAME`, and NAME, "" for none; BadSpecification for an empty one."""
    named, given, column = argument.rpartition(COLUMN)
    if given and not column:
        raise BadSpecification(f"'{argument}' names no column: write :column=NAME")
    return (named, column) if given else (argument, "")


def items(text: str) -> list[str]:
    r"""The items of a list, parted by commas; `\,` is a comma that belongs to an item."""
    return [part.replace(r"\,", ",") for part in re.split(r"(?<!\\),", text)]


def listed(parts: Iterable[object]) -> str:
    """The list that `items` reads back, where a source's path holds commas."""
    return ",".join(text.replace(",", r"\,") if OF_SOURCE.match(text) else text for text in map(str, parts))


def parse_method(text: str) -> Specification:
    """Read a method: a specification, or as a reference METHOD=MODEL, the method of another model."""
    name, equals, model = text.strip().partition("=")
    if not equals or not NAME.fullmatch(name):
        return parse(text)
    return replace(parse(name), model=str(parse(model)))


def other_model(method: str) -> str:
    """The other model that a row's method is of, as a reference may be: 'path:BASE' of 'fp32=path:BASE'; else ''."""
    name, equals, model = method.partition("=")
    return model if equals and NAME.fullmatch(name) else ""


def parse_reference(text: str) -> Specification:
    """Read a reference: a method, METHOD=MODEL, or the source of a model alone, which is then read in fp32."""
    found = parse_method(text)
    return Specification("fp32", model=str(found)) if found.name in SOURCES else found


def parse_list(text: str, read: Callable[[str], Specification] = parse) -> tuple[Specification, ...]:
    """Read a comma-separated list; an empty list or a duplicate is an error."""
    parts = items(text)
    for first, second in itertools.pairwise(parts):
        if OF_SOURCE.match(first) and _there(f"{first.partition(':')[2]},{second}"):
            raise BadSpecification(f"'{first},{second}': a comma that belongs to a path is written '\\,'")
    parsed = tuple(map(read, parts))
    if len(set(parsed)) != len(parsed):
        raise BadSpecification(f"'{text}' names the same thing twice")
    return parsed


def _there(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except (OSError, RuntimeError):  # a name that is too long, a user without a home
        return False


def parse_models(text: str) -> tuple[Specification, ...]:
    """`parse_list` of models, each as `parse_model` reads it."""
    return parse_list(text, parse_model)
