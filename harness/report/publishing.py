"""Puts a report and its plots into a directory, and answers the `report` and `compare` commands."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.core.errors import BadFile
from harness.core.files import replace_text
from harness.core.records import Case, Row
from harness.judge import bounds
from harness.judge.two_reports import Comparison, compare
from harness.report.document import render
from harness.report.plots.draw import svgs
from harness.results.reading import nll_reader, published_of, read_report

REPORT = "report.md"


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

    `notes` and `command` are kept in session.json, so that `rewrite` gives the same report later.
    """
    remember(directory, notes, command)
    return put(directory, files(directory, rows, planned, environments, notes, command))


def remember(directory: Path, notes: Sequence[str], command: str) -> None:
    """Keep what only the session knows."""
    if notes or command:
        told = {"command": command, "notes": list(notes)}
        put(directory, {"session.json": json.dumps(told, indent=1, sort_keys=True) + "\n"})


def files(
    directory: Path,
    rows: Sequence[Row],
    planned: Sequence[Case],
    environments: Mapping[str, Mapping[str, Any]],
    notes: Sequence[str],
    command: str,
) -> dict[str, str]:
    """The plots' and the report's text by name; its published figures are those that `directory` keeps."""
    figures = published_of(directory)
    text = render(rows, planned, environments, notes=notes, command=command, published_figures=figures)
    return {**svgs(rows, planned), REPORT: text}


def put(directory: Path, texts: Mapping[str, str]) -> Path:
    """Write texts by their names, each whole or not at all; returns the report's path."""
    for name, text in texts.items():
        try:
            replace_text(directory / name, text)
        except OSError as error:
            raise BadFile(f"{directory / name} cannot be written: {error.strerror or error}") from error
    return directory / REPORT


def rewrite(directory: Path) -> Path:
    """Make report.md and the plots anew from a report directory's measurements."""
    if not directory.is_dir():
        raise BadFile(f"{directory} is no report directory: name the folder that holds measurements.jsonl")
    session = read_report(directory)
    measured = (session.rows, session.planned, session.environments)
    return put(directory, files(directory, *measured, session.notes, session.command))


def excerpt(directory: Path, models: Sequence[str]) -> str:
    """The report of some of a session's models as markdown without plots; nothing is written."""
    session = read_report(directory)
    known = dict.fromkeys(case.model for case in (*session.planned, *(row.case for row in session.rows)))
    if unknown := [model for model in models if model not in known]:
        raise BadFile(f"{directory} holds no case of '{unknown[0]}': it has {', '.join(known)}")
    rows = [row for row in session.rows if row.model in models]
    planned = [case for case in session.planned if case.model in models]
    return render(rows, planned, session.environments, notes=session.notes, command=session.command, with_plots=False)


def compare_paths(path_a: Path, path_b: Path, baselines: Path = Path("baselines")) -> Comparison:
    """Compare two report directories, or two bare measurements.jsonl files (values only).

    What is noise stands in the harness's bounds.toml, and over it in that of the `baselines` folder, if there is one.
    """
    a, b = read_report(path_a), read_report(path_b)
    return compare(
        a.rows,
        b.rows,
        nll_reader(a.folder),
        nll_reader(b.folder),
        environments_a=a.environments,
        environments_b=b.environments,
        bounds=bounds.load(baselines),
        notes=[*(f"A: {note}" for note in a.notes), *(f"B: {note}" for note in b.notes)],
    )
