"""The controller's side of a session: which cases were selected, which rows came in, and the files at the end.

The only writer of the report directory's tables: workers attach their rows to the test report, and each row is
flushed to measurements.jsonl as it arrives.
"""

from __future__ import annotations

import json
import shlex
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pluggy import HookimplMarker

from harness import judge, report
from harness.core.errors import HarnessError
from harness.core.files import append_line, replace_text
from harness.core.records import Case, Row, Verdict
from harness.core.text import visible
from harness.judge import baselines, error_rate
from harness.results.reading import plan_text
from harness.run import engines, fingerprints, merge
from harness.run import plan as planning
from harness.run.local import missing
from harness.run.session import give_up, known_environments, open_report, read_rows, take, writing
from harness.run.shards import longest_first

if TYPE_CHECKING:
    import pytest

    from harness.plugin import State

hookimpl = HookimplMarker("pytest")
CASE_FIELDS = (4, 6)  # model, method, [dataset, protocol,] metric, device
FAILED, NO_TESTS = 1, 5  # pytest's exit statuses for failed tests, and for none


class Collector:
    """Registered in the controller (or the only process) of a session."""

    def __init__(self, state: State, usage_error: type[Exception]) -> None:
        self.state, self.usage_error = state, usage_error
        self.selected: tuple[Case, ...] = ()
        self.opened = False  # whether this session has a report: it measures something, or is a shard of nothing
        self.cards: dict[str, int] = {}  # with xdist, the place among the cards that each living worker may take
        self.rows: dict[str, Row] = {}
        self.environments: dict[str, Any] = {}
        self.crashed: dict[str, str] = {}
        self.report_path: Path | None = None
        self.troubles: list[str] = []  # why something could not be written at the end
        self.owner: IO[str] | None = None  # the lock on the report directory, held while this object lives

    # which cases

    @hookimpl
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Without xdist: the collected items are the selected plan."""
        self.select(planning.selected(session.items), session.config)

    @hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: Sequence[str]) -> None:
        """With xdist: the first worker's node ids are."""
        if not self.selected:
            named = [name for name in map(case_id, ids) if name.endswith(("/cpu", "/cuda"))]
            plan = {case.id: case for case in (*self.state.plan, *self.state.invariants)} if named else {}
            self.select([plan[name] for name in named if name in plan], node.config)

    @hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        """Keep the cases of one model and method on one worker, so that each is loaded and quantized once.

        xdist's own `loadgroup` writes the group into node ids, which pytest 9.2 no longer lets it do.
        """
        if config.option.dist != "load":
            return None  # the user chose otherwise
        from xdist.scheduler import LoadScopeScheduling  # local: only where xdist runs

        scheduling = LoadScopeScheduling(config, log)
        scheduling.workqueue = LongestFirst(lambda: longest_first(self.selected))
        scheduling._split_scope = group_of
        return scheduling

    @hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """With xdist: the place among the cards that a worker may take; one that replaces a dead one takes its."""
        self.cards[node.gateway.id] = place = min(set(range(len(self.cards) + 1)) - set(self.cards.values()))
        node.workerinput["harness_card"] = place

    @hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """With xdist and --shard: the plan before it was cut, as the first worker tells it at its end."""
        self.cards.pop(node.gateway.id, None)
        if told := getattr(node, "workeroutput", {}).get("harness_whole"):
            self.state.whole = tuple(Case(**item) for item in told)

    def select(self, cases: Sequence[Case], config: pytest.Config) -> None:
        """Open the report and make what the cases need; what a user must fix is said here, before anything ran."""
        cases = tuple(dict.fromkeys(cases))
        empty_shard = self.state.options.shard is not None and not cases
        if config.option.collectonly or not (cases or empty_shard):
            return
        options, self.state.selected = self.state.options, self.state.whole or cases
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        say = reporter.write_line if reporter is not None else print
        try:
            engines.check_cards(cases, options, self.state.cuda, len(config.getoption("tx", None) or ()))
            self.owner = self.owner or take(options.report_dir)
            runnable = [case for case in cases if not self.state.absent(case)]
            if runnable:
                self.state.session.runner.arrived = self.keep
            began = self.state.session.prepare(runnable, say) if runnable else {}
            open_report(options.report_dir, keep=options.resume)
            with writing(options.report_dir):
                fingerprints.write(options.report_dir, began)
                replace_text(options.report_dir / "plan.json", plan_text(cases))
            if options.resume:
                known = read_rows(options.report_dir / "measurements.jsonl", say)
                self.environments = dict(known_environments(options.report_dir))
                self.rows = {case.id: known[case.id] for case in cases if case.id in known}
        except HarnessError as error:
            give_up(options.report_dir, self.owner)
            raise self.usage_error(str(error)) from error
        self.selected, self.opened = cases, True
        say(f"harness: {len(cases)} cases planned, report in {options.report_dir}")

    # which rows

    @hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take a row as its test ends, and flush it."""
        if report.when != "call" and not report.failed:
            return
        properties: dict[str, Any] = dict(report.user_properties)
        text = properties.get("harness_row")
        if not isinstance(text, str):
            if report.failed and (name := case_id(report.nodeid)):
                self.crashed[name] = str(report.longrepr).strip().splitlines()[-1] if report.longrepr else "crashed"
            return
        if unwritten := properties.get("harness_unwritten"):
            self.troubles.append(str(unwritten))
        row = Row.from_json(text)
        if report.failed and row.value is not None and not self.fails(row):
            told = f"{row.reason}; exact facts differ from the record" if row.reason else "exact facts differ"
            row = replace(row, verdict=Verdict.WORSE, reason=told)
        self.rows[row.case.id] = row
        self.keep(row, properties.get("harness_environment", {}))

    def keep(self, row: Row, world: Mapping[str, Any]) -> None:
        """Flush a row; one that was measured ahead comes without verdict, and again with it when its test runs."""
        try:
            with writing(self.state.options.report_dir):
                if row.environment and (world or row.environment not in self.environments):
                    self.environments[row.environment] = world
                    self._write_environments()
                append_line(self.state.options.report_dir / "measurements.jsonl", row.to_json())
        except HarnessError as error:  # nothing more is measured that could not be kept
            import pytest  # local: in a session pytest is there

            raise pytest.exit.Exception(f"{error}; then go on with --resume", returncode=FAILED) from error

    @hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: Any) -> tuple[str, str, str] | None:
        """Say the figure and the verdict where pytest says PASSED."""
        text = dict(getattr(report, "user_properties", ())).get("harness_row")
        if report.when != "call" or not isinstance(text, str) or report.skipped:
            return None
        row = Row.from_json(text)
        word = "PASSED" if report.passed else "FAILED"
        letter = "." if report.passed else "F"
        return report.outcome, letter, f"{word} {brief(row)}"

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
        if "session" in self.state.__dict__:  # it was needed
            self.rows = {row.case.id: row for row in self.state.session.ahead()} | self.rows
        rows = [self.rows.get(case.id) or missing(case, self.why_not(case)) for case in self.selected]
        whole = self.state.whole or self.selected  # a shard's error rate is its share of the whole session's
        tests = error_rate.tests(whole, self.state.bounds, stop_early=options.stop_early)
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
            session.exitstatus = 0  # more shards than pieces: nothing to do is done
        if session.exitstatus == 0 and any(self.fails(row) for row in rows):
            session.exitstatus = FAILED

    @hookimpl
    def pytest_unconfigure(self) -> None:
        """Leave the report directory to the next session."""
        if self.owner is not None:
            self.owner.close()

    def _keep(self, rows: Sequence[Row], tests: int, session: pytest.Session) -> None:
        """The tables that a resumed session, a merge and every command start from."""
        options = self.state.options
        with writing(options.report_dir):
            replace_text(options.report_dir / "measurements.jsonl", "".join(row.to_json() + "\n" for row in rows))
            self._write_environments()
            if options.shard and self.state.whole:
                merge.write_shard(options.report_dir, options.shard, self.state.whole, tests)

    def _record(self, rows: Sequence[Row], tests: int, session: pytest.Session) -> None:
        """The baselines, where they are recorded anew."""
        options = self.state.options
        if options.regenerate:
            chosen, losses = baselines.to_record(rows, options.regenerate), options.report_dir / "nll"
            with writing(options.baselines):
                baselines.record(options.baselines, chosen, self.environments, losses)

    def _publish(self, rows: Sequence[Row], tests: int, session: pytest.Session) -> None:
        """The report and its plots."""
        command = shlex.join(["pytest", *map(str, session.config.invocation_params.args)])
        folder = self.state.options.report_dir
        self.report_path = report.write(folder, rows, self.selected, self.environments, command=command)

    def why_not(self, case: Case) -> str:
        """Why a selected case has no row."""
        return self.crashed.get(case.id) or self.state.absent(case) or "not reached: the session stopped before it"

    def _write_environments(self) -> None:
        text = json.dumps(self.environments, indent=1, sort_keys=True)
        replace_text(self.state.options.report_dir / "environments.json", text + "\n")

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


def case_id(nodeid: str) -> str:
    """The case's id within a node id: between the first '[' and the last ']' (xdist appends '@group')."""
    inside, bracket, _ = nodeid.partition("[")[2].rpartition("]")
    return inside if bracket else ""


class LongestFirst(OrderedDict[str, Any]):
    """xdist's queue of groups, taken from in the order that `order` gives when the first is taken; others come last."""

    def __init__(self, order: Callable[[], Sequence[str]]) -> None:
        super().__init__()
        self.order = order
        self.places: dict[str, int] | None = None

    def popitem(self, last: bool = True) -> tuple[str, Any]:
        """The next group to hand out."""
        if self.places is None:
            self.places = {group: place for place, group in enumerate(self.order())}
        places = self.places
        name = min(self, key=lambda group: places.get(group, len(places)))
        return name, self.pop(name)


def group_of(nodeid: str) -> str:
    """Model, method and device of a measured case's node id; the node id itself for any other test."""
    fields = case_id(nodeid).split("/")
    return "/".join((*fields[:2], fields[-1])) if len(fields) in CASE_FIELDS else nodeid


def brief(row: Row) -> str:
    """The figure in a few characters."""
    if row.value is None:
        return f"missing: {visible(row.reason)}"
    scale, unit, digits = {"B": (2**-20, "MiB", 2), "s": (1e3, "ms", 1)}.get(row.unit, (1.0, row.unit, 4))
    return f"{row.value * scale:.{digits}f} {unit} ({row.verdict})"
