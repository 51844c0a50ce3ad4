"""The report as markdown: of rows, of a report directory, or of what two of them compare; and the directory's own.

What a caller has, rows measured just now or a path, is opened here too. `markdown` is a pure function of rows, plan and
environments. A report of very many cases shows one table a model, and the verdicts that matter, instead of every table.
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

from harness.core.errors import BadFile, HarnessError
from harness.core.records import Case, Row, Verdict
from harness.core.specification import listed, other_model
from harness.core.text import NOTHING, mib, number, plural, ratio
from harness.core.values import checksum
from harness.judge import bounds, two_reports
from harness.judge.baselines import now
from harness.judge.two_reports import INVARIANT, Comparison
from harness.report import account, tables
from harness.report.account import FAILING, MOST_CASES, MOVED, NO_TEXT, Section, complete, finite, sections
from harness.report.comparison import render_comparison
from harness.report.conditions import conditions
from harness.report.markup import code, code_block, escape
from harness.report.page import page
from harness.report.plots import MOST, Plot, drawn, plots_of, svgs
from harness.results import directory
from harness.results.directory import MEASUREMENTS, PAGE, PUBLISHED_PAGE, REPORT, ReportDirectory, SavedSession

READING = "\n".join(
    (
        "- Lower is better everywhere. MiB is 2^20 bytes; *storage* is every byte that the model needs to run, "
        "*bits/weight* counts scales too.",
        "- *Ratio to reference* is the method's perplexity over the unquantized reference's on the same tokens: exact "
        "on *this text*, with a 95% Student t over windows for *text like this*.",
        "- *Prefill, decode / reference* is the method's time over that of the reference, timed in turn with it "
        "(Hodges-Lehmann, 95%); A/A is the reference against itself. Milliseconds of two lines were taken at different "
        "moments and do not compare.",
        "- *Quality, memory, speed* hold the most severe verdict of either comparison, with the reference and with "
        "the record; in brackets, how many cases had no record that holds here.",
        "- *Smallest effect* is what nine of ten sessions with this spread would have called. At most 5% of sessions "
        "in which nothing changed raise an alarm.",
    )
)
FOLD, UNFOLD = "<details><summary>{}</summary>", "</details>"  # as code hosts and browsers fold it
IN_FULL = "In full: memory, latency, further metrics, what was quantized"
VERDICTS = "Verdicts, case by case"
LEFT_OUT = (
    "This report has {}, more than the {:,} up to which every figure has its line and every text its plots. One table "
    "a model follows; every figure is in measurements.jsonl, and `python -m harness report DIR --models NAME` prints "
    "the whole report of one model."
)
Report: TypeAlias = str | Path | SavedSession | Iterable[Row]  # what can be compared and rendered
# report directories that this process has measured into, which hold the losses of its rows, and their environments
_measured: dict[Path, Mapping[str, Mapping[str, Any]]] = {}


def measured_into(folder: Path, environments: Mapping[str, Mapping[str, Any]]) -> None:
    """Note where rows of this process have their per-token losses, and the environments that they name."""
    _measured[folder] = dict(environments)


def read_report(path: str | Path) -> SavedSession:
    """A report directory, or a bare measurements.jsonl file, as it lies on the disk.

    Returns:
        An object with `rows` (a tuple of Row, in the order written), `planned` (a tuple of Case: those without a row
        never ran), `environments` (by id, as the rows name them), `notes`, `command` and `folder`. `compare` and
        `render` take it as it is.

    Raises:
        HarnessError: nothing was measured there, or a file is damaged; a torn last line is a note only.
    """
    return directory.read_report(Path(path))


def compare(a: Report, b: Report, *, baselines: str | Path = "baselines") -> Comparison:
    """What moved from A, the earlier side, to B, the later one, case by case.

    Losses are paired token by token where both sides have them: report directories do, and so do rows that this
    process measured. Rows alone are compared by value.

    Args:
        a: a report directory or measurements.jsonl, what `read_report` gave, or rows.
        b: the same for the later side: `worse` says that B is worse.
        baselines: the folder whose bounds.toml, if it has one, says what is noise, over the harness's own.

    Returns:
        An object with `entries`, one a shared case (`case`, rows `a` and `b`, `verdict`, `reason`; `change` with `low`
        and `high`, ln(B / A) or B - A in the metric's unit), `only_a`, `only_b`, `environment` (what differs, line by
        line), `notes`, and `status`: 0 no harm, 1 harm, 3 undecided. `render` makes text of it.

    Raises:
        HarnessError: the sides share no case, or a side cannot be read.
    """
    before, after = opened(a), opened(b)
    # losses lie in a side's directory; those of rows without one, in the directories measured into here
    folders = [(side.folder,) if side.folder else tuple(_measured) for side in (before, after)]
    known = {**before.identities, **after.identities}
    return two_reports.compare(
        before.rows,
        after.rows,
        *(directory.nll_reader(*own) for own in folders),
        environments_a=before.environments,
        environments_b=after.environments,
        bounds=bounds.load(Path(baselines)),
        identities=known.get,
        notes=[*(f"A: {note}" for note in before.notes), *(f"B: {note}" for note in after.notes)],
    )


def render(what: Report | Comparison) -> str:
    """Markdown that also reads in a terminal: the report of rows, or what `compare` found.

    Args:
        what: rows, what `read_report` gave, a report directory, or what `compare` gave. Without plots.

    Raises:
        HarnessError: a directory that cannot be read.
    """
    if isinstance(what, Comparison):
        return render_comparison(what)
    return markdown(opened(what), with_plots=False)


def opened(report: Report) -> SavedSession:
    """What was given, as `read_report` gives it; HarnessError where it is neither path, report nor rows."""
    if isinstance(report, str | Path):
        return read_report(report)
    if isinstance(report, SavedSession):
        return report
    rows = tuple(report)
    if stranger := next((row for row in rows if not isinstance(row, Row)), None):
        raise HarnessError(f"a {type(stranger).__name__} is no row: give a report directory, or rows of `measure`")
    known = {name: world for worlds in _measured.values() for name, world in worlds.items()}
    used = {name: known[name] for name in sorted({row.environment for row in rows} & known.keys())}
    return SavedSession(rows, tuple(row.case for row in directory.latest(rows)), used, command=command_of(rows))


def command_of(rows: Iterable[Row]) -> str:
    """What measures the rows again where no command line does; '' where one does."""
    return "harness.measure(module, tokenizer, ...)" if any(row.live for row in rows) else ""


def markdown(
    session: SavedSession, *, with_plots: bool = True, published_figures: Sequence[Mapping[str, Any]] = ()
) -> str:
    """The whole report: the main tables, under what they were taken, what failed or is open, then every figure folded.

    Args:
        session: its rows in the order written (for one case the last stands); the planned cases, of which one
            without a row is shown as missing; environments by id; notes that a reader must know before the
            figures; the command that made it, for the section on reproducing it, where "" derives one from the
            plan.
        with_plots: embed the images that `svgs` of the same rows gives.
        published_figures: entries of `harness.published`, which have a page of their own: one line tells of it.
    """
    planned = session.planned
    found = complete(session.rows, planned)
    alone = bool(published_figures) and not found  # nothing was to be measured
    parts = ["# Quantization report"] + [account.headline(found, planned)] * (not alone)
    if session.notes:
        parts.append("\n".join(f"- Note: {escape(note)}" for note in session.notes))
    every, large = sections([row for row in found if row.case.family != INVARIANT]), len(found) > MOST_CASES
    images: Sequence[Sequence[Plot]] = drawn(every) if with_plots and not large else [()] * len(every)
    if large:
        parts += [LEFT_OUT.format(plural(len(found), "case"), MOST_CASES), *map(_overview, every)]
    else:
        parts += [part for section, own in zip(every, images, strict=True) for part in _main(section, own)]
        if with_plots and not any(images) and (left := sum(len(plots_of(section)) for section in every)):
            parts.append(f"No plots: there would be {left:,}, more than the {MOST} of one report; merge fewer models.")
    if under := list(filter(None, conditions(found, session.environments, clashes_only=large))):
        parts += ["## Environment and protocol", *under]
    if behaved := account.invariants(found):
        parts += ["## Invariants", behaved]
    if told := account.account(found, planned):
        parts += ["## Planned, ran, missing", told]
    if not large:
        parts += [part for section, own in zip(every, images, strict=True) for part in _in_full(section, own)]
    parts += [*_every_verdict(found, large), _published(published_figures)]
    if found:
        parts += ["## How to read it", READING]
    if session.command or planned:
        parts += ["## To reproduce", code_block(session.command or _derived_command(planned))]
    return "\n\n".join(part for part in parts if part) + "\n"


def _every_verdict(found: Sequence[Row], large: bool) -> list[str]:
    """Case by case, folded, with the records that served; of very many cases those that matter."""
    listed = _verdicts_that_matter(found) if large else account.verdicts(found)
    return [FOLD.format(VERDICTS), listed, account.baselines(found), UNFOLD] if listed else []


def _published(figures: Sequence[Mapping[str, Any]]) -> str:
    """One line on published figures, which have a page of their own; "" without any."""
    if not figures:
        return ""
    from harness import published  # few reports have any

    summary = escape(published.summary(figures))
    return f"Published figures, computed again: {summary} See [{PUBLISHED_PAGE}]({PUBLISHED_PAGE})."


def _main(section: Section, images: Sequence[Plot]) -> list[str]:
    """The tables that a reader looks at first, one a text."""
    parts = [f"## {code(section.model)} on {escape(section.device)}"]
    parts += [f"> {escape(note)}" for note in section.notes()]
    for text in section.texts or (NO_TEXT,):
        if text != NO_TEXT:
            parts.append(f"### {code(section.model)}: {code(text[0])}, {code(section.protocol(text))}")
        parts += [tables.main(section, text), "\n".join(tables.footnotes(section, text))]
        parts += [_image(plot) for plot in images if plot.text == text and plot.kind == "quality"]
    return parts


def _in_full(section: Section, images: Sequence[Plot]) -> list[str]:
    """Everything else of a section, folded: further metrics, memory, latency, what was quantized."""
    parts = []
    for text in (*section.texts, NO_TEXT):
        if further := tables.others(section, text):
            where = f" on {code(text[0])}, {code(section.protocol(text))}" if text != NO_TEXT else ""
            parts += [f"### {code(section.model)}: further metrics{where}", further]
    if memory := tables.memory(section):
        parts += [f"### {code(section.model)}: memory", *(_image(plot) for plot in images if plot.kind == "memory")]
        parts += [memory]
    timed = [(text, name) for text in (NO_TEXT, *section.texts) for name in section.metrics(text, "latency")]
    for text, name in timed:
        where = f" on {code(text[0])}, {code(section.protocol(text))}" if text != NO_TEXT else ""
        parts += [f"### {code(section.model)}: {code(name)}{where}", tables.latency(section, name, text)]
        parts.append(tables.ratio_note(section, name, text))
    parts += [_image(plot) for plot in images if plot.kind == "latency"]
    if quantized := tables.census(section):
        parts += [f"### {code(section.model)}: what was quantized", quantized]
    return [FOLD.format(IN_FULL), *parts, UNFOLD] if parts else []


def _image(plot: Plot) -> str:
    return f"![{escape(plot.caption)}]({quote(plot.filename)})"


def _derived_command(planned: Sequence[Case]) -> str:
    """A pytest command that plans these cases again (token limit and batch size are not in a plan)."""
    fields = ("model", "method", "dataset", "protocol", "metric")
    given = {f"{name}s": [getattr(case, name) for case in planned] for name in fields}
    own = [method for method in given["methods"] if not other_model(method)]  # another model's is planned beside them
    given["methods"] = own or [method.partition("=")[0] for method in given["methods"]]
    given["reference"] = [planned[0].reference]
    if len(devices := {case.device for case in planned}) == 1:
        given["device"] = list(devices)
    parts = ["pytest -p harness.plugin --pyargs harness.cases"]
    for name, values in given.items():
        if unique := [value for value in dict.fromkeys(values) if value]:
            parts.append(f"--{name} {shlex.quote(listed(unique))}")
    return " ".join(parts)


def _overview(section: Section) -> str:
    """One line a method over all texts: how far its perplexity is from the reference's, bits, storage, verdict."""
    rows = {method: section.rows(method, (*section.texts, NO_TEXT)) for method in section.methods}
    ratios: dict[str, list[float]] = {}  # perplexity over the reference's on each text that has a finite one
    for method in section.methods:
        found = (tables.quality_ratio(section, method, text) for text in section.texts if method != section.reference)
        ratios[method] = [ratio for ratio in found if ratio is not None and finite(ratio)]

    def spread(method: str) -> str:
        values = ratios[method]
        return ratio(statistics.median(values), min(values), max(values)) if values else NOTHING

    columns: list[tables.Column] = [
        ("texts", lambda method: str(len(ratios[method]) or NOTHING)),
        ("ratio to reference, median [least, most]", spread),
        ("bits/weight", lambda method: number(tables.bits(section, method))),
        ("storage MiB", lambda method: tables.shown(section.row(method, "memory.storage"), mib)),
        ("cases", lambda method: f"{len(rows[method]):,}"),
        ("missing", lambda method: f"{account.tally(rows[method])[account.MISSING]:,}"),
        ("left out", lambda method: f"{left:,}" if (left := sum(row.left_out for row in rows[method])) else NOTHING),
        ("verdict", lambda method: tables.verdict(rows[method])),
    ]
    head = f"## {code(section.model)} on {escape(section.device)}"
    notes = [f"> {escape(note)}" for note in section.notes()]
    return "\n\n".join([head, *notes, tables.by_method(section, columns)])


def _verdicts_that_matter(rows: Sequence[Row]) -> str:
    """Verdicts case by case, of those that failed, or moved against their record."""
    ran = [row for row in rows if row.value is not None]
    shown = [row for row in ran if row.verdict in (*FAILING, Verdict.BETTER) or row.verdict_baseline in MOVED]
    counts = f"{len(shown):,} of {plural(len(ran), 'measured case')} failed or moved"
    return "\n\n".join(filter(None, [f"{counts}; the others are in measurements.jsonl.", account.verdicts(shown)]))


def write(
    folder: Path,
    rows: Sequence[Row],
    planned: Sequence[Case],
    environments: Mapping[str, Mapping[str, Any]],
    *,
    notes: Sequence[str] = (),
    command: str = "",
) -> Path:
    """Write report.md with its plots and report.html, each file whole or not at all; returns the report's path.

    `notes`, `command` and the time are kept in session.json: `rewrite` gives the same report later. Published figures
    are those that the directory keeps.
    """
    if notes or command:
        digests = {"plan": checksum([case.told() for case in planned]), "environments": checksum(environments)}
        told = {"command": command, "notes": list(notes), "finished": now()}
        ReportDirectory(folder).keep_session(**told, **digests)
    return _put(folder, SavedSession(tuple(rows), tuple(planned), environments, tuple(notes), command))


def _put(folder: Path, session: SavedSession) -> Path:
    figures = directory.published_of(folder)
    texts = {**svgs(session.rows, session.planned)}
    if figures:
        from harness import published

        texts[PUBLISHED_PAGE] = f"# Published figures, computed again\n\n{published.section(figures)}"
    texts[REPORT] = markdown(session, published_figures=figures)
    texts[PAGE] = page(session, figures)
    ReportDirectory(folder).put(texts)
    return folder / REPORT


def rewrite(folder: Path) -> Path:
    """Make report.md, the plots and report.html anew from a report directory's measurements."""
    if not folder.is_dir():
        raise BadFile(f"{folder} is no report directory: name the folder that holds {MEASUREMENTS}")
    return _put(folder, read_report(folder))


def excerpt(folder: Path, models: Sequence[str]) -> str:
    """The report of some of a session's models as markdown without plots; nothing is written."""
    return markdown(read_report(folder).only(models), with_plots=False)
