"""pytest's face: options, marks, one test a case, and the hooks that hand over to plain objects.

Where the harness is active ([tool.harness] in pyproject.toml, or `-p harness.plugin`) the short option names
exist; elsewhere only `--harness-...`, so that another project's own `--device` is not broken.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest

from harness import judge
from harness.core.errors import HarnessError
from harness.core.files import rewritten
from harness.core.options import SETTINGS, Options, Setting, build, read_declared
from harness.core.records import Case, Row, Verdict
from harness.judge import baselines, bounds
from harness.judge.facts import exact_document, exact_path, holds, provenance, read_exact
from harness.plugin.collector import Collector
from harness.plugin.publisher import Publisher
from harness.run import engines, project
from harness.run import plan as planning
from harness.run.session import Session

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
            reader = as_argument(setting)
            group.addoption(*spellings, dest=dest, type=reader, metavar=setting.metavar, default=None, help=text)


def is_active(config: pytest.Config) -> bool:
    """Whether the short names exist: asked for with -p, or the project has a [tool.harness] table."""
    arguments = config.invocation_params.args
    asked = any(
        str(item) == "-pharness.plugin" or (str(item) == "harness.plugin" and str(before) == "-p")
        for before, item in zip(("", *arguments), arguments, strict=False)
    )
    try:
        return asked or read_declared(config.rootpath)[0]
    except HarnessError:
        return True  # the table is there; pytest_configure says what is wrong with it


def as_argument(setting: Setting) -> Callable[[str], Any]:
    """The setting's reader, its errors turned into argparse's."""
    assert setting.read is not None
    read = setting.read

    def reader(text: str) -> Any:
        try:
            return read(text)
        except HarnessError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    reader.__name__ = setting.name
    return reader


class State:
    """What this pytest process holds: the options, the plan, and the session that measures."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        given = {setting.name: config.getoption(f"harness_{setting.name}") for setting in SETTINGS}
        regenerate = "all" if config.getoption("regen_all", False) else ""
        regenerate = regenerate or ("force" if config.getoption("force_regen", False) else "")
        _, declared = read_declared(config.rootpath)
        self.selected: tuple[Case, ...] = ()  # of this process: they share the session's error rate
        project.open_to(declared)
        self.options: Options = build(
            given,
            declared,
            config.invocation_params.dir,
            regenerate=regenerate,
            mark_expression=config.option.markexpr or "",
        )

        self.whole: tuple[Case, ...] = ()  # with --shard, the selected plan before it was cut

    @functools.cached_property
    def cuda(self) -> bool:
        """Whether cases can run on a CUDA device."""
        return engines.cuda(self.options)

    @functools.cached_property
    def plan(self) -> tuple[Case, ...]:
        """Every case that the options ask for."""
        return planning.plan(self.options, self.cuda)

    @functools.cached_property
    def bounds(self) -> bounds.Bounds:
        """The rules of this session."""
        return bounds.load(self.options.baselines)

    @functools.cached_property
    def invariants(self) -> tuple[Case, ...]:
        """Every invariant's case; () where the command line does not speak of invariants."""
        said = (self.config.option.markexpr, self.config.option.keyword, *self.config.args)
        asked = any("invariant" in str(text) for text in said)
        return planning.invariant_plan(self.options, self.cuda) if asked else ()

    @functools.cached_property
    def session(self) -> Session:
        """The session, made at the first case."""
        return Session(self.options, engines.threads(), self.selected)

    def absent(self, case: Case) -> str:
        """Why a case cannot run here at all; '' when it can."""
        return "no CUDA device" if case.device == "cuda" and not self.cuda else ""


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Read the options once, in every process; collect in the controller."""
    for name, meaning in MARKS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    try:
        state = State(config)
        workers = len(config.getoption("tx", None) or ())
        engines.check(state.options, workers)
        if is_active(config) or any("harness.cases" in argument for argument in config.args):
            _ = state.plan  # every option, name and schema error now, in one line
            baselines.validate(state.options.baselines)
    except HarnessError as error:
        raise pytest.UsageError(str(error)) from error
    config.stash[STATE] = state
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Collector(state, pytest.UsageError), "harness-collector")
        config.pluginmanager.register(Publisher(state.options, pytest.UsageError), "harness-publisher")


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the group's process."""
    state = config.stash.get(STATE, None)
    if state is not None and "session" in state.__dict__:
        state.session.close()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a planned case."""
    if "harness_case" not in metafunc.fixturenames:
        return
    try:
        state = metafunc.config.stash[STATE]
        apart = metafunc.definition.get_closest_marker("invariant") is not None
        plan = state.invariants if apart else state.plan
    except HarnessError as error:
        raise pytest.UsageError(str(error)) from error
    if apart and not plan:
        unasked = pytest.param(None, id="all", marks=pytest.mark.skip(reason="run with -m invariant"))
        metafunc.parametrize("harness_case", [unasked])
        return
    parameters = [
        pytest.param(
            case,
            id=case.id,
            marks=(
                pytest.mark.gpu if case.device == "cuda" else pytest.mark.cpu,
                getattr(pytest.mark, case.family),
            ),
        )
        for case in plan
    ]
    metafunc.parametrize("harness_case", parameters)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --shard, keep this part of what -m, -k and node ids left; tests that measure no case are in the first."""
    state = config.stash[STATE]
    if (shard := state.options.shard) is None:
        return
    state.whole = planning.selected(items)
    items[:], left = planning.cut(items, state.whole, shard)
    config.hook.pytest_deselected(items=left)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """An xdist worker tells the controller the plan before it was cut."""
    state, told = session.config.stash.get(STATE, None), getattr(session.config, "workeroutput", None)
    worker = getattr(session.config, "workerinput", {})
    if state is not None and state.whole and told is not None and worker.get("workerid") == "gw0":
        told["harness_whole"] = [case.told() for case in state.whole]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Note which cases were selected, in every process: their number shares out the session's error rate.

    An xdist worker whose cases need a card leaves itself its own, before anything that computes is started.
    """
    state, worker = session.config.stash[STATE], getattr(session.config, "workerinput", {})
    cases = planning.selected(session.items)
    state.selected = state.whole or cases
    if "harness_card" in worker and any(case.device == "cuda" for case in cases):
        engines.pin(worker["harness_card"])


@pytest.fixture
def harness_check(request: pytest.FixtureRequest) -> Callable[[Case], Row]:
    """Measure and judge one case; fails with a small report where the session must fail."""
    state = request.config.stash[STATE]

    def check(case: Case) -> Row:
        __tracebackhide__ = True
        row, trouble = state.session.check(case, reason_missing=state.absent(case))
        request.node.user_properties.append(("harness_row", row.to_json()))
        if row.environment:
            request.node.user_properties.append(("harness_environment", dict(state.session.world(row))))
        if trouble:
            pytest.fail(f"{case.id}: a bug met while measuring\n{trouble}", pytrace=False)
        if row.verdict is Verdict.MISSING and state.options.allow_missing:
            pytest.skip(f"missing: {row.reason}")
        hold_facts(request, state, row)
        conclude(state, row)
        return row

    return check


def hold_facts(request: pytest.FixtureRequest, state: State, row: Row) -> None:
    """Exact facts against `<method>.yaml` through pytest-regressions; nothing is written without its flags."""
    __tracebackhide__ = True
    facts = {} if row.value is None else state.session.facts(row)
    if not facts:
        return
    path = exact_path(state.options.baselines, row.case)
    recorded = read_exact(path)
    if not state.options.regenerate and (not holds(recorded, facts) or row.verdict_baseline is Verdict.NOT_COMPARABLE):
        return  # the judge says so, with the command that records it
    world = state.session.world(row)
    document = exact_document(recorded, facts, provenance(world))
    try:  # the fixture writes in place: a kill or a full disk would leave half a file
        with rewritten(path) if state.options.regenerate else contextlib.nullcontext(path) as draft:
            request.getfixturevalue("data_regression").check(document, fullpath=draft)
    except OSError as error:
        request.node.user_properties.append(("harness_unwritten", f"{path} cannot be written ({error.strerror})"))


def conclude(state: State, row: Row) -> None:
    """Fail the test where the session must fail for this row, unless it is being recorded anew."""
    __tracebackhide__ = True
    options = state.options
    if options.regenerate == "all" and row.verdict_reference is not Verdict.OUT_OF_BOUND and row.value is not None:
        return
    if options.regenerate == "force" and row.value is not None and baselines.to_record([row], "force"):
        pytest.fail(f"{row.case.id}: recorded anew because of --force-regen; run again without it", pytrace=False)
    if judge.fails(row, require_baselines=options.require_baselines, allow_missing=options.allow_missing):
        pytest.fail(state_message(state, row), pytrace=False)


def state_message(state: State, row: Row) -> str:
    """The failure as a small report that ends with the command to run."""
    if row.value is None:
        return f"{row.case.id}: missing: {row.reason}"
    world = state.session.environment(row)
    return judge.message(row, state.session.baselines.find(row.case, world), world)
