"""What a report's program did, as data: how it scored, stored, counted time; and what that makes of right figures.

Many faults of scoring are powers. With p the perplexity of the same windows averaged right,

    a sentence's loss over its batch's tokens         printed = p^(1 / batch)
    overlapping windows scored whole, over the text   printed = p^(sum of window lengths / tokens of the text)
    2 to the mean of nats                             printed = p^(ln 2)

so p can be had back from the printed figure alone (`true_figure`). A mean of perplexities, a mean of sentences' means
or labels of the wrong place cannot be turned back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from msgspec import field
from numpy.typing import NDArray

from harness.core.schema import Table

Losses = NDArray[np.floating[Any]]  # (scored tokens,) nats of one window
Source = Literal["report", "program", "derivation"]
Average = Literal["tokens", "fed tokens", "windows", "perplexities", "batch", "text"]
AVERAGES: Mapping[Average, str] = {
    "tokens": "sum of nats / tokens scored",
    "fed tokens": "a window's mean times the tokens fed, over all tokens fed",
    "windows": "mean over windows of a window's mean",
    "perplexities": "mean over windows of a window's perplexity",
    "batch": "a window's nats over the tokens of its whole batch, then the mean over windows",
    "text": "a window's mean times its length, summed over overlapping windows, over the text's length",
}
FROM: Mapping[Source, str] = {
    "report": "as the report says",
    "program": "as its program has it",
    "derivation": "derived from the figures",
}


class OwnCodes(Table, frozen=True):
    """Codes that a program of its own wrote into weights: what no method of ours does, done by hand in `settling`."""

    tensors: tuple[str, ...]  # parameter names by glob
    layers: tuple[int, int] | None = None  # inclusive
    step: Literal["tensor", "row"] = "tensor"  # what shares one scale; a row is an output channel
    form: Literal["absmax", "min-max"] = "absmax"
    rounding: Literal["nearest", "toward zero"] = "nearest"
    scale: Literal["applied", "dropped"] = "applied"
    untied: bool = False  # the head gets a copy of its own, the embedding keeps its values


class Scoring(Table, frozen=True):
    """How a perplexity came about, exactly.

    Attributes:
        source: where the rule is known from.
        text: its name, revision and slice, in words.
        dataset: 'wikitext-2', 'ptb', or the name of a file NAME.txt or NAME.jsonl that a reader must bring.
        unit: what is tokenized at once: each document, or all of them joined by line ends.
        before: documents looked at before any is dropped; 0 for all.
        blank: whether blank documents stay; those that score nothing never count.
        least_words: blank-separated words that a document needs.
        first: documents read of those left; 0 for all.
        strip: blanks and line ends are cut off each document.
        characters: that are left of each document; 0 for all.
        width: tokens of a window; 0 is the model's context.
        step: tokens from window to window; 0 is the width.
        labels: tokens ahead that a position is asked for: 1 is right, 2 is a label shifted twice.
        average: key of `AVERAGES`.
        batch: windows of a batch, in order.
        base: of the power: e, or 2 over the same nats.
        tokens: of the whole text, where it is known: with width and step it fixes the power of `text`.
        note: what else there is to know.
    """

    source: Source
    text: str
    dataset: str = ""
    unit: Literal["document", "text"] = "document"
    first: int = 0
    before: int = 0
    least_words: int = 0
    blank: bool = False
    strip: bool = False
    characters: int = 0
    width: int = 0
    step: int = 0
    labels: Literal[1, 2] = 1
    average: Average = "tokens"
    batch: int = 1
    base: Literal["e", "2"] = "e"
    tokens: int = 0
    note: str = ""

    def __post_init__(self) -> None:
        if self.average == "batch" and self.batch < 2:
            raise ValueError("average 'batch' needs a batch of 2 or more")
        if self.average == "text" and not 0 < self.step < self.width:
            raise ValueError("average 'text' needs 0 < step < width")


class Clocking(Table, frozen=True):
    """What a time includes, and where it was taken.

    Attributes:
        source: where this is known from.
        of: what one time is, in words.
        device: 'card' or 'processor'; "" where nobody says.
        machine: its name, where it is known.
        faults: pitfalls by name, each of which makes the figure no time of what it is called.
        against: why it cannot stand beside the others of its table, in words.
        each: what `seconds` of a figure are of: 'window', 'token'.
        missing: the one fact that keeps anybody from timing it again.
    """

    source: Source
    of: str
    device: Literal["", "card", "processor"] = ""
    machine: str = ""
    faults: tuple[str, ...] = ()
    against: str = ""
    each: str = ""
    missing: str = ""


class Origin(Table, frozen=True):
    """Where what is known of a report is known from."""

    program: str = ""  # repository and files; "" where none was found
    outputs: str = ""  # whether what it printed can be read
    libraries: str = ""
    device: str = ""
    open: tuple[str, ...] = field(default_factory=tuple)  # what no source says


def windows(rule: Scoring, tokens: int, context: int) -> list[tuple[int, int]]:
    """Beginnings and ends of the windows over a text of so many tokens; `context` is the model's."""
    width = min(rule.width or context, context)
    step = rule.step or width
    return [(start, min(start + width, tokens)) for start in range(0, tokens, step)]


def printed(rule: Scoring, losses: Sequence[Losses], fed: Sequence[int], tokens: int = 0) -> float:
    """What a program prints of right losses.

    Args:
        rule: whose averaging and base.
        losses: of each window, in order; none empty.
        fed: tokens of each window, its first included.
        tokens: of the whole text, for the average 'text'.
    """
    means = np.array([np.asarray(one, np.float64).mean() for one in losses])  # (windows,) nats
    if rule.average == "perplexities":
        with np.errstate(over="ignore"):
            return float(np.power(2.0 if rule.base == "2" else math.e, means).mean())
    if rule.average == "tokens":
        mean = math.fsum(float(one.sum(dtype=np.float64)) for one in losses) / sum(map(len, losses))
    elif rule.average == "fed tokens":
        mean = float(np.average(means, weights=fed))
    elif rule.average == "windows":
        mean = float(means.mean())
    elif rule.average == "text":
        mean = float((means * np.array(fed)).sum()) / tokens
    else:
        parts = []
        for start in range(0, len(losses), rule.batch):
            batch = losses[start : start + rule.batch]
            parts += [float(one.sum(dtype=np.float64)) / sum(map(len, batch)) for one in batch]
        mean = math.fsum(parts) / len(parts)
    with np.errstate(over="ignore"):
        return float(np.power(2.0 if rule.base == "2" else math.e, mean))


def exponent(rule: Scoring, context: int = 0) -> float | None:
    """K in printed = p^k; None where no power leads from the printed figure to a perplexity."""
    if rule.labels != 1 or rule.average == "perplexities":
        return None
    power = math.log(2) if rule.base == "2" else 1.0
    if rule.average == "batch":
        return power / rule.batch
    if rule.average == "text":
        if not rule.tokens:
            return None
        lengths = sum(end - start for start, end in windows(rule, rule.tokens, context or rule.width))
        return power * lengths / rule.tokens
    return power


def true_figure(rule: Scoring, figure: float) -> float | None:
    """p, the perplexity that the printed figure is a power of; None where there is none or the figure is infinite."""
    power = exponent(rule)
    if power is None or not math.isfinite(figure) or figure <= 0:
        return None
    return float(figure ** (1 / power))


def of_the_figure(rule: Scoring) -> str:
    """What p is a perplexity over: the words behind 'true'."""
    return {
        "batch": "over tokens, batches weighted alike",
        "text": "over windows weighted by their length",
        "windows": "over windows weighted alike",
        "fed tokens": "over windows weighted by the tokens fed",
    }.get(rule.average, "over tokens")


def average_of(rule: Scoring) -> str:
    """How a rule averages, in words."""
    return AVERAGES[rule.average].replace("its whole batch", f"its whole batch of {rule.batch}")


def words(rule: Scoring) -> str:
    """A rule in a sentence."""
    cut = f"each cut to {rule.characters} characters" * bool(rule.characters)
    alone = "each document alone" if rule.unit == "document" else "joined by line ends"
    width = f"windows of {rule.width} tokens" * bool(rule.width)
    step = f"one every {rule.step}, scored whole" * bool(rule.step)
    labels = "labels shifted twice" * (rule.labels == 2)
    power = "2 to that power instead of e" * (rule.base == "2")
    parts = (rule.text, cut, alone, width, step, labels, average_of(rule), power, rule.note)
    return f"{', '.join(part for part in parts if part)} ({FROM[rule.source]})"
