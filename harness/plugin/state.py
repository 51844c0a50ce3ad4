"""What one pytest process holds: the options, the plan, which cases were selected, and the session that measures."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from harness.core.options import SETTINGS, Options, build, read_declared
from harness.core.records import Case, Row
from harness.judge import baselines, bounds, error_rate
from harness.run import engines, plan, project
from harness.run.session import Session

if TYPE_CHECKING:
    import pytest


class State:
    """Made once a process; the hooks tell it which cases were selected, nobody else writes into it.

    Args:
        config: pytest's, whose options and command line are read here and nowhere else.

    Raises:
        HarnessError: an option, or the [tool.harness] table, that cannot be meant.
    """

    def __init__(self, config: pytest.Config) -> None:
        given = {setting.name: config.getoption(f"harness_{setting.name}") for setting in SETTINGS}
        regenerate = "all" if config.getoption("regen_all", False) else ""
        regenerate = regenerate or ("force" if config.getoption("force_regen", False) else "")
        _, declared = read_declared(config.rootpath)
        project.open_to(declared)
        self.options: Options = build(
            given,
            declared,
            config.invocation_params.dir,
            regenerate=regenerate,
            mark_expression=config.option.markexpr or "",
        )
        self.is_worker = hasattr(config, "workerinput")
        self.workers = len(config.getoption("tx", None) or ())  # of pytest-xdist
        self.words = (config.option.markexpr, config.option.keyword, *config.args)  # what the user named
        self.selected: tuple[Case, ...] = ()  # of this process; the controller's are those of all workers
        self.whole: tuple[Case, ...] = ()  # with --shard, the selected plan before it was cut
        self._session: Session | None = None

    def validate(self) -> None:
        """Every option, name and schema error now, as a HarnessError."""
        engines.check(self.options, self.workers)
        _ = self.plan
        baselines.validate(self.options.baselines)

    @functools.cached_property
    def cuda(self) -> bool:
        """Whether cases can run on a CUDA device."""
        return engines.cuda(self.options)

    @functools.cached_property
    def plan(self) -> tuple[Case, ...]:
        """Every case that the options ask for."""
        return plan.plan(self.options, self.cuda)

    @functools.cached_property
    def invariants(self) -> tuple[Case, ...]:
        """Every invariant's case; () where the command line does not speak of invariants."""
        asked = any("invariant" in str(word) for word in self.words)
        return plan.invariant_plan(self.options, self.cuda) if asked else ()

    def cut(self, items: list[Any]) -> list[Any]:
        """Leave pytest's items of this shard in the list; returns the others."""
        assert self.options.shard
        self.whole = plan.selected(items)
        items[:], others = plan.cut(items, self.whole, self.options.shard)
        return others

    def select_items(self, items: Iterable[Any]) -> None:
        """The cases of the items that pytest collected and selected are this session's."""
        self.select(plan.selected(items))

    def select(self, cases: Iterable[Case]) -> None:
        """These cases are this session's."""
        self.selected = tuple(dict.fromkeys(cases))

    def learn_whole(self, cases: Sequence[Case]) -> None:
        """The plan before it was cut, as a worker saw it."""
        self.whole = tuple(cases)

    @property
    def tests(self) -> int:
        """Statistical tests of the session; a shard's are those of the whole, whose error rate it shares."""
        rules = bounds.load(self.options.baselines)
        return error_rate.tests(self.whole or self.selected, rules, stop_early=self.options.stop_early)

    @property
    def session(self) -> Session:
        """The session, made at the first case."""
        if self._session is None:
            self._session = Session(self.options, engines.threads(), self.whole or self.selected)
            if self.is_worker:
                self._session.hold_inputs()
        return self._session

    def ahead(self) -> list[Row]:
        """Judged rows that came in and that no test asked for; none where nothing was measured."""
        return self._session.ahead() if self._session else []

    def absent(self, case: Case) -> str:
        """Why a case cannot run here at all; '' when it can."""
        return "no CUDA device" if case.device == "cuda" and not self.cuda else ""

    def close(self) -> None:
        """End the group's process, if there is one."""
        if self._session:
            self._session.close()
