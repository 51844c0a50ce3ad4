"""What a user must act on: one line that names the fix. Anything else is a bug and keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from harness.plain import visible

LONGEST = 2000  # characters of a message: a stranger's file must not fill the terminal


class HarnessError(Exception):
    """A mistake in the user's input or world, told in one line that is harmless in a terminal."""

    def __str__(self) -> str:
        text = visible(super().__str__())
        return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


class UnknownName(HarnessError):
    """A name that no catalogue holds; lists the known ones and the nearest."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        super().__init__(f"unknown {kind} '{name}'{hint} (known: {', '.join(names)})")


class BadSpecification(HarnessError):
    """A specification that does not read as NAME or NAME:ARG:ARG, or an argument its owner refuses."""


class MissingAsset(HarnessError):
    """A model, text or file that is not there; the message says how to get it."""


class MissingPackage(HarnessError):
    """An optional distribution that is not installed; the message is the pip command."""

    def __init__(self, distribution: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package '{distribution}': pip install {distribution}")


class BadFile(HarnessError):
    """A baseline, report or configuration file that cannot be read as what it should be."""


class TextTooShort(HarnessError):
    """A text of which a protocol can score no token."""


class IncompleteQuantization(HarnessError):
    """A method that quantized fewer (or other) modules than it was asked to."""
