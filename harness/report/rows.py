"""Rows as a caller has them, measured just now or read from a directory: read, compared, rendered. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from harness.core.errors import HarnessError
from harness.core.records import Row
from harness.judge import bounds, two_reports
from harness.judge.two_reports import Comparison
from harness.report.comparison import render_comparison
from harness.report.document import render as document
from harness.results import directory
from harness.results.directory import Nll, SavedSession

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
    return two_reports.compare(
        before.rows,
        after.rows,
        losses_of(before),
        losses_of(after),
        environments_a=before.environments,
        environments_b=after.environments,
        bounds=bounds.load(Path(baselines)),
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
    report = opened(what)
    parts = report.rows, report.planned, report.environments
    return document(*parts, notes=report.notes, command=report.command, with_plots=False)


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


def losses_of(report: SavedSession) -> Nll:
    """Per-token NLL by its sha: of the report's directory, and for rows without one, of those measured here."""
    return directory.nll_reader(*((report.folder,) if report.folder else _measured))
