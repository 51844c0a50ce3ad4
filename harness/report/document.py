"""The report: `render` is a pure function of rows, plan and environments; `write` puts it into a directory.

A report of very many cases shows one table a model, and the verdicts that matter, instead of every table.
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from harness.core.errors import BadFile
from harness.core.records import Case, Row, Verdict
from harness.core.text import NOTHING, mib, number, plural, ratio
from harness.judge.two_reports import INVARIANT
from harness.report import account, tables
from harness.report.account import (
    FAILING,
    MOST_CASES,
    MOVED,
    NO_TEXT,
    Section,
    complete,
    finite,
    invariants,
    is_large,
    sections,
    verdicts,
)
from harness.report.markup import code, code_block, escape
from harness.report.plots import MOST, Plot, drawn, plots_of, svgs
from harness.report.tables import ratio_note
from harness.results.directory import MEASUREMENTS, REPORT, ReportDirectory, SavedSession, published_of, read_report

READING = """\
- Perplexity and every ratio: lower is better. Memory and time: lower is better. MiB is 2^20 bytes.
- *Ratio to reference* is the method's figure over the unquantized reference's, on the same tokens or in the same run.
- The interval of a perplexity ratio is a 95% Student t over windows: what to expect on *text like this*. On *this
  text* the ratio itself is exact wherever a perplexity stands beside it: every planned token was read.
- The interval of a time ratio is a 95% Hodges-Lehmann interval over interleaved blocks. p50, p90, p99 are percentiles
  of single runs, IQR is the distance between their quartiles. A/A is the reference timed against itself.
- *Storage* is every byte the model needs to run, quantization state included; *footprint* is parameters and buffers
  as transformers counts them; *bits/weight* counts scales.
- *Verdict* is the most severe over a line's cases, against the reference and against the recorded baseline."""
LEFT_OUT = (
    "This report has {}, more than the {:,} up to which every figure has its line and every text its plots. One table "
    "a model follows; every figure is in measurements.jsonl, and `python -m harness report DIR --models NAME` prints "
    "the whole report of one model."
)


def render(
    rows: Sequence[Row],
    planned: Sequence[Case],
    environments: Mapping[str, Mapping[str, Any]],
    *,
    notes: Sequence[str] = (),
    command: str = "",
    with_plots: bool = True,
    published_figures: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The whole report as markdown.

    Args:
        rows: measurements in the order written; for one case the last stands.
        planned: the cases that the session meant to measure; one without a row is shown as missing.
        environments: by id, as `Environment.to_dict` gives them.
        notes: lines that a reader must know before the figures.
        command: what made the report, for the section on reproducing it; "" derives one from the plan.
        with_plots: embed the images that `plots` of the same rows gives.
        published_figures: entries of `harness.published`, for a section of their own.
    """
    found = complete(rows, planned)
    alone = bool(published_figures) and not found  # nothing was to be measured
    parts = ["# Quantization report"] + [account.headline(found, planned)] * (not alone)
    if notes:
        parts.append("\n".join(f"- Note: {escape(note)}" for note in notes))
    if found:
        parts += ["## How to read it", READING]
    parts += _measured(sections([row for row in found if row.case.family != INVARIANT]), len(found), with_plots)
    if behaved := invariants(found):
        parts += ["## Invariants", behaved]
    if not alone:
        parts += _session(found, planned)
    if published_figures:
        from harness import published  # few reports have any

        parts += ["## Published figures, computed again", published.section(published_figures).rstrip()]
    if not alone:
        parts += ["## Environment", account.environments(found, environments)]
    if command or planned:
        parts += ["## To reproduce", code_block(command or derived_command(planned))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _measured(every: Sequence[Section], cases: int, with_plots: bool) -> list[str]:
    if is_large(cases):
        return [LEFT_OUT.format(plural(cases, "case"), MOST_CASES), *map(overview, every)]
    parts, images = [], drawn(every)
    if with_plots and not any(images) and (left := sum(len(plots_of(section)) for section in every)):
        parts.append(
            f"No plots: there would be {left:,}, more than the {MOST} of one report; merge fewer models for some."
        )
    for section, pictures in zip(every, images, strict=True):
        parts += _section(section, pictures if with_plots else ())
    return parts


def _session(found: Sequence[Row], planned: Sequence[Case]) -> list[str]:
    parts = ["## Planned, ran, missing", account.account(found, planned)]
    short = is_large(len(found))
    if listed := verdicts_that_matter(found) if short else verdicts(found):
        parts += ["## Verdicts, case by case", listed]
    parts += ["## Baselines", account.baselines(found)]
    parts += ["## Protocols, tokens, weights", account.protocols(found, clashes_only=short)]
    return [*parts, account.revisions(found)]


def _section(section: Section, images: Sequence[Plot]) -> list[str]:
    parts = [f"## {code(section.model)} on {escape(section.device)}"]
    parts += [f"> {escape(note)}" for note in section.notes()]
    for text in section.texts or (NO_TEXT,):
        if text != NO_TEXT:
            parts.append(f"### {code(section.model)}: {code(text[0])}, {code(text[1])}")
        parts += [tables.main(section, text), "\n".join(tables.footnotes(section, text))]
        parts += [_image(plot) for plot in images if plot.text == text]
        if further := tables.others(section, text):
            parts += [f"Further metrics on {code(text[0])}, {code(text[1])}:" if text != NO_TEXT else "", further]
    if section.texts and (further := tables.others(section, NO_TEXT)):
        parts += [f"### {code(section.model)}: further metrics", further]
    if memory := tables.memory(section):
        parts += [f"### {code(section.model)}: memory"]
        parts += [_image(plot) for plot in images if plot.kind == "memory"]
        parts += [memory]
    parts += _latency(section, images)
    if quantized := tables.census(section):
        parts += [f"### {code(section.model)}: what was quantized", quantized]
    return parts


def _latency(section: Section, images: Sequence[Plot]) -> list[str]:
    timed = [(text, name) for text in (NO_TEXT, *section.texts) for name in section.metrics(text, "latency")]
    if not timed:
        return []
    parts = [f"### {code(section.model)}: latency"]
    parts += [_image(plot) for plot in images if plot.kind == "latency"]
    for text, name in timed:
        where = f" ({code(text[0])}, {code(text[1])})" if text != NO_TEXT else ""
        parts += [f"{code(name)}{where}:", tables.latency(section, name, text), ratio_note(section, name, text)]
    return parts


def _image(plot: Plot) -> str:
    return f"![{escape(plot.caption)}]({quote(plot.filename)})"


def derived_command(planned: Sequence[Case]) -> str:
    """A pytest command that plans these cases again (token limit and batch size are not in a plan)."""

    def option(name: str, values: Sequence[str]) -> list[str]:
        unique = [value for value in dict.fromkeys(values) if value]
        return [f"--{name}", shlex.quote(",".join(unique))] if unique else []

    parts = ["pytest -p harness.plugin --pyargs harness.cases"]
    every = dict(zip(Case._fields, zip(*planned, strict=True), strict=True))
    for name in ("model", "method", "dataset", "protocol", "metric"):
        parts += option(f"{name}s", every[name])
    parts += option("reference", [planned[0].reference])
    devices = dict.fromkeys(case.device for case in planned)
    return " ".join(parts + (option("device", list(devices)) if len(devices) == 1 else []))


def overview(section: Section) -> str:
    """One line a method over all texts: how far its perplexity is from the reference's, bits, storage, verdict."""
    rows = {method: section.rows(method, (*section.texts, NO_TEXT)) for method in section.methods}
    columns: list[tables.Column] = [
        ("texts", lambda method: str(len(ratios(section, method)) or NOTHING)),
        ("ratio to reference, median [least, most]", lambda method: spread(ratios(section, method))),
        ("bits/weight", lambda method: number(tables.bits(section, method))),
        ("storage MiB", lambda method: tables.shown(section.row(method, "memory.storage"), mib)),
        ("cases", lambda method: f"{len(rows[method]):,}"),
        ("missing", lambda method: f"{sum(row.value is None for row in rows[method]):,}"),
        ("verdict", lambda method: tables.verdict(rows[method])),
    ]
    head = f"## {code(section.model)} on {escape(section.device)}"
    notes = [f"> {escape(note)}" for note in section.notes()]
    return "\n\n".join([head, *notes, tables.by_method(section, columns)])


def ratios(section: Section, method: str) -> list[float]:
    """Perplexity over the reference's on each text that has a finite one."""
    if method == section.reference:
        return []
    found = (tables.quality_ratio(section, method, text) for text in section.texts)
    return [ratio for ratio in found if ratio is not None and finite(ratio)]


def spread(values: Sequence[float]) -> str:
    """'1.0012 [0.9990, 1.0100]': median, least and most."""
    return ratio(statistics.median(values), min(values), max(values)) if values else NOTHING


def verdicts_that_matter(rows: Sequence[Row]) -> str:
    """Verdicts case by case, of those that failed, or moved against their record."""
    ran = [row for row in rows if row.value is not None]
    shown = [row for row in ran if row.verdict in (*FAILING, Verdict.BETTER) or row.verdict_baseline in MOVED]
    counts = f"{len(shown):,} of {plural(len(ran), 'measured case')} failed or moved"
    return "\n\n".join(filter(None, [f"{counts}; the others are in measurements.jsonl.", verdicts(shown)]))


def write(
    directory: Path,
    rows: Sequence[Row],
    planned: Sequence[Case],
    environments: Mapping[str, Mapping[str, Any]],
    *,
    notes: Sequence[str] = (),
    command: str = "",
) -> Path:
    """Write report.md and its plots, each file whole or not at all; returns the report's path.

    `notes` and `command` are kept in session.json, so that `rewrite` gives the same report later; the published figures
    are those that the directory keeps.
    """
    if notes or command:
        ReportDirectory(directory).keep_session(command=command, notes=list(notes))
    return _put_report(directory, SavedSession(tuple(rows), tuple(planned), environments, tuple(notes), command))


def _put_report(directory: Path, session: SavedSession) -> Path:
    rows, planned, notes, figures = session.rows, session.planned, session.notes, published_of(directory)
    text = render(rows, planned, session.environments, notes=notes, command=session.command, published_figures=figures)
    ReportDirectory(directory).put({**svgs(rows, planned), REPORT: text})
    return directory / REPORT


def rewrite(directory: Path) -> Path:
    """Make report.md and the plots anew from a report directory's measurements."""
    if not directory.is_dir():
        raise BadFile(f"{directory} is no report directory: name the folder that holds {MEASUREMENTS}")
    return _put_report(directory, read_report(directory))


def excerpt(directory: Path, models: Sequence[str]) -> str:
    """The report of some of a session's models as markdown without plots; nothing is written."""
    session = read_report(directory)
    known = dict.fromkeys(case.model for case in (*session.planned, *(row.case for row in session.rows)))
    if unknown := [model for model in models if model not in known]:
        raise BadFile(f"{directory} holds no case of '{unknown[0]}': it has {', '.join(known)}")
    rows = [row for row in session.rows if row.model in models]
    planned = [case for case in session.planned if case.model in models]
    return render(rows, planned, session.environments, notes=session.notes, command=session.command, with_plots=False)
