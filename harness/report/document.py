"""The report: a pure function of rows, plan and environments. It reads nothing and writes nothing.

What a report of very many cases shows instead of every table: one table a model, and the verdicts that matter.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from harness.core.records import Case, Row, Verdict
from harness.core.text import NOTHING, mib, number, plural, ratio
from harness.judge.two_reports import INVARIANT
from harness.report import account, paces, tables
from harness.report import verdicts as behaviour
from harness.report.account import FAILING
from harness.report.markup import code, code_block, escape
from harness.report.matrix import NO_TEXT, Section, complete, finite, sections
from harness.report.plots.chosen import MOST, Figure, drawn, figures
from harness.report.verdicts import MOVED, verdicts

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


def render(
    rows: Sequence[Row],
    planned: Sequence[Case],
    environments: Mapping[str, Mapping[str, Any]],
    *,
    notes: Sequence[str] = (),
    title: str = "Quantization report",
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
        title: the first heading.
        command: what made the report, for the section on reproducing it; "" derives one from the plan.
        with_plots: embed the images that `plots` of the same rows gives.
        published_figures: entries of `harness.published`, for a section of their own.
    """
    found = complete(rows, planned)
    alone = bool(published_figures) and not found  # nothing was to be measured
    parts = [f"# {escape(title)}"] + [account.headline(found, planned)] * (not alone)
    if notes:
        parts.append("\n".join(f"- Note: {escape(note)}" for note in notes))
    if found:
        parts += ["## How to read it", READING]
    parts += _measured(sections([row for row in found if row.case.family != INVARIANT]), len(found), with_plots)
    if behaved := behaviour.section(found):
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


def _measured(told: Sequence[Section], cases: int, with_plots: bool) -> list[str]:
    if is_large(cases):
        return [left_out(cases), *map(overview, told)]
    parts, images = [], drawn(told)
    if with_plots and not any(images) and (left := sum(len(figures(section)) for section in told)):
        parts.append(
            f"No plots: there would be {left:,}, more than the {MOST} of one report; merge fewer models for some."
        )
    for section, pictures in zip(told, images, strict=True):
        parts += _section(section, pictures if with_plots else ())
    return parts


def _session(found: Sequence[Row], planned: Sequence[Case]) -> list[str]:
    parts = ["## Planned, ran, missing", account.account(found, planned)]
    short = is_large(len(found))
    if told := verdicts_that_matter(found) if short else verdicts(found):
        parts += ["## Verdicts, case by case", told]
    parts += ["## Baselines", account.baselines(found)]
    parts += ["## Protocols, tokens, weights", account.protocols(found, clashes_only=short)]
    if revisions := account.revisions(found):
        parts.append("Weights, by commit or content:\n\n" + revisions)
    return parts


def _section(section: Section, images: Sequence[Figure]) -> list[str]:
    parts = [f"## {code(section.model)} on {escape(section.device)}"]
    parts += [f"> {escape(note)}" for note in section.notes()]
    for text in section.texts or (NO_TEXT,):
        if text != NO_TEXT:
            parts.append(f"### {code(section.model)}: {code(text[0])}, {code(text[1])}")
        parts += [tables.main(section, text), "\n".join(tables.footnotes(section, text))]
        parts += [_image(figure) for figure in images if figure.text == text]
        if further := tables.others(section, text):
            parts += [f"Further metrics on {code(text[0])}, {code(text[1])}:" if text != NO_TEXT else "", further]
    if section.texts and (further := tables.others(section, NO_TEXT)):
        parts += [f"### {code(section.model)}: further metrics", further]
    if memory := tables.memory(section):
        parts += [f"### {code(section.model)}: memory"]
        parts += [_image(figure) for figure in images if figure.kind == "memory"]
        parts += [memory]
    parts += _latency(section, images)
    if quantized := tables.census(section):
        parts += [f"### {code(section.model)}: what was quantized", quantized]
    return parts


def _latency(section: Section, images: Sequence[Figure]) -> list[str]:
    timed = [(text, name) for text in (NO_TEXT, *section.texts) for name in section.metrics(text, "latency")]
    if not timed:
        return []
    parts = [f"### {code(section.model)}: latency"]
    parts += [_image(figure) for figure in images if figure.kind == "latency"]
    for text, name in timed:
        where = f" ({code(text[0])}, {code(text[1])})" if text != NO_TEXT else ""
        parts += [f"{code(name)}{where}:", tables.latency(section, name, text), paces.note(section, name, text)]
    return parts


def _image(figure: Figure) -> str:
    return f"![{escape(figure.caption)}]({quote(figure.filename)})"


def derived_command(planned: Sequence[Case]) -> str:
    """A pytest command that plans these cases again (token limit and batch size are not in a plan)."""

    def option(name: str, values: Sequence[str]) -> list[str]:
        unique = [value for value in dict.fromkeys(values) if value]
        return [f"--{name}", _shell(",".join(unique))] if unique else []

    parts = ["pytest -p harness.plugin --pyargs harness.cases"]
    every = dict(zip(Case._fields, zip(*planned, strict=True), strict=True))
    for name in ("model", "method", "dataset", "protocol", "metric"):
        parts += option(f"{name}s", every[name])
    parts += option("reference", [planned[0].reference])
    devices = dict.fromkeys(case.device for case in planned)
    return " ".join(parts + (option("device", list(devices)) if len(devices) == 1 else []))


def _shell(text: str) -> str:
    from shlex import quote as shell_quote

    return shell_quote(text)


MOST_CASES = 5_000  # of one report with every table: some 2 MB of markdown, more than code hosts render


def is_large(cases: int) -> bool:
    """Whether a report of so many cases leaves its tables out."""
    return cases > MOST_CASES


def left_out(cases: int) -> str:
    """What this report does not show, and where it stands."""
    return (
        f"This report has {plural(cases, 'case')}, more than the {MOST_CASES:,} up to which every figure has its line "
        "and every text its plots. One table a model follows; every figure is in measurements.jsonl, and `python -m "
        "harness report DIR --models NAME` prints the whole report of one model."
    )


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


def matters(row: Row) -> bool:
    """Whether a verdict is shown in a report of any size: it failed, or it moved against its record."""
    moved = row.verdict is Verdict.BETTER or row.verdict_baseline in MOVED
    return row.value is not None and (row.verdict in FAILING or moved)


def verdicts_that_matter(rows: Sequence[Row]) -> str:
    """Verdicts case by case, of those that failed or moved."""
    told = [row for row in rows if matters(row)]
    ran = sum(row.value is not None for row in rows)
    opening = f"{len(told):,} of {plural(ran, 'measured case')} failed or moved; the others are in measurements.jsonl."
    return "\n\n".join(part for part in (opening, verdicts(told)) if part)
