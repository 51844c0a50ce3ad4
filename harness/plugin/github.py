"""What a session tells a GitHub workflow that runs it: the report in the job's summary, an annotation a failing case.

Registered in the controller (or the only process) where the environment says so, and silent elsewhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pluggy import HookimplMarker

from harness import report
from harness.core.errors import HarnessError
from harness.core.text import visible
from harness.judge.verdicts import command
from harness.plugin.state import fails
from harness.report.account import complete, headline
from harness.results.directory import writing

if TYPE_CHECKING:
    from harness.core.records import Row
    from harness.plugin.collector import Collector

hookimpl = HookimplMarker("pytest")
SUMMARY, ACTIONS = "GITHUB_STEP_SUMMARY", "GITHUB_ACTIONS"  # a file to append markdown to; 'true' in a workflow
ROOM = 1_000_000  # bytes; GitHub shows no summary of a step that is larger than a MiB
SHOWN = 10  # annotations of one kind that GitHub shows of a step
DATA = re.compile(r"[%\r\n]")  # what a workflow command would end or decode at
PROPERTY = re.compile(r"[%\r\n:,]")


def wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a workflow of GitHub's runs this process."""
    return bool(environment.get(SUMMARY)) or environment.get(ACTIONS) == "true"


class Workflow:
    """Speaks at the end of a session that wrote a report."""

    def __init__(self, collector: Collector) -> None:
        self.collector = collector

    @hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Append the report to the job's summary, and print an annotation a failing case."""
        told = self.collector
        if not told.report_path:
            return
        if path := os.environ.get(SUMMARY):
            try:
                append(Path(path), told.report_path)
            except HarnessError as error:
                terminalreporter.write_line(f"ERROR: {error}")
        if os.environ.get(ACTIONS) == "true":
            for line in errors([row for row in told.rows.values() if fails(row, told.state.options)]):
                terminalreporter.write_line(line)


def append(summary: Path, written: Path) -> None:
    """A written report's text without its plots; of one that is too large only what it opens with."""
    saved = report.read_report(written.parent)
    text = report.render(saved)
    if len(text.encode()) > ROOM:
        text = f"# Quantization report\n\n{headline(complete(saved.rows, saved.planned), saved.planned)}\n"
        text += "\nThe whole of it is larger than a summary may be: keep the report directory as an artifact.\n"
    with writing(summary, f"{SUMMARY} "), summary.open("a", encoding="utf-8") as file:
        file.write(text)


def errors(failed: list[Row]) -> list[str]:
    """Workflow commands, one a failing case; of more than GitHub shows the last one counts the rest."""
    shown = failed if len(failed) <= SHOWN else failed[: SHOWN - 1]
    lines = [
        _error(f"{row.case.id}: {row.verdict}", f"{row.reason}\nmeasure again: {command(row)}".lstrip("\n"))
        for row in shown
    ]
    if more := len(failed) - len(shown):
        lines.append(_error("more failing cases", f"{more:,} more cases fail: they stand in the job's summary"))
    return lines


def _error(title: str, text: str) -> str:
    lines = "\n".join(map(visible, text.split("\n")))
    return f"::error title={_escaped(PROPERTY, visible(title))}::{_escaped(DATA, lines)}"


def _escaped(special: re.Pattern[str], text: str) -> str:
    return special.sub(lambda match: f"%{ord(match[0]):02X}", text)
