"""What one pytest process holds, and what its tests ask of it: a case's row, or a measurement of their own."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from urllib.parse import quote

import pytest

from harness import judge
from harness.core.files import rewritten
from harness.core.options import SETTINGS, Options, build, read_declared
from harness.core.records import Case, Row, Verdict
from harness.core.values import sealed
from harness.judge import baselines, exact
from harness.results.directory import ReportDirectory
from harness.run import measure
from harness.run import plan as planning
from harness.run.session import Session, check_engine, has_cuda

# What a test leaves for the controller: properties of its report, which pytest-xdist carries between processes.
ROW = "harness_row"  # as JSON
ENVIRONMENT = "harness_environment"  # that it was measured in
UNWRITTEN = "harness_unwritten"  # why a record could not be written
# and what other tools read of a case: pytest's --junitxml writes them as properties of its test
TOLD = "value unit interval verdict verdict_reference verdict_baseline device environment".split()
FOLLOWED = ("device", "baselines")  # options of the session that a test's own measurements follow
LONGEST = 150  # characters of a test in a folder's name


class State:
    """Made once a process; the hooks tell it which cases were selected, nobody else writes into it.

    Args:
        config: pytest's, whose options and command line are read here and nowhere else.

    Raises:
        HarnessError: an option, a name, a record's schema or the [tool.harness] table that cannot be meant.
    """

    def __init__(self, config: pytest.Config) -> None:
        given = {setting.name: config.getoption(f"harness_{setting.name}") for setting in SETTINGS}
        regenerate = "all" if config.getoption("regen_all", False) else ""
        regenerate = regenerate or ("force" if config.getoption("force_regen", False) else "")
        _, declared = read_declared(config.rootpath)
        planning.open_to(declared)
        self.options: Options = build(
            given,
            declared,
            config.invocation_params.dir,
            regenerate=regenerate,
            mark_expression=config.option.markexpr or "",
        )
        self.is_worker = hasattr(config, "workerinput")
        self.workers = len(config.getoption("tx", None) or ())  # of pytest-xdist
        check_engine(self.options.engine, self.workers)
        self.cuda = has_cuda(self.options.device, self.options.ray_address)
        self.plan = planning.plan(self.options, self.cuda)
        named = (config.option.markexpr, config.option.keyword, *config.args)  # what the user speaks of
        asked = any("invariant" in str(word) for word in named)
        self.invariants = planning.invariant_plan(self.options, self.cuda) if asked else ()
        self.places = {case: place for place, case in enumerate((*self.invariants, *self.plan))}
        baselines.validate(self.options.baselines)
        self.selected: tuple[Case, ...] = ()  # of this process; the controller's are those of all workers
        self.whole: tuple[Case, ...] = ()  # with --shard, the selected plan before it was cut
        self._session: Session | None = None

    def order(self, items: list[Any]) -> None:
        """Put the cases of each module into plan order, in the places that they have among other tests.

        Who shuffles tests (pytest-randomly) would have every model loaded anew for each of its cases.
        """
        measured: dict[Any, list[tuple[Case, int]]] = {}
        for place, item in enumerate(items):
            for case in cases_of([item]):
                measured.setdefault(item.parent, []).append((case, place))
        for own in measured.values():
            moved = [items[place] for _, place in sorted(own, key=lambda one: self.places.get(one[0], 0))]
            for (_, place), item in zip(own, moved, strict=True):
                items[place] = item

    def cut(self, items: list[Any]) -> list[Any]:
        """Leave pytest's items of this shard in the list; returns the others. What measures no case is of the first."""
        assert self.options.shard
        self.whole = cases_of(items)
        mine, first = set(planning.mine(self.whole, self.options)), self.options.shard.index == 1
        kept: list[Any] = []
        others: list[Any] = []
        for item in items:
            case = cases_of([item])
            (kept if (case[0] in mine if case else first) else others).append(item)
        items[:] = kept
        return others

    def select_items(self, items: Iterable[Any]) -> None:
        """The cases of the items that pytest collected and selected are this session's."""
        self.select(cases_of(items))

    def select(self, cases: Iterable[Case]) -> None:
        """These cases are this session's, in plan order."""
        self.selected = tuple(sorted(dict.fromkeys(cases), key=lambda case: self.places.get(case, 0)))

    def learn_whole(self, cases: Sequence[Case]) -> None:
        """The plan before it was cut."""
        self.whole = tuple(cases)

    @property
    def session(self) -> Session:
        """The session, made when the first case is."""
        if self._session is None:
            cases = self.whole or self.selected
            self._session = Session(self.options, planning.threads(), cases, cuda=self.cuda)
            self._session.meant = self.selected
            if self.is_worker:  # held to what the controller's session found when it began
                self._session.take_over()
                self._session.runner.say = lambda line: print(line, file=sys.__stderr__, flush=True)
        return self._session

    def close(self) -> None:
        """End the session, if there is one."""
        if self._session:
            self._session.close()


def cases_of(items: Iterable[Any]) -> tuple[Case, ...]:
    """The cases of pytest's collected items, each once."""
    calls = (getattr(item, "callspec", None) for item in items)
    planned = (call.params.get("harness_case") for call in calls if call)
    return tuple(dict.fromkeys(case for case in planned if case is not None))


def check(request: pytest.FixtureRequest, state: State, case: Case) -> Row:
    """Measure and judge one case; fails with a small report where the session must fail."""
    __tracebackhide__ = True
    session, options, properties = state.session, state.options, request.node.user_properties
    row, trouble = session.check(case)
    properties.append((ROW, row.to_json()))
    properties += ((name, str(known)) for name in TOLD if (known := getattr(row, name)) not in (None, ""))
    if row.environment:
        properties.append((ENVIRONMENT, dict(session.world(row))))
    if trouble:
        pytest.fail(f"{case.id}: a bug met while measuring\n{trouble}", pytrace=False)
    if row.value is None:
        if options.allow_missing or row.left_out:
            pytest.skip(row.reason if row.left_out else f"missing: {row.reason}")
        pytest.fail(f"{case.id}: missing: {row.reason}", pytrace=False)
    if options.regenerate:
        write_facts(request, session, row)
    if options.regenerate == "all" and row.verdict_reference is not Verdict.OUT_OF_BOUND:
        return row
    if options.regenerate == "force" and baselines.to_record([row], "force"):
        pytest.fail(f"{case.id}: recorded anew because of --force-regen; run again without it", pytrace=False)
    if fails(row, options):
        if exact.first_of(row) == case.id:
            pytest.fail(exact.message(row), pytrace=False)
        world = session.environment(row)
        recorded = session.baselines.serving(row, world)
        pytest.fail(judge.message(row, recorded, world), pytrace=False)
    return row


def tidy(node: pytest.Item) -> None:
    """Take the row back from a test that ends: its call's report has it, and --junitxml prints what is left here."""
    node.user_properties[:] = [one for one in node.user_properties if one[0] not in (ROW, ENVIRONMENT, UNWRITTEN)]


def fails(row: Row, options: Options) -> bool:
    """Whether a row fails the session under its options."""
    return judge.fails(
        row,
        require_baselines=options.require_baselines,
        allow_missing=options.allow_missing,
        allow_changed_input=options.allow_changed_input,
    )


def write_facts(request: pytest.FixtureRequest, session: Session, row: Row) -> None:
    """Exact facts that are new or other into `<method>.yaml`, through pytest-regressions and its flags."""
    __tracebackhide__ = True
    facts, folder = session.facts(row), session.options.baselines
    if not facts:
        return
    path = baselines.exact_path(folder, row.case)
    try:  # the fixture writes in place: a kill or a full disk would leave half a file
        with baselines.recording(folder):
            recorded = baselines.read_exact(path)
            told = baselines.provenance(session.world(row), row.identity)
            document = baselines.exact_document(recorded, facts, told)
            if document == recorded:
                return
            with rewritten(path) as draft:
                request.getfixturevalue("data_regression").check(sealed(document), fullpath=draft)
    except OSError as error:
        request.node.user_properties.append((UNWRITTEN, f"{path} cannot be written ({error.strerror})"))


def measure_in(config: pytest.Config) -> Callable[..., list[Row]]:
    """What the fixture `harness_measure` gives."""
    given = {name: config.getoption(f"harness_{name}") for name in FOLLOWED}
    start, home = config.invocation_params.dir, config.getoption("harness_report_dir")  # a test may change its folder
    if given["baselines"] is not None:
        given["baselines"] = start / given["baselines"]
    calls: dict[str, itertools.count[int]] = {}

    @functools.wraps(measure.measure)
    def measured(models: Any = None, *arguments: Any, **options: Any) -> list[Row]:
        chosen = {name: value for name, value in given.items() if not (name == "device" and measure.is_live(models))}
        if home is not None:
            test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0] or "session"
            number = next(calls.setdefault(test, itertools.count(1)))
            folder = quote(test, safe="")
            if len(folder) > LONGEST:
                folder = f"{hashlib.sha256(folder.encode()).hexdigest()[:8]}-{folder[-LONGEST:]}"
            ReportDirectory(start / home).claim()
            chosen["report_dir"] = start / home / "tests" / folder / str(number)
        return measure.measure(models, *arguments, **(chosen | options))

    return measured
