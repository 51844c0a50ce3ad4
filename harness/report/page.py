"""The report as one HTML file: no network, no library in it, opened from the disk.

The answer, the main table, the plots and the account are written out by a template, so that they are there without
JavaScript. What is known of each case lies in the file as JSON, in words; the script shows it when it is asked for.
What a name holds is harmless: the template escapes it, the JSON has no `<`, and the page's policy runs no script and
takes no style but our own.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.records import Case, Row, Verdict
from harness.core.text import MIB, NOTHING, mib, milliseconds, number, perplexity, plural, visible
from harness.core.values import encode, flatten
from harness.judge.two_reports import INVARIANT, holds, seen
from harness.judge.verdicts import command as command_for
from harness.report.account import (
    METHOD_FILE,
    MISSING,
    SHOWN,
    Decision,
    by_measure,
    complete,
    decide,
    failing,
    grouped,
    opening,
    sections,
    tally_of,
)
from harness.report.charts import Chart, Dot, lanes, plane
from harness.report.conditions import facts_of, figure, protocol_of, where
from harness.report.plots import MOST
from harness.report.tables import (
    ASPECTS,
    Factor,
    MethodLine,
    decisions,
    lines,
    loss,
    pace,
    share,
    timed_row,
)
from harness.results.directory import PUBLISHED_PAGE, SavedSession

if TYPE_CHECKING:
    from jinja2 import Template

HERE = Path(__file__).parent
PAGEFUL = 100  # lines of the main table at a time, reasons and cases of a list; page.js turns the table's pages
SIGNS = {"bad": "✕", "open": "?", "good": "✓"}  # beside each verdict, so that its colour says nothing alone
NO_COMMAND = "harness.measure(module, tokenizer, ...)"  # of a caller's own module, which no command line reaches
RatioOf = Callable[[MethodLine], Factor | None]


@dataclass(frozen=True)
class Cell:
    """A figure of the main table: its words, a smaller line below, what it sorts by (None last), its case."""

    words: str
    below: str = ""
    key: float | None = None
    link: str = ""


@dataclass(frozen=True)
class Judged:
    """A verdict of the page: its word, tone and sign, what it sorts by, and the case that it comes from."""

    word: str
    tone: str
    key: int
    link: str
    aside: str = ""

    @property
    def sign(self) -> str:
        """What says the same as its colour."""
        return SIGNS[self.tone]


def judged(verdict: Verdict, link: str = "", aside: str = "", row: Row | None = None) -> Judged:
    """A verdict (of a row) as the page shows it: bad is what a session fails on, open what could not be decided."""
    bad, undecided = Verdict.WORSE.severity, Verdict.UNRECORDED.severity
    tone = "bad" if verdict.severity <= bad else "open" if verdict.severity <= undecided else "good"
    tone = "bad" if row is not None and row.verdict is verdict and failing(row) else tone
    return Judged(str(verdict), tone, verdict.severity, link, aside)


def page(session: SavedSession, published_figures: Sequence[Mapping[str, Any]] = ()) -> str:
    """The whole report as HTML, of what `document.markdown` takes."""
    notes = session.notes
    if published_figures:
        from harness import published  # few reports have any

        summary = (
            f"Published figures, computed again: {published.summary(published_figures)} They stand in {PUBLISHED_PAGE}."
        )
        notes = (*notes, summary)
    rows = complete(session.rows, session.planned)
    return Page(rows, session.planned, session.environments).render(notes, session.command)


class Page:
    """What the template shows of complete rows. '#case-N' is the N-th row, '#row-N' the N-th line of the main table."""

    def __init__(
        self, rows: Sequence[Row], planned: Sequence[Case], environments: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self.rows, self.environments = rows, environments
        self.mine = rows[: len(set(planned))]  # what answers the plan comes first
        self.places = {row.case: place for place, row in enumerate(rows)}
        self.sections = sections([row for row in rows if row.case.family != INVARIANT])
        self.lines = [line for section in self.sections for line in lines(section)]
        self.numbers = {line.key: number for number, line in enumerate(self.lines)}
        timed = dict.fromkeys(row.metric for row in rows if row.case.family == "latency")
        self.timed = list(by_measure(timed).values())[:2]
        self.groups: dict[str, int] = {}  # facts that many cases share, as JSON, with their place in the list

    def render(self, notes: Sequence[str], command: str) -> str:
        """The file's text."""
        script, style = (HERE.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("js", "css"))
        failed = [row for row in self.mine if failing(row)]
        failed.sort(key=lambda row: row.value is None)  # what was measured first
        return template("page.html.jinja").render(
            opening=opening(self.mine),
            whole=judged(whole.verdict, row=whole.row) if (whole := decide(self.mine)) else None,
            tally=tally_of(self.mine).capitalize(),
            failed=[self.named(row) for row in failed[:SHOWN]],
            unnamed=max(0, len(failed) - SHOWN),
            notes=[*notes, *(f"{section.model}: {note}" for section in self.sections for note in section.notes())],
            headers=self.headers(),
            lines=self.table(),
            pageful=PAGEFUL,
            words=[str(word) for word in Verdict if any(word is row.verdict for row in self.rows)],
            glance=self.glance(),
            references=self.references(),
            drawn=self.drawn(),
            most=MOST,
            accounts=self.accounts(),
            reasons=self.reasons(),
            extra=len(self.rows) - len(self.mine),
            invariants=self.invariants(),
            protocols=sorted({text for row in self.rows if (text := protocol_of(row))}),
            worlds=self.worlds(),
            command=command.splitlines(),
            data=told(self.data()),
            script=script,
            style=style,
            script_hash=sha256(script),
            style_hash=sha256(style),
        )

    def link(self, row: Row | None) -> str:
        """To a case's details."""
        return f"#case-{self.places[row.case]}" if row is not None else ""

    def row_link(self, line: MethodLine) -> str:
        """To all cases of a line."""
        return f"#row-{self.numbers[line.key]}"

    # the main table

    def headers(self) -> list[tuple[str, str, bool]]:
        """Of each column its name, what it holds, and whether that is a figure."""
        times = [
            (f"{short(name)} ratio", f"{name} over the reference's, paired in one run", True) for name in self.timed
        ]
        return [
            ("model", "and its device", False),
            ("method", "and, below it, bits a weight", False),
            ("text", "and how it is read", False),
            ("perplexity ratio", "to the reference's, with its 95% interval; below it the perplexity", True),
            ("quality", "the most severe verdict on losses and divergences", False),
            ("storage, MiB", "every byte that the model needs to run; below it the ratio to the reference's", True),
            ("memory", "the most severe verdict on bytes", False),
            *times,
            ("speed", "the most severe verdict on times", False),
        ]

    def table(self) -> list[dict[str, Any]]:
        """The lines of the main table, and by which words and tones the filter finds each."""
        aligned = {
            (section.model, section.device, section.reference, method)
            for section in self.sections
            for method in section.methods
            if section.aligned(method)
        }
        found = []
        for line in self.lines:
            section, own = line.section, decisions(line.rows)
            verdicts = {name: judged(one.verdict, self.link(one.row), one.aside, one.row) for name, one in own.items()}
            bits = next((row.bits_per_weight for row in line.rows if row.bits_per_weight is not None), None)
            found.append(
                {
                    "link": self.row_link(line),
                    "model": section.model,
                    "device": section.device + (f", against {section.reference}" * (section.reference != "fp32")),
                    "method": line.method,
                    "reference": line.is_reference,
                    "aligned": line.key[:4] in aligned,
                    "bits": "" if bits is None else f"{number(bits)} bits/weight",
                    "text": line.text[0],
                    "protocol": section.protocol(line.text),
                    "cells": (
                        self.quality(line),
                        verdicts.get("quality"),
                        self.storage(line),
                        verdicts.get("memory"),
                        *(self.time(line, metric) for metric in self.timed),
                        verdicts.get("speed"),
                    ),
                    "found_by": "|".join(sorted(found_by(own.values()))),
                }
            )
        return found

    def quality(self, line: MethodLine) -> Cell | None:
        """Perplexity over the reference's, and the perplexity itself."""
        plain, delta = (line.section.row(line.method, name, line.text) for name in ("perplexity", "perplexity.delta"))
        below = perplexity(plain.value) if plain is not None and plain.value is not None else ""
        return self.cell(delta or plain, loss(line), below)

    def storage(self, line: MethodLine) -> Cell | None:
        """MiB, and how many times the reference's."""
        row, found = line.section.row(line.method, "memory.storage"), share(line)
        if row is None or row.value is None or found is None:
            return self.cell(row, None, "" if row is None or row.value is None else f"{mib(row.value)} MiB")
        return Cell(mib(row.value), f"× {number(found.value, 3)}", row.value, self.link(row))

    def time(self, line: MethodLine, metric: str) -> Cell | None:
        """A time over the reference's; of the reference itself how far two of its streams were apart (A/A)."""
        row, found = timed_row(line, metric), pace(line, metric)
        if not line.is_reference or found is None:
            return self.cell(row, found)
        return self.cell(row, Factor(1.0), f"A/A {found.words}")

    def cell(self, row: Row | None, found: Factor | None, below: str = "") -> Cell | None:
        """A ratio in the main table; None where nothing was planned."""
        if row is None:
            return None
        if row.value is None or found is None:
            return Cell(MISSING if row.missing else NOTHING, below, None, self.link(row))
        words = "1" if found == Factor(1.0) else found.words
        return Cell(words, below, found.value if math.isfinite(found.value) else None, self.link(row))

    # the answer

    def named(self, row: Row) -> dict[str, Any]:
        """A case as a line of a list: its verdict, where it stands, and why."""
        return {"verdict": judged(row.verdict, self.link(row), row=row), "where": where(row.case), "reason": row.reason}

    def glance(self) -> list[dict[str, Any]]:
        """For each kind how many lines have which verdict, and which are at its ends."""
        judgements = [decisions(line.rows) for line in self.lines]
        last = self.timed[-1] if self.timed else ""  # decode where it is: what a reader of generated text waits for
        speed = functools.partial(pace, metric=last)
        ends: dict[str, list[tuple[str, RatioOf, bool]]] = {
            "quality": [("largest loss", loss, True), ("smallest loss", loss, False)],
            "memory": [("largest", share, True), ("smallest", share, False)],
            "speed": [(f"slowest {short(last)}", speed, True), (f"fastest {short(last)}", speed, False)],
        }
        found = []
        for name in ASPECTS:
            if counts := Counter(own[name].verdict for own in judgements if name in own):
                verdicts = [(counts[word], judged(word)) for word in Verdict if counts[word]]
                at_ends = [(what, end) for what, read, most in ends[name] if (end := self.end(read, most=most))]
                found.append({"kind": name, "verdicts": verdicts, "ends": at_ends})
        return found

    def end(self, read: RatioOf, *, most: bool) -> dict[str, str] | None:
        """The line, but the reference's, whose ratio is the largest or the smallest; None where none has one."""
        others = ((read(line), line) for line in self.lines if not line.is_reference)
        known = [(factor, line) for factor, line in others if factor is not None and math.isfinite(factor.value)]
        if not known:
            return None
        factor, line = (max if most else min)(known, key=lambda pair: pair[0].value)
        places = [line.section.model] * (len(self.sections) > 1) + [line.text[0]] * (len(line.section.texts) > 1)
        return {
            "method": line.method,
            "where": ", ".join(filter(None, places)),
            "figure": f"× {factor.words}",
            "link": self.row_link(line),
        }

    def references(self) -> list[str]:
        """The references' own times: the only milliseconds of the page beside a case's details."""
        found = []
        for section in self.sections:
            rows = (section.row(section.reference, name) for name in self.timed)
            if own := [f"{short(row.metric)} {milliseconds(row.value)} ms" for row in rows if row and row.value]:
                found.append(f"{section.reference} of {section.model} on {section.device}: {', '.join(own)} (median)")
        return found

    # plots

    def drawn(self) -> list[tuple[str, list[Chart]]] | None:
        """The plots, those of one model and text together; None where there would be too many to look at."""
        found: list[tuple[str, list[Chart]]] = []
        count = 0
        for section in self.sections:
            by_text = grouped((line for line in self.lines if line.section is section), lambda line: line.text)
            for place, (text, own) in enumerate(by_text.items()):
                name = ", ".join(filter(None, (f"{section.model} on {section.device}", *text)))
                plots = [plot for plot in self.plots(own, whole=place == 0) if plot is not None]
                count += len(plots)
                if count > MOST:
                    return None
                found += [(name, plots)] if plots else []
        return found

    def plots(self, own: Sequence[MethodLine], *, whole: bool) -> list[Chart | None]:
        """Loss against storage and ratios of quality; of the `whole` model, which needs it once, bytes and times."""
        sizes = {line.method: line.section.value(line.method, "memory.storage") for line in own}
        losses = self.dots(own, "quality", loss)
        across = [
            replace(dot, across=size / MIB, told=f"{dot.told}, {mib(size)} MiB")
            for dot in losses
            if (size := sizes[dot.name]) is not None
        ]
        plots = [
            plane("Perplexity ratio (up) against storage in MiB: lower left is better", across),
            lanes("Perplexity over the reference's: left is better", losses),
        ]
        if whole:
            plots.append(lanes("Storage over the reference's: left is smaller", self.dots(own, "memory", share)))
            for metric in self.timed:
                title = f"Time of {short(metric)} over the reference's, paired: left is faster"
                plots.append(lanes(title, self.dots(own, "speed", functools.partial(pace, metric=metric))))
        return plots

    def dots(self, own: Sequence[MethodLine], kind: str, read: RatioOf) -> list[Dot]:
        """What is to be drawn of each line that has such a ratio."""
        found = []
        for line in own:
            if (factor := read(line)) is None:
                continue
            one = decisions(line.rows).get(kind)
            tone = "reference" if line.is_reference else judged(one.verdict, row=one.row).tone if one else "good"
            named = f"{line.section.model}, {line.method}" + (" (reference, against itself)" * line.is_reference)
            verdict = f"; {one.verdict}" if one else ""
            told = f"{named}: × {factor.words}{verdict}"
            found.append(Dot(line.method, *factor, factor.words, told, self.row_link(line), tone))
        return found

    # the account

    def accounts(self) -> list[dict[str, Any]]:
        """Planned, ran, missing and verdicts of each model and device."""
        found = []
        for (model, device), own in grouped(self.mine, lambda row: (row.model, row.device)).items():
            counts = Counter(row.verdict for row in own)
            verdicts = [(counts[word], judged(word)) for word in Verdict if counts[word]]
            found.append({"model": model, "device": device, "tally": tally_of(own), "verdicts": verdicts})
        return found

    def reasons(self) -> list[dict[str, Any]]:
        """Why cases are missing, failed or undecided: each verdict and reason with the cases that it speaks of."""

        def reason(row: Row) -> str:  # the command that records a case stands with the case
            return METHOD_FILE.sub("*", row.reason.partition("; to record it: ")[0])

        unsettled = [row for row in self.mine if judged(row.verdict, row=row).tone != "good"]
        groups = grouped(unsettled, lambda row: (row.verdict, reason(row)))
        return [
            {
                "verdict": judged(verdict),
                "reason": why,
                "count": plural(len(own), "case"),
                "cases": [(self.link(row), where(row.case)) for row in own[:PAGEFUL]],
                "more": max(0, len(own) - PAGEFUL),
            }
            for (verdict, why), own in sorted(groups.items(), key=lambda item: item[0][0].severity)
        ]

    def invariants(self) -> dict[str, Any] | None:
        """How many checks hold, and those that do not; None where none was planned."""
        checks = [row for row in self.rows if row.case.family == INVARIANT]
        wrong = [row for row in checks if row.value is None or not holds(row) or row.verdict is Verdict.BETTER]
        held = f"{len(checks) - len(wrong):,} of {plural(len(checks), 'check')} hold."
        return {"held": held, "wrong": [{**self.named(row), "seen": seen(row)} for row in wrong]} if checks else None

    def worlds(self) -> dict[str, Any]:
        """The environments that rows were measured in, side by side: their names, and each field's values."""
        used = Counter(row.environment for row in self.rows if row.value is not None and row.environment)
        known = {name: flatten(self.environments[name]) for name in used if name in self.environments}
        fields = dict.fromkeys(field for world in known.values() for field in world)
        return {
            "names": [f"{name} ({plural(used[name], 'row')})" for name in known],
            "fields": [(field, [world.get(field) or NOTHING for world in known.values()]) for field in fields],
        }

    # what the script shows

    def data(self) -> dict[str, Any]:
        """Cases with everything known of them, which of them each line of the table has, and shared groups of facts."""
        cases = [self.case(row) for row in self.rows]
        rows = [
            {
                "title": line.method,
                "where": ", ".join(filter(None, (line.section.model, line.section.device, *line.text))),
                "cases": [self.places[row.case] for row in sorted(line.rows, key=lambda row: row.verdict.severity)],
            }
            for line in self.lines
        ]
        return {"cases": cases, "rows": rows, "groups": [json.loads(group) for group in self.groups]}

    def case(self, row: Row) -> dict[str, Any]:
        """One case: its verdict, its figure as measured and in words, groups of facts, and what measures it again."""
        own, (low, high) = judged(row.verdict, row=row), row.interval or (None, None)
        groups = (json.dumps([head, list(facts.items())]) for head, facts in facts_of(row, self.environments).items())
        return {
            "title": row.metric,
            "where": ", ".join(filter(None, (row.model, row.method, row.dataset, row.protocol, row.device))),
            "word": own.word,
            "tone": own.tone,
            "sign": own.sign,
            "reason": row.reason,
            "value": row.value,
            "low": low,
            "high": high,
            "unit": row.unit,
            "figure": figure(row),
            "groups": [self.groups.setdefault(group, len(self.groups)) for group in groups],
            "command": NO_COMMAND if row.live else command_for(row),
        }


def found_by(own: Collection[Decision]) -> set[str]:
    """By what the filter finds a line: the words and tones of its verdicts."""
    words = {word for one in own for word in (one.verdict, one.word) if word}
    return {*map(str, words), *(judged(one.verdict, row=one.row).tone for one in own)}


def short(metric: str) -> str:
    """'prefill' for 'latency.prefill'."""
    return metric.partition(".")[2] or metric


def told(value: Any) -> Any:
    """A JSON value whose text no renderer obeys; numbers that JSON has no digits for as words."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        return {name: told(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [told(item) for item in value]
    return encode(value)


def sha256(text: str) -> str:
    """How a page's policy names the script and the style that it allows."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@functools.cache
def template(name: str) -> Template:
    """A template of this folder: every name in it is escaped, and what a renderer would obey is shown by its code."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return made.get_template(name)
