"""pytest's face: the options, and hooks that hand over to plain objects. Light until a session uses the harness.

pytest loads this module wherever the wheel is installed. In a project that does not use it, it imports what declares
the options and nothing more, and only their long spellings (`--harness-...`) exist, so that another project's own
`--device` is not broken. A session uses it with [tool.harness] in pyproject.toml, `-p harness.plugin`, one of its
options, `harness.cases` among the arguments, or a test that takes `harness_case` or `harness_check`: `begin` loads the
rest then.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import os
import shlex
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from harness.core.errors import HarnessError
from harness.core.options import SETTINGS, read_declared

if TYPE_CHECKING:
    from pathlib import Path

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
ADDED = "PYTEST_ADDOPTS"
STATE = pytest.StashKey["State"]()
ANEW = pytest.StashKey[tuple[str, ...] | None]()  # the arguments with which pytest is begun anew, once that was asked


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Declare every option, under its short name too where the harness is active."""
    config = pluginmanager.get_plugin("pytestconfig")
    assert isinstance(config, pytest.Config)
    active = is_active(config) or (anew(config) is not None and _has_short(config))
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


def anew(config: pytest.Config) -> tuple[str, ...] | None:
    """The arguments to begin pytest anew with, where it took the value of an option of ours for a path to collect.

    It looks for the project (rootdir, configuration) before it knows any plugin's options: of `--report-dir DIR` it
    sees a path, and looks around that where there is one; in `--report-dir=DIR` it sees none. None where all is well:
    there is no such value, or no other path was given and the project found is the folder that pytest was started in.
    """
    if ANEW in config.stash:
        return config.stash[ANEW]
    given, start = config.known_args_namespace, config.invocation_params.dir
    line = [*_added(), *map(str, config.invocation_params.args)]
    if given.inifilename or not any(_is_there(start / value) for value in joined(line, short=True)[1]):
        return None
    values = joined(line, short=_has_short(config))[1]
    found_here = config.rootpath == start and config.inipath is not None and config.inipath.parent == start
    if not any(_is_there(start / value) for value in values) or (found_here and set(given.file_or_dir) <= set(values)):
        return None
    return tuple(joined(list(map(str, config.invocation_params.args)), short=_has_short(config))[0])


def _added() -> list[str]:
    """The arguments that the environment adds, to a worker of pytest-xdist none."""
    return [] if "PYTEST_XDIST_WORKER" in os.environ else shlex.split(os.environ.get(ADDED, ""))


def _has_short(config: pytest.Config) -> bool:
    """Whether the short names exist, or would if the project were looked for from where pytest was started."""
    start = config.invocation_params.dir
    return is_active(config) or any(_declares(folder) for folder in (start, *start.parents))


def joined(words: Sequence[str], *, short: bool) -> tuple[list[str], list[str]]:
    """A command line with our options' values written behind a "=", and those that were words of their own."""
    spellings = {f"--harness-{setting.flag}" for setting in SETTINGS if setting.read}
    spellings |= {f"--{setting.flag}" for setting in SETTINGS if setting.read and short}
    line: list[str] = []
    values: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--":
            return [*line, word, *rest], values
        value = next(rest, None) if word in spellings else None
        if value is None:
            line.append(word)
        elif value.startswith("-"):  # the option lacks its value, as argparse will say
            line += [word, value]
        else:
            values.append(value)
            line.append(f"{word}={value}")
    return line, values


def _declares(folder: Path) -> bool:
    try:
        return read_declared(folder)[0]
    except HarnessError:
        return True


def _is_there(path: Path) -> bool:
    with contextlib.suppress(OSError):  # a long list is no file name
        return path.exists()
    return False


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(
    early_config: pytest.Config, parser: pytest.Parser, args: list[str]
) -> Generator[None, object, object]:
    """Where pytest has to begin anew, load nothing of the project that it took for the user's."""
    early_config.stash[ANEW] = again = anew(early_config)
    if again is not None:
        args[:] = ["--noconftest"]
        early_config.known_args_namespace = parser.parse_known_args(args, copy.copy(early_config.option))
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> int | pytest.ExitCode | None:
    """Begin anew in the user's own project, with the same options spelled so that pytest sees no path in them."""
    again = anew(config)
    if again is None:
        return None
    if added := _added():
        os.environ[ADDED] = shlex.join(joined(added, short=_has_short(config))[0])
    return pytest.main(list(again), config.invocation_params.plugins)


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
        from harness.plugin import github
        from harness.plugin.collector import Collector, Publisher

        collector = Collector(state)
        register(collector, "harness-collector")
        register(Publisher(state.options), "harness-publisher")
        if github.wanted():
            register(github.Workflow(collector), "harness-github")
        if config.option.collectonly:
            from harness.plugin.preview import Preview

            register(Preview(state), "harness-preview")
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
    """Cases in plan order; with --shard this part of what -m, -k and node ids left, other tests in the first."""
    if not (state := config.stash.get(STATE, None)):
        return
    state.order(items)
    if state.options.shard:
        config.hook.pytest_deselected(items=state.cut(items))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Note which cases were selected, in every process: their number shares out the session's error rate."""
    if state := session.config.stash.get(STATE, None):
        state.select_items(session.items)


@pytest.fixture
def harness_check(request: pytest.FixtureRequest) -> Iterator[Callable[[Case], Row]]:
    """Measure and judge one case; fails with a small report where the session must fail."""
    from harness.plugin.state import check, tidy

    yield functools.partial(check, request, state_of(request.config))
    tidy(request.node)


@pytest.fixture(scope="session")
def harness_measure(request: pytest.FixtureRequest) -> Callable[..., list[Row]]:
    """`harness.measure` with the command line's --device and --baselines, unless the call says otherwise.

    With --report-dir each call leaves its report in a folder of its own there, `DIR/tests/TEST/1`; without it the
    measurements are temporary. A live module says by itself where it lies: --device is not held against it.
    """
    from harness.plugin.state import measure_in

    return measure_in(request.config)
