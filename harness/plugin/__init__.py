"""pytest's face: the options, and hooks that hand over to plain objects. Light until a session uses the harness.

pytest loads this module wherever the wheel is installed. In a project that does not use it, it imports what declares
the options and nothing more, and only their long spellings (`--harness-...`) exist, so that another project's own
`--device` is not broken. A session uses it with [tool.harness] in pyproject.toml, `-p harness.plugin`, one of its
options, `harness.cases` among the arguments, or a test that takes `harness_case` or `harness_check`: `begin` loads the
rest then.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from harness.core.errors import HarnessError
from harness.core.options import SETTINGS, read_declared

if TYPE_CHECKING:
    from harness.core.records import Case, Row
    from harness.plugin.state import State

MARKS = {
    "gpu": "cases on a CUDA device",
    "cpu": "cases on the processor",
    "perplexity": "perplexity and its paired delta to the reference",
    "divergence": "KL divergence and top-1 agreement with the reference",
    "memory": "bytes, predicted and measured",
    "latency": "timed cases; each runs with nothing beside it",
    "published": "figures of published reports",
    "contract": "promises that every method keeps, on small random models",
    "invariant": "behaviour that must hold whatever the version",
}
STATE = pytest.StashKey["State"]()


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Declare every option, under its short name too where the harness is active."""
    config = pluginmanager.get_plugin("pytestconfig")
    assert isinstance(config, pytest.Config)
    active = is_active(config)
    group = parser.getgroup("harness", "LLM quantization harness")
    for setting in SETTINGS:
        spellings = [f"--harness-{setting.flag}"] + ([f"--{setting.flag}"] if active else [])
        dest = f"harness_{setting.name}"
        if setting.read is None:
            group.addoption(*spellings, dest=dest, action="store_true", help=f"{setting.help} (default: off)")
        else:
            text = f"{setting.help} (default: {setting.default})"
            reader = functools.partial(as_argument, setting.read)
            group.addoption(*spellings, dest=dest, type=reader, metavar=setting.metavar, default=None, help=text)


def is_active(config: pytest.Config) -> bool:
    """Whether the short names exist: asked for with -p, or the project has a [tool.harness] table."""
    arguments = list(map(str, config.invocation_params.args))
    asked = "-pharness.plugin" in arguments or ("-p", "harness.plugin") in itertools.pairwise(arguments)
    try:
        return asked or read_declared(config.rootpath)[0]
    except HarnessError:
        return True  # the table is there; `begin` says what is wrong with it


def as_argument(read: Callable[[str], Any], text: str) -> Any:
    """What a setting's reader makes of a text, its error turned into argparse's."""
    try:
        return read(text)
    except HarnessError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def begin(config: pytest.Config) -> State:
    """Load the harness into this process: its marks, its options read once, and in the controller what keeps rows."""
    from harness.core import catalog  # local, as all below: a session that does not use it pays for nothing
    from harness.plugin.state import State

    worker = getattr(config, "workerinput", None)
    register = config.pluginmanager.register
    for name, meaning in MARKS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    try:
        state = State(config)
    except (HarnessError, OSError) as error:
        raise pytest.UsageError(str(error)) from error
    for family in catalog.metrics().keys() - MARKS.keys():  # that the project declares or a package adds
        config.addinivalue_line("markers", f"{family}: a metric of this project or an installed package")
    if worker is not None:
        from harness.plugin.xdist import CARD, Worker

        if CARD not in worker:  # the controller sees no test, only what the command line and the project say
            fix = "give pyproject.toml a [tool.harness] table, or pytest -p harness.plugin"
            raise pytest.UsageError(f"with -n a session must say before its tests that it measures cases: {fix}")
        register(Worker(state, worker), "harness-worker")
    else:
        from harness.plugin.collector import Collector, Publisher

        collector = Collector(state)
        register(collector, "harness-collector")
        register(Publisher(state.options), "harness-publisher")
        if state.workers:
            from harness.plugin.xdist import Controller

            register(Controller(state, collector), "harness-controller")
    config.stash[STATE] = state
    return state


def state_of(config: pytest.Config) -> State:
    """What this process holds, from the first time that anybody asks; UsageError for what a user must fix."""
    return config.stash.get(STATE, None) or begin(config)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Read the options once, where the command line or the project says that this session means the harness."""
    given = any(config.getoption(f"harness_{setting.name}") not in (None, False) for setting in SETTINGS)
    named = any("harness.cases" in argument or "harness/cases" in argument for argument in config.args)
    if given or named or is_active(config):
        begin(config)


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the group's process, and leave the report directory to the next session."""
    if state := config.stash.get(STATE, None):
        state.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a planned case."""
    if "harness_case" not in metafunc.fixturenames:
        return
    state = state_of(metafunc.config)
    apart = metafunc.definition.get_closest_marker("invariant") is not None
    plan = state.invariants if apart else state.plan
    if apart and not plan:
        unasked = pytest.mark.skip(reason="run with -m invariant")
        return metafunc.parametrize("harness_case", [pytest.param(None, id="all", marks=unasked)])
    devices = {"cuda": pytest.mark.gpu, "cpu": pytest.mark.cpu}
    marks = {case: (devices[case.device], getattr(pytest.mark, case.family)) for case in plan}
    metafunc.parametrize("harness_case", [pytest.param(case, id=case.id, marks=marks[case]) for case in plan])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --shard, keep this part of what -m, -k and node ids left; tests that measure no case are in the first."""
    if (state := config.stash.get(STATE, None)) and state.options.shard:
        config.hook.pytest_deselected(items=state.cut(items))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Note which cases were selected, in every process: their number shares out the session's error rate."""
    if state := session.config.stash.get(STATE, None):
        state.select_items(session.items)


@pytest.fixture
def harness_check(request: pytest.FixtureRequest) -> Callable[[Case], Row]:
    """Measure and judge one case; fails with a small report where the session must fail."""
    from harness.plugin.state import check

    return functools.partial(check, request, state_of(request.config))


@pytest.fixture(scope="session")
def harness_measure(request: pytest.FixtureRequest) -> Callable[..., list[Row]]:
    """`harness.measure` with the command line's --device and --baselines, unless the call says otherwise.

    With --report-dir each call leaves its report in a folder of its own there, `DIR/tests/TEST/1`; without it the
    measurements are temporary. A live module says by itself where it lies: --device is not held against it.
    """
    from harness.plugin.state import measure_in

    return measure_in(request.config)
