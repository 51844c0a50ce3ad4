"""The controller's side of a session: which rows and published figures came in, and the files at the end.

The only writer of the report directory's tables: workers attach their rows to the test report, and each row is
flushed to measurements.jsonl as it arrives.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pluggy import HookimplMarker

from harness import published, report
from harness.core.errors import HarnessError
from harness.core.records import Case, Row, Verdict
from harness.core.text import visible
from harness.judge import baselines, exact, rules
from harness.plugin.ending import Ending, closing
from harness.plugin.progress_line import ProgressLine
from harness.plugin.state import ENVIRONMENT, ROW, UNWRITTEN, fails
from harness.plugin.xdist import case_id
from harness.published import beside, of_baselines, of_rows
from harness.report.account import tally
from harness.results.directory import MEASUREMENTS, PUBLISHED, REPORT, ReportDirectory, published_json, writing
from harness.run import merge
from harness.run.forecast import forecast
from harness.run.local import missing

if TYPE_CHECKING:
    from harness.core.options import Options
    from harness.plugin.state import State

hookimpl = HookimplMarker("pytest")
FAILED, NO_TESTS = 1, 5  # pytest's exit statuses for failed tests, and for none
MARKS = {"passed": (".", "PASSED"), "rerun": ("R", "RERUN")}  # of an outcome (pytest-rerunfailures has a third)


def command_of(session: pytest.Session) -> str:
    """The command line, as a shell takes it."""
    return shlex.join(["pytest", *map(str, session.config.invocation_params.args)])


class Collector:
    """Registered in the controller (or the only process) of a session."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.opened = False  # whether this session has a report: it measures something, or is a shard of nothing
        self.rows: dict[str, Row] = {}
        self.crashed: dict[str, str] = {}
        self.report_path: Path | None = None
        self.recorded: tuple[int, Sequence[Path]] | None = None  # figures, and the files that they went into
        self.troubles: list[str] = []  # why something could not be written at the end

    # which cases

    @hookimpl
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """The collected items are the selected plan; with pytest-xdist its first worker says which (`xdist`)."""
        self.begin(session.config)

    def begin(self, config: pytest.Config) -> None:
        """Open the report and make what the cases need; what a user must fix is said here, before anything ran."""
        state, cases = self.state, self.state.selected
        if config.option.collectonly or not (cases or state.options.shard):
            return
        config.pluginmanager.register(Ending(), "harness-ending")
        line = ProgressLine(config, lambda: forecast(cases, state.options).seconds)
        config.pluginmanager.register(line, "harness-progress")
        state.session.runner.watch = line.watch
        say = line.say
        try:
            state.session.open(cases, say, self.keep, state.workers)
        except (HarnessError, OSError) as error:
            raise pytest.UsageError(str(error)) from error
        known = state.session.resumable
        self.rows = {case.id: known[case.id] for case in cases if case.id in known}
        self.opened = True
        say(f"harness: {len(cases)} cases planned, report in {state.options.report_dir}")

    # which rows

    @hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take a row as its test ends, and flush it."""
        if report.when != "call" and not report.failed:
            return
        left: dict[str, Any] = dict(report.user_properties)
        if ROW not in left:
            if report.failed and (name := case_id(report.nodeid)):
                told = getattr(report.longrepr, "reprcrash", None)  # else xdist's words on a worker that is gone
                lines = str(told.message if told else report.longrepr or "").strip().splitlines()
                self.crashed[name] = lines[0 if told else -1] if lines else "crashed"
            return
        if UNWRITTEN in left:
            self.troubles.append(left[UNWRITTEN])
        row = Row.from_json(left[ROW])
        self.rows[row.case.id] = row
        self.keep(row, left.get(ENVIRONMENT, {}))

    def keep(self, row: Row, world: Mapping[str, Any]) -> None:
        """Flush a row; one that was measured ahead comes without verdict, and again with it when its test runs."""
        try:
            self.state.session.directory.append(row, world)
        except HarnessError as error:  # nothing more is measured that could not be kept
            raise pytest.exit.Exception(f"{error}; then go on with --resume", returncode=FAILED) from error

    @hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: Any) -> tuple[str, str, str] | None:
        """Say the figure and the verdict where pytest says PASSED."""
        left = dict(report.user_properties) if report.when == "call" and not report.skipped else {}
        if ROW not in left:
            return None
        row = Row.from_json(left[ROW])
        figure = f"missing: {visible(row.reason)}"
        if row.value is not None:
            scale, unit, digits = {"B": (2**-20, "MiB", 2), "s": (1e3, "ms", 1)}.get(row.unit, (1.0, row.unit, 4))
            run = f", run as {row.run_as}" if row.run_as else ""
            figure = f"{row.value * scale:.{digits}f} {unit}{run} ({row.verdict})"
        letter, word = MARKS.get(report.outcome, ("F", "FAILED"))
        return report.outcome, letter, f"{word} {figure}"

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
        state = self.state
        self.rows = {row.case.id: row for row in state.session.ahead()} | self.rows
        rows = [self.rows.get(case.id) or missing(case, self.why_not(case)) for case in state.selected]
        tests = state.session.tests_of(state.whole or state.selected)  # a shard has the error rate of the whole
        rows = exact.settle(rules.settle(rows, tests), set(state.whole) - set(state.selected))
        self.rows = {row.case.id: row for row in rows}
        waits = state.session.directory.waits  # nothing was measured: an earlier report stays as it is
        for step in () if waits else (self._keep, self._record, self._publish):  # each for itself
            try:
                step(rows, tests, session)
            except HarnessError as error:
                self.troubles.append(str(error))
        if self.troubles and session.exitstatus == 0:
            session.exitstatus = FAILED
        if session.exitstatus == NO_TESTS and state.options.shard:
            session.exitstatus = 0  # more shards than groups: nothing to do is done
        if session.exitstatus == 0 and any(fails(row, state.options) for row in rows):
            session.exitstatus = FAILED

    def _keep(self, rows: Sequence[Row], tests: int, session: pytest.Session) -> None:
        """The tables that a resumed session, a merge and every command start from."""
        options, whole = self.state.options, self.state.whole
        self.state.session.directory.keep(rows)
        if options.shard and whole:
            merge.write_shard(options.report_dir, options.shard, whole, tests, merge.allowances(options))

    def _record(self, rows: Sequence[Row], tests: int, session: pytest.Session) -> None:
        """The baselines, where they are recorded anew."""
        options, directory = self.state.options, self.state.session.directory
        if options.regenerate:
            with writing(options.baselines):
                chosen = baselines.to_record(rows, options.regenerate)
                files = baselines.record(
                    options.baselines, chosen, directory.environments, directory.losses, directory.identities
                )
                self.recorded = len(chosen), files
                homes = {baselines.exact_path(options.baselines, row.case).parent for row in rows}
                with baselines.recording(options.baselines):
                    baselines.keep_identities(filter(Path.is_dir, homes), directory.identities)

    def _publish(self, rows: Sequence[Row], tests: int, session: pytest.Session) -> None:
        """The report and its plots."""
        directory = self.state.session.directory
        worlds, command = directory.environments, command_of(session)
        self.report_path = report.write(directory.folder, rows, self.state.selected, worlds, command=command)

    def why_not(self, case: Case) -> str:
        """Why a selected case has no row."""
        absent = self.state.session.absent(case)
        return self.crashed.get(case.id) or absent or "not reached: the session stopped before it"

    @hookimpl
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Planned, ran, missing or left out, and where the report lies."""
        waits = self.opened and self.state.session.directory.waits
        if not (self.report_path or self.troubles or waits):
            return
        rows = list(self.rows.values())
        ran = [row for row in rows if row.value is not None]
        terminalreporter.section("harness")
        for trouble in self.troubles:
            terminalreporter.write_line(f"ERROR: {trouble}")
        terminalreporter.write_line(", ".join(f"{count} {name}" for name, count in tally(rows).items()))
        gpu = [row for row in rows if row.device == "cuda"]
        if gpu:
            terminalreporter.write_line(f"{sum(row in ran for row in gpu)} of {len(gpu)} gpu cases ran")
        for reason, count in Counter(row.reason for row in rows if row.missing).items():
            terminalreporter.write_line(f"missing {count}: {visible(reason)}")
        for reason, count in Counter(row.reason for row in rows if row.left_out).items():
            terminalreporter.write_line(f"left out {count}: {visible(reason.removeprefix('left out: '))}")
        counts = Counter(row.verdict for row in ran)
        terminalreporter.write_line(", ".join(f"{verdict} {counts[verdict]}" for verdict in Verdict if counts[verdict]))
        for line in closing(self, terminalreporter.config):
            terminalreporter.write_line(line)


class Publisher:
    """Registered beside it: takes each published figure as its test ends, and puts them into the report."""

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
        folder, claims = self.options.report_dir, published.places(self.options.declared, self.options.baselines)
        try:
            measured = (self.directory.folder / MEASUREMENTS).is_file()
            ratios = of_rows(report.read_report(folder).rows) if measured else {}
            listed = [self.entries[claim.id] for claim in published.read(*claims) if claim.id in self.entries]
            entries = beside(listed, ratios or of_baselines(self.options.baselines))
            self.directory.claim()
            self.directory.put({PUBLISHED: published_json(entries) + "\n"})
            if measured:
                report.rewrite(folder)
            else:
                report.write(folder, (), (), {}, command=command_of(session))
        except HarnessError as error:
            raise pytest.UsageError(str(error)) from error

    @hookimpl
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """How many figures got which verdict."""
        if self.entries:
            terminalreporter.section("published figures")
            terminalreporter.write_line(published.summary(list(self.entries.values())))
            terminalreporter.write_line(f"report: {self.directory.folder / REPORT}")
