"""Which plots a section has, their file names and captions. Draws nothing: the report links what `plots` draws."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from harness.core.values import digest
from harness.report.matrix import NO_TEXT, Section, Text, finite
from harness.report.tables import quality_ratio

MOST = 60  # plots of one report: a page with more is not read, and drawing them takes longer than writing it
LONGEST = 160  # characters of a file name's stem; file systems allow 255 bytes with the suffix
SIZED = ("memory.storage", "memory.load_peak")
TIMED = ("latency.prefill", "latency.decode", "latency.forward", "latency.generate", "latency.evaluation")


@dataclass(frozen=True)
class Figure:
    """One plot to be drawn: `kind` is 'quality', 'combined', 'memory' or 'latency'; `text` None for a whole section."""

    kind: str
    section: Section
    text: Text | None
    filename: str
    caption: str


def figures(section: Section) -> tuple[Figure, ...]:
    """The plots for which a section has data: quality against memory and the combined one a text, the others once."""
    found = []
    for text in section.texts:
        names = [method for method in section.methods if drawable(section, method, text)]
        where = f"{section.model} on {section.device}, {text[0]}, {text[1]}"
        if len(names) > 1:  # one point compares with nothing
            caption = f"Loss of quality against memory: {where}"
            found.append(Figure("quality", section, text, filename("quality-memory", section, text), caption))
        if any(finite(section.value(method, "perplexity", text)) for method in section.methods):
            caption = f"Perplexity, memory and latency by method (lower is better): {where}"
            found.append(Figure("combined", section, text, filename("combined", section, text), caption))
    if sized(section):
        caption = f"Memory by method (lower is better): {section.model} on {section.device}"
        found.append(Figure("memory", section, None, filename("memory", section, NO_TEXT), caption))
    if timed(section):
        caption = f"Latency by method (median, quartiles; lower is better): {section.model} on {section.device}"
        found.append(Figure("latency", section, None, filename("latency", section, NO_TEXT), caption))
    return tuple(found)


def drawn(found: Sequence[Section]) -> tuple[tuple[Figure, ...], ...]:
    """The plots of each section; none at all where there would be more than MOST."""
    wanted = tuple(figures(section) for section in found)
    return wanted if sum(map(len, wanted)) <= MOST else tuple(() for _ in wanted)


def drawable(section: Section, method: str, text: Text) -> bool:
    """Whether a method has a place in the plane of storage and loss."""
    ratio = 1.0 if method == section.reference else quality_ratio(section, method, text)
    return finite(ratio) and finite(section.value(method, "memory.storage"))


def sized(section: Section) -> tuple[str, ...]:
    """The sizes worth a panel: what a model needs to run, and what loading it takes."""
    return tuple(name for name in SIZED if any(finite(section.value(method, name)) for method in section.methods))


def timed(section: Section) -> tuple[str, ...]:
    """The two timed measures worth a panel: prefill and decode where they are, else what there is."""
    measured = [name for name in TIMED if any(finite(section.value(method, name)) for method in section.methods)]
    return tuple(measured[:2])


def filename(kind: str, section: Section, text: Text) -> str:
    """A file name that two figures never share and that needs no quoting in a link."""
    parts = [part for part in (kind, section.model, section.device, section.reference, *text) if part]
    stem = "--".join(re.sub(r"[^A-Za-z0-9._=+-]", "-", part.replace(":", "+")) for part in parts)
    odd = any(re.search(r"[^A-Za-z0-9._=:-]|--", part) for part in parts)  # something was replaced, or joins may clash
    if odd or len(stem) > LONGEST:
        stem = f"{stem[:LONGEST]}-{digest(parts)[:8]}"
    return f"{stem}.svg"
