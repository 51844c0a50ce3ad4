"""Published figures of a session: takes each test's entry as it comes in, and puts them into the report at the end."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import pytest
from pluggy import HookimplMarker

from harness import published, report
from harness.core.errors import HarnessError
from harness.published.ratios import beside, of_baselines, of_rows
from harness.results.directory import MEASUREMENTS, PUBLISHED, REPORT, ReportDirectory, published_json

if TYPE_CHECKING:
    from harness.core.options import Options

hookimpl = HookimplMarker("pytest")


class Publisher:
    """Registered in the controller (or the only process) of a session; extends the report that the collector wrote."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.directory = ReportDirectory(options.report_dir)
        self.entries: dict[str, dict[str, Any]] = {}

    @hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take a figure as its test ends."""
        text = dict(report.user_properties).get("published_entry")
        if report.when == "call" and isinstance(text, str):
            entry = json.loads(text)
            self.entries[entry["id"]] = entry

    @hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Into the session's report; where nothing was measured, into the report that lies there, or one of its own."""
        if not self.entries:
            return
        folder = self.options.report_dir
        try:
            measured = self.directory.path(MEASUREMENTS).is_file()
            ratios = of_rows(report.read_report(folder).rows) if measured else {}
            entries = beside(self.in_order(), ratios or of_baselines(self.options.baselines))
            self.directory.put({PUBLISHED: published_json(entries) + "\n"})
            if measured:
                report.rewrite(folder)
            else:
                command = shlex.join(["pytest", *map(str, session.config.invocation_params.args)])
                report.write(folder, (), (), {}, command=command)
        except HarnessError as error:
            raise pytest.UsageError(str(error)) from error

    def in_order(self) -> list[dict[str, Any]]:
        """The entries as their files list them; workers hand them in as they finish."""
        claims = published.read(self.options.baselines / "published")
        return [self.entries[claim.id] for claim in claims if claim.id in self.entries]

    @hookimpl
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """How many figures got which verdict."""
        if self.entries:
            terminalreporter.section("published figures")
            terminalreporter.write_line(published.summary(list(self.entries.values())))
            terminalreporter.write_line(f"report: {self.directory.path(REPORT)}")
