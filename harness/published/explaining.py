"""`python -m harness explain`: which known fault or protocol makes somebody's perplexities out of ours.

Ours are readings: perplexities of a model on a text, by protocol and method. A *step* is what a fault makes of a
reading: the same figure, or a power of it with whole parameters that programs use (batches of 2 to 64, windows of 512
to 2,048). A step explains a table where every method that both sides have is met in its printed digits, and in no more
than a machine's last bits beside them. Since every further step explains more of anything, `Explained.random` says how
many of 1,000 random tables the same steps would explain. *Marks* are what no formula gives: figures beyond the
vocabulary, and coarse methods that beat fine ones at figures of thousands.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from msgspec import structs

from harness.core.errors import BadSpecification, HarnessError
from harness.core.options import build, read_declared
from harness.core.specification import parse, parse_list, parse_method, parse_models
from harness.inputs.models import names
from harness.published import origins
from harness.published.pitfalls import PITFALLS
from harness.results.directory import nll_reader, read_report

BATCHES, WIDTHS, OVERLAPS = (2, 4, 8, 16, 32, 64), (512, 1024, 2048), (2, 4)
NEAR = 1e-4  # relative: what machines and libraries differ by
RANDOM, SEED = 1000, 20_251_130
LARGEST_VOCABULARY = 50_257  # tokens, where the model's is not known: no figure of a model that reads lies beyond
FAR = 100  # times ours: beyond any protocol with right labels
FINE_TO_COARSE = ("fp32", "bnb-int8", "bnb-nf4", "bnb-fp4")
RIGHT = "the same rule"
PLAIN = origins.Scoring("derivation", "this text")
OTHERS: tuple[origins.Average, ...] = ("fed tokens", "windows", "perplexities")  # than over tokens

Table = Mapping[str, str]  # method -> figure as printed
Readings = Mapping[str, Mapping[str, Decimal]]  # protocol or rule -> method -> our figure


@dataclass(frozen=True)
class Power:
    """What a fault makes of a right figure p: p to a power."""

    fault: str  # a pitfall by name; "" for none
    words: str
    power: float


@dataclass(frozen=True)
class Explanation:
    """One step over one reading, and what it makes of the reference."""

    step: Power
    reading: str
    ours: Decimal
    gives: float

    def told(self, theirs: str) -> str:
        """As the answer says it."""
        power = f" to the power {self.step.power:.6g}" if self.step.power != 1 else ""
        name = f" ({self.step.fault})" if self.step.fault else ""
        return f"their {theirs} is our {float(self.ours):.6g}{power} ({self.reading}): {self.step.words}{name}"


@dataclass(frozen=True)
class Explained:
    """What explains a table."""

    reference: str  # method
    printed: str
    explanations: tuple[Explanation, ...]
    marks: tuple[str, ...]
    steps: int
    random: int  # of RANDOM tables

    def __str__(self) -> str:
        """For a terminal: the surest first."""
        lines = [one.told(self.printed) for one in self.explanations] + [f"mark: {mark}" for mark in self.marks]
        if not lines:
            lines = [f"nothing known makes {self.printed} out of ours"]
        share = f"these {self.steps} steps would explain {self.random} of {RANDOM:,} random tables as well"
        return "\n".join([*lines, share])


def steps(context: int, tokens: int) -> list[Power]:
    """Every step that is tried; overlapping windows only where the text's length is known."""
    found = [Power("", RIGHT, 1.0)]
    found += [
        Power("batch-denominator", f"a sentence's loss over the tokens of its batch of {batch}", 1 / batch)
        for batch in BATCHES
    ]
    found.append(Power("wrong-base", "2 to the mean of nats", math.log(2)))
    widths = [width for width in WIDTHS if width <= (context or max(WIDTHS))]
    for width in widths:
        found.append(Power("", f"divided by all {width} tokens of a window, of which one is not scored", 1 - 1 / width))
        for overlap in OVERLAPS if tokens else ():
            step = width // overlap
            lengths = sum(min(start + width, tokens) - start for start in range(0, tokens, step))
            words = f"windows of {width}, one every {step}, scored whole and divided by the text's {tokens:,} tokens"
            found.append(Power("windows-scored-twice", words, lengths / tokens))
    return found


def explain(theirs: Table, ours: Readings, model: str = "", tokens: int = 0) -> Explained:
    """Hold every step over every reading to a table; the first method of `theirs` is its reference.

    HarnessError where no reading has the reference.
    """
    reference = next(iter(theirs))
    known = {name: reading for name, reading in ours.items() if reference in reading}
    if not known:
        raise HarnessError(f"ours have no figure of {reference}: add --ours {reference}=FIGURE, or --report-dir")
    shape = names.ARCHITECTURES.get(model, {})
    vocabulary = int(shape.get("vocab_size", LARGEST_VOCABULARY))
    context = int(shape.get("max_position_embeddings", shape.get("n_positions", 0)))
    tried = [(step, name) for step in steps(context, tokens) for name in known if suits(step, name)]
    found = []
    for step, name in tried:
        if meets(theirs, known[name], step.power):
            value = known[name][reference]
            found.append(Explanation(step, name, value, float(value) ** step.power))
    largest = max(float(reading[reference]) for reading in known.values())
    marked = marks(theirs, largest, vocabulary)
    chance = random.Random(SEED)
    hits = 0
    for _ in range(RANDOM):
        table = {method: drawn(chance, printed, vocabulary) for method, printed in theirs.items()}
        met = any(meets(table, known[name], step.power) for step, name in tried)
        hits += met or bool(marks(table, largest, vocabulary))
    found.sort(key=lambda one: (one.step.power != 1, abs(one.gives / float(theirs[reference]) - 1)))
    return Explained(reference, theirs[reference], tuple(found), tuple(marked), len(tried), hits)


def suits(step: Power, reading: str) -> bool:
    """Whether a step is tried over a reading: over another average only the same figure and the wrong base."""
    plain = not any(reading.endswith(origins.average_of(rule)) for rule in averaged_otherwise())
    return plain or step.words == RIGHT or step.fault == "wrong-base"


def meets(theirs: Table, ours: Mapping[str, Decimal], power: float) -> bool:
    """Whether a power of ours gives the printed digits of every method that both have; an infinite one never counts."""
    common = [method for method in theirs if method in ours and math.isfinite(float(theirs[method]))]
    return bool(common) and all(met(theirs[method], ours[method], power) for method in common)


def met(printed: str, ours: Decimal, power: float) -> bool:
    """Whether a power of ours lies within the printed digits, our own rounding and a machine's last bits."""
    theirs = float(printed)
    try:
        value: float = float(ours) ** power
    except OverflowError:
        return False
    if not math.isfinite(value):
        return False
    our_rounding = half_unit(ours) / float(ours) * power if ours else 0.0
    return abs(value - theirs) <= float(half_unit(Decimal(printed))) + value * (our_rounding + NEAR * power)


def half_unit(printed: Decimal) -> float:
    """Half of the last printed place."""
    exponent = printed.as_tuple().exponent
    return 0.5 * 10.0**exponent if isinstance(exponent, int) else 0.0


def drawn(chance: random.Random, printed: str, vocabulary: int) -> str:
    """A random figure between 1 and the vocabulary, of equal chance in every octave, with as many decimals."""
    exponent = Decimal(printed).as_tuple().exponent
    decimals = -exponent if isinstance(exponent, int) and exponent < 0 else 2
    return f"{math.exp(chance.uniform(0, math.log(vocabulary))):.{decimals}f}"


def marks(theirs: Table, ours: float, vocabulary: int) -> list[str]:
    """What no formula gives and a table still shows."""
    found = []
    values = {method: float(printed) for method, printed in theirs.items()}
    ordered = [values[method] for method in FINE_TO_COARSE if method in values]
    falls = len(ordered) == len(FINE_TO_COARSE) and ordered == sorted(ordered, reverse=True)
    if falls and FAR * ours < ordered[0] <= vocabulary:
        times = f"{ordered[0] / ours:,.0f} times ours, and the coarser the method the lower"
        found.append(
            f"{times}: labels of the wrong place (labels-shifted-twice, or labels-not-shifted); weights tell which"
        )
    beyond = [method for method, value in values.items() if value > vocabulary]
    if beyond:
        title = PITFALLS["codes-without-scale"].title
        found.append(f"{', '.join(beyond)} beyond a vocabulary of {vocabulary:,}: {title} (codes-without-scale)")
    return found


def figures(given: Sequence[str]) -> dict[str, str]:
    """'fp32=3.05' or '3.05', which is fp32's -> {method: figure}; BadSpecification for what does not read."""
    found = {}
    for text in given:
        method, _, printed = text.rpartition("=")
        try:
            if Decimal(printed) <= 0:
                raise BadSpecification(f"'{text}': a perplexity is above 0")
        except InvalidOperation as error:
            raise BadSpecification(f"'{text}' is no figure: write METHOD=FIGURE, as in fp32=3.05") from error
        found[parse(method or "fp32").name] = printed
    return found


def readings(arguments: argparse.Namespace) -> dict[str, dict[str, Decimal]]:
    """Ours, from --ours, from a report's rows and from what --measure reads."""
    found: dict[str, dict[str, Decimal]] = {}
    if arguments.ours:
        found["ours"] = {method: Decimal(value) for method, value in figures(arguments.ours).items()}
    if arguments.report_dir:
        found |= of_report(arguments.report_dir, arguments.model.partition("=")[0], arguments.text)
    if arguments.measure:
        if not (arguments.model and arguments.text):
            raise BadSpecification("--measure needs --model NAME=SPEC and --text NAME")
        for method in figures(arguments.theirs):
            for name, value in measured(arguments.model, method, arguments.text).items():
                found.setdefault(name, {})[method] = value
    return found


def of_report(folder: Path, model: str, text: str) -> dict[str, dict[str, Decimal]]:
    """A report's perplexities by protocol and method, of one model and text where they are named.

    Where windows' losses are kept, also what other averages of the same losses would print.
    """
    found: dict[str, dict[str, Decimal]] = {}
    nll = nll_reader(folder)
    for row in read_report(folder).rows:
        wanted = (not model or row.model == model) and (not text or row.dataset.partition(":")[0] == text)
        if row.metric != "perplexity" or row.value is None or not wanted or not 0 < row.value < math.inf:
            continue
        method, protocol = parse_method(row.method).name, row.protocol or "ours"
        found.setdefault(protocol, {})[method] = Decimal(row.value)
        losses = nll(row.nll) if row.nll else None
        if losses is None:
            continue
        windows = [losses[place] for place in row.windows if place.stop > place.start]
        fed = [len(window) + 1 for window in windows]
        for rule in averaged_otherwise():
            value = Decimal(origins.printed(rule, windows, fed))
            found.setdefault(f"{protocol}, {origins.average_of(rule)}", {})[method] = value
    return found


def averaged_otherwise() -> list[origins.Scoring]:
    """Every other way to average windows' losses that programs have."""
    found = [structs.replace(PLAIN, average=average) for average in OTHERS]
    return found + [structs.replace(PLAIN, average="batch", batch=batch) for batch in BATCHES]


def rules(text: str) -> Iterator[tuple[str, origins.Scoring]]:
    """Every rule that --measure reads a text by, each document alone."""
    for labels, ahead in ((1, ""), (2, ", labels shifted twice")):
        for average in (PLAIN, *averaged_otherwise()):
            rule = structs.replace(average, text=text, dataset=text, labels=labels)
            yield f"each document alone{ahead}, {origins.average_of(rule)}", rule


def measured(model: str, method: str, text: str) -> dict[str, Decimal]:
    """A method's perplexities on a text under every rule, by its words. Loads the model once."""
    from harness.published import settling

    declared, here = read_declared(Path.cwd())[1], Path.cwd()
    options = build({"models": parse_models(model), "datasets": parse_list(text)}, declared, here)
    reader = settling.Reader(method, options, options.models[0], options.datasets[0])
    every = dict(rules(text))
    return {name: Decimal(settling.figures(rule, reader)[0]) for name, rule in every.items()}
