"""What a session would measure, said instead of measuring: behind `pytest --co`, and for `python -m harness plan`."""

from __future__ import annotations

import contextlib
import io
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest
from pluggy import HookimplMarker

from harness.core.errors import HarnessError
from harness.core.options import Options
from harness.core.records import Case
from harness.run import forecast

if TYPE_CHECKING:
    from harness.plugin.state import State

hookimpl = HookimplMarker("pytest")
QUIET = ("-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")  # the package is imported already


class Preview:
    """Registered with --collect-only: the plan in a few lines, with predicted time and download, unless -q asks for
    node ids alone.
    """

    def __init__(self, state: State) -> None:
        self.state = state

    @hookimpl
    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Below the collected tests."""
        state, config = self.state, terminalreporter.config
        if not state.selected or config.option.verbose < 0:
            return
        terminalreporter.section("harness: nothing is measured, this would be")
        fetched = forecast.downloads(state.selected, state.options)
        expected = forecast.forecast(state.selected, state.options)
        for line in forecast.in_short(state.selected, state.options, expected, fetched):
            terminalreporter.write_line(line)
        given = [word for word in map(str, config.invocation_params.args) if word not in ("--co", "--collect-only")]
        again = shlex.join(["python", "-m", "harness", "plan", *given])
        terminalreporter.write_line(f"memory, and what does not fit here: {again}")


class Selection:
    """A plugin that keeps what a session has selected."""

    def __init__(self) -> None:
        self.cases: Sequence[Case] = ()
        self.options: Options | None = None

    @hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Behind the harness's own hook, which chooses."""
        if collector := session.config.pluginmanager.get_plugin("harness-collector"):
            self.cases, self.options = collector.state.selected, collector.state.options


def selected(arguments: Sequence[str], tests: str) -> tuple[Sequence[Case], Options]:
    """The cases that pytest would measure with these arguments, and its options, -m, -k and node ids and all.

    Raises:
        HarnessError: pytest refuses them (it has said why), or they select no case.
    """
    found, said = Selection(), io.StringIO()
    command = ["--collect-only", "-qq", "-p", "harness.plugin", *QUIET, "--pyargs", tests, *arguments]
    with contextlib.redirect_stdout(said):
        status = pytest.main(command, plugins=[found])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        told = said.getvalue().strip()
        raise HarnessError(f"pytest ended with status {int(status)}" + (f":\n{told}" if told else ""))
    if found.options is None or not found.cases:
        raise HarnessError("these options select no case: see pytest --co")
    return found.cases, found.options
