"""Specifications: NAME or NAME:ARG:ARG, ARG a word or key=value; lists are separated by commas.

One grammar for models, methods, datasets and protocols. A *source* (`path:`, `hub:`, `package:`,
`text:`, `ptb:`) takes everything behind its first colon as one word, since paths hold colons.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from urllib.parse import quote

from harness.core.errors import BadSpecification

SOURCES = frozenset({"path", "hub", "package", "text", "ptb"})
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, order=True)
class Specification:
    """A parsed specification. `words` keep their order; `arguments` are (key, value) sorted by key.

    `source` changes where a model lies, not what it is called: texts and comparisons leave it out.
    """

    name: str
    words: tuple[str, ...] = ()
    arguments: tuple[tuple[str, str], ...] = ()
    source: str = field(default="", compare=False)  # of a model: what its name is read from, as the user said

    def __str__(self) -> str:
        """The canonical text: equal specifications have equal texts, and the text parses back."""
        pairs = tuple(f"{key}={value}" for key, value in self.arguments)
        return ":".join((self.name, *self.words, *pairs))

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


def parse_list(text: str, read: Callable[[str], Specification] = parse) -> tuple[Specification, ...]:
    """Read a comma-separated list; an empty list or a duplicate is an error."""
    parsed = tuple(read(part) for part in text.split(","))
    if len(set(parsed)) != len(parsed):
        raise BadSpecification(f"'{text}' names the same thing twice")
    return parsed


def parse_models(text: str) -> tuple[Specification, ...]:
    """`parse_list` of models, each as `parse_model` reads it."""
    return parse_list(text, parse_model)
