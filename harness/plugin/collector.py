"""The controller's side of a session: which rows came in, and the files at the end.

The only writer of the report directory's tables: workers attach their rows to the test report, and each row is
flushed to measurements.jsonl as it arrives.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pluggy import HookimplMarker

from harness import judge, report
from harness.core.errors import HarnessError
from harness.core.records import Case, Row, Verdict
from harness.core.text import visible
from harness.judge import baselines, error_rate
from harness.plugin.checking import CallOutcome
from harness.plugin.xdist import case_id
from harness.results.directory import ReportDirectory, writing
from harness.run import engines, merge
from harness.run.local import missing

if TYPE_CHECKING:
    from harness.plugin.state import State

hookimpl = HookimplMarker("pytest")
FAILED, NO_TESTS = 1, 5  # pytest's exit statuses for failed tests, and for none


class Collector:
    """Registered in the controller (or the only process) of a session."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.directory = ReportDirectory(state.options.report_dir)
        self.opened = False  # whether this session has a report: it measures something, or is a shard of nothing
        self.rows: dict[str, Row] = {}
        self.crashed: dict[str, str] = {}
        self.report_path: Path | None = None
        self.troubles: list[str] = []  # why something could not be written at the end

    # which cases

    @hookimpl
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """The collected items are the selected plan; with pytest-xdist its first worker says which (`xdist`)."""
        self.begin(session.config)

    def begin(self, config: pytest.Config) -> None:
        """Open the report and make what the cases need; what a user must fix is said here, before anything ran."""
        state, options, cases = self.state, self.state.options, self.state.selected
        empty_shard = options.shard is not None and not cases
        if config.option.collectonly or not (cases or empty_shard):
            return
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        say = reporter.write_line if reporter is not None else print
        try:
            engines.check_cards(cases, options, state.cuda, state.workers)
            self.directory.own()
            runnable = [case for case in cases if not state.absent(case)]
            if runnable:
                state.session.runner.arrived = self.keep
            inputs = state.session.prepare(runnable, say) if runnable else {}
            self.directory.open(keep=options.resume)
            if state.workers:
                self.directory.keep_inputs(inputs)
            self.directory.keep_plan(cases)
            if options.resume:
                known = self.directory.resumable(say)
                self.rows = {case.id: known[case.id] for case in cases if case.id in known}
        except HarnessError as error:
            self.directory.give_up()
            raise pytest.UsageError(str(error)) from error
        self.opened = True
        say(f"harness: {len(cases)} cases planned, report in {options.report_dir}")

    # which rows

    @hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take a row as its test ends, and flush it."""
        if report.when != "call" and not report.failed:
            return
        outcome = CallOutcome.of(report)
        if outcome is None:
            if report.failed and (name := case_id(report.nodeid)):
                self.crashed[name] = str(report.longrepr).strip().splitlines()[-1] if report.longrepr else "crashed"
            return
        if outcome.unwritten:
            self.troubles.append(outcome.unwritten)
        row = outcome.row
        if report.failed and row.value is not None and not self.fails(row):
            reason = f"{row.reason}; exact facts differ from the record" if row.reason else "exact facts differ"
            row = replace(row, verdict=Verdict.WORSE, reason=reason)
        self.rows[row.case.id] = row
        self.keep(row, outcome.world)

    def keep(self, row: Row, world: Mapping[str, Any]) -> None:
        """Flush a row; one that was measured ahead comes without verdict, and again with it when its test runs."""
        try:
            self.directory.append(row, world)
        except HarnessError as error:  # nothing more is measured that could not be kept
            raise pytest.exit.Exception(f"{error}; then go on with --resume", returncode=FAILED) from error

    @hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: Any) -> tuple[str, str, str] | None:
        """Say the figure and the verdict where pytest says PASSED."""
        outcome = CallOutcome.of(report) if report.when == "call" and not report.skipped else None
        if outcome is None:
            return None
        letter, word = (".", "PASSED") if report.passed else ("F", "FAILED")
        return report.outcome, letter, f"{word} {brief(outcome.row)}"

    def fails(self, row: Row) -> bool:
        """Whether a row fails the session."""
        options = self.state.options
        return judge.fails(row, require_baselines=options.require_baselines, allow_missing=options.allow_missing)

    # the end

    @hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Ctrl-C between two lines: CPython gives no number of a line then, and pytest 9.2 ends in a TypeError."""
        if self.opened:
            numbered = [entry for entry in excinfo.traceback if entry._rawentry.tb_lineno is not None]
            excinfo.traceback = type(excinfo.traceback)(numbered)

    @hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write everything, whatever ended the session."""
        if not self.opened:
            return
        options = self.state.options
        self.rows = {row.case.id: row for row in self.state.ahead()} | self.rows
        rows = [self.rows.get(case.id) or missing(case, self.why_not(case)) for case in self.state.selected]
        tests = self.state.tests
        rows = error_rate.settle(rows, tests)
        self.rows = {row.case.id: row for row in rows}
        for step in (self._keep, self._record, self._publish):  # one that fails leaves the others standing
            try:
                step(rows, tests, session)
            except HarnessError as error:
                self.troubles.append(str(error))
        if self.troubles and session.exitstatus == 0:
            session.exitstatus = FAILED
        if session.exitstatus == NO_TESTS and options.shard:
            session.exitstatus = 0  # more shards than groups: nothing to do is done
        if session.exitstatus == 0 and any(self.fails(row) for row in rows):
            session.exitstatus = FAILED

    @hookimpl
    def pytest_unconfigure(self) -> None:
        """Leave the report directory to the next session."""
        self.directory.release()

    def _keep(self, rows: Sequence[Row], tests: int, session: pytest.Session) -> None:
        """The tables that a resumed session, a merge and every command start from."""
        options = self.state.options
        self.directory.keep(rows)
        if options.shard and self.state.whole:
            merge.write_shard(options.report_dir, options.shard, self.state.whole, tests)

    def _record(self, rows: Sequence[Row], tests: int, session: pytest.Session) -> None:
        """The baselines, where they are recorded anew."""
        options, worlds = self.state.options, self.directory.environments
        if options.regenerate:
            with writing(options.baselines):
                chosen = baselines.to_record(rows, options.regenerate)
                baselines.record(options.baselines, chosen, worlds, self.directory.losses)

    def _publish(self, rows: Sequence[Row], tests: int, session: pytest.Session) -> None:
        """The report and its plots."""
        command = shlex.join(["pytest", *map(str, session.config.invocation_params.args)])
        folder, worlds = self.directory.folder, self.directory.environments
        self.report_path = report.write(folder, rows, self.state.selected, worlds, command=command)

    def why_not(self, case: Case) -> str:
        """Why a selected case has no row."""
        return self.crashed.get(case.id) or self.state.absent(case) or "not reached: the session stopped before it"

    @hookimpl
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Planned, ran, missing, and where the report lies."""
        if not (self.report_path or self.troubles):
            return
        rows = list(self.rows.values())
        ran = [row for row in rows if row.value is not None]
        terminalreporter.section("harness")
        for trouble in self.troubles:
            terminalreporter.write_line(f"ERROR: {trouble}")
        terminalreporter.write_line(f"{len(rows)} planned, {len(ran)} ran, {len(rows) - len(ran)} missing")
        gpu = [row for row in rows if row.device == "cuda"]
        if gpu:
            terminalreporter.write_line(f"{sum(row in ran for row in gpu)} of {len(gpu)} gpu cases ran")
        reasons = dict.fromkeys(row.reason for row in rows if row.value is None)
        for reason in reasons:
            count = sum(row.reason == reason for row in rows if row.value is None)
            terminalreporter.write_line(f"missing {count}: {visible(reason)}")
        counts = {verdict: sum(row.verdict is verdict for row in ran) for verdict in Verdict}
        terminalreporter.write_line(", ".join(f"{verdict} {count}" for verdict, count in counts.items() if count))
        if self.report_path:
            terminalreporter.write_line(f"report: {self.report_path}")


def brief(row: Row) -> str:
    """The figure in a few characters."""
    if row.value is None:
        return f"missing: {visible(row.reason)}"
    scale, unit, digits = {"B": (2**-20, "MiB", 2), "s": (1e3, "ms", 1)}.get(row.unit, (1.0, row.unit, 4))
    return f"{row.value * scale:.{digits}f} {unit} ({row.verdict})"
