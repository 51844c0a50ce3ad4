"""One session's work on cases, as a plain object: resume, measure, judge, record. No pytest, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from harness import judge
from harness.core.catalog import member_of
from harness.core.environment import Environment, capture
from harness.core.errors import HarnessError
from harness.core.files import timing_lock
from harness.core.records import Case, Row, Verdict
from harness.core.specification import parse
from harness.inputs.models import names
from harness.inputs.texts import corpora
from harness.judge import baselines, bounds, error_rate, known_faults
from harness.judge.baselines import changes, exact_facts
from harness.metrics.measuring import sequential
from harness.metrics.measuring.checks import LAYER
from harness.results import losses
from harness.results.directory import ReportDirectory
from harness.run import engines
from harness.run.messages import Asked, Stop

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from harness.core.options import Options
    from harness.run.local import Runner


class Session:
    """Everything a process needs to answer `check(case)`."""

    def __init__(
        self,
        options: Options,
        threads: int,
        cases: Sequence[Case] = (),
        runner: Callable[..., Runner] | None = None,
    ) -> None:
        """`runner` makes what measures; None: what the options' engine is."""
        self.options = options
        self.directory = ReportDirectory(options.report_dir)
        self.bounds = bounds.load(options.baselines)
        self.faults = known_faults.load(options.baselines)
        self.baselines = baselines.Baselines(options.baselines)
        self.tests = error_rate.tests(cases, self.bounds, stop_early=options.stop_early)
        # machine-wide: a latency measured in one session must not run beside another session's cases
        runner = runner or engines.runner_of(options)
        self.runner: Runner = runner(options, threads=threads, lock=timing_lock())

    @cached_property
    def resumable(self) -> dict[str, Row]:
        """Finished rows of the report directory by case id, with --resume."""
        return self.directory.resumable() if self.options.resume else {}

    def prepare(self, cases: Sequence[Case], say: Callable[[str], None]) -> Mapping[str, str]:
        """Check assets here, without torch, then make checkpoints and token plans in a process of their own.

        Returns what identifies them, to be held to for the whole session.
        """
        declared = self.options.declared
        for model in dict.fromkeys(case.model for case in cases if case.model != LAYER):
            names.locate(
                parse(model),
                declared,
                allow_pickle=self.options.allow_pickle,
                trust_remote_code=self.options.trust_remote_code,
            )
        for dataset in dict.fromkeys(case.dataset for case in cases if case.dataset):
            corpora.check(parse(dataset), declared)
        inputs = self.runner.prepare(cases, say)
        self.runner.begin(cases, lambda case: Asked(case, self.resumable.get(case.id), self.stop(case)))
        return inputs

    def hold_inputs(self) -> None:
        """In a worker: hold groups to what the controller's `prepare` found, as the report directory has it."""
        self.runner.inputs = self.directory.known_inputs()

    def check(self, case: Case, *, reason_missing: str = "") -> tuple[Row, str]:
        """Measure and judge a case; returns its row and, where a bug was met, the traceback."""
        if reason_missing:
            return Row.of(case, verdict=Verdict.MISSING, reason=reason_missing), ""
        try:
            row, trouble = self.runner.measure(case, self.resumable, self.stop(case))
            return (row if row.value is None else self.judged(row)), trouble
        except HarnessError as error:  # a baseline or a loss file that became unreadable under the session
            return Row.of(case, verdict=Verdict.MISSING, reason=f"not judged: {error}"), ""

    def ahead(self) -> list[Row]:
        """Judged rows that an engine measured ahead and that no test asked for: the session ended before."""
        return [row if row.value is None else self.judged(row) for row in self.runner.ahead()]

    def stop(self, case: Case) -> Stop | None:
        """When an early-stopped delta is decided, by its bound and its recorded variance; None to read everything."""
        if not self.options.stop_early or case.metric != "perplexity.delta":
            return None
        rule = self.bounds.against_reference(case)
        recorded = self.baselines.find(case, capture(case.device, self.runner.threads))
        known = recorded if recorded and recorded.carries else None
        variance = sequential.variance_bound(known.interval, known.count) if known else None
        alpha = error_rate.level(self.tests) if rule else error_rate.ALPHA  # without a bound nothing is tested
        return Stop(rule.limit if rule else None, variance, known.token_hash if known else "", alpha)

    def judged(self, row: Row) -> Row:
        """The row with its verdicts, against the reference and against the record."""
        world = self.environment(row)
        if row.case.family == "invariant":
            return known_faults.judge(row, self.faults, world)
        recorded = self.baselines.find(row.case, world)
        judged = judge.judge(
            row,
            member_of(row.case),
            bounds=self.bounds,
            recorded=recorded,
            environment=world,
            nll=self.nll,
            tests=self.tests,
        )
        return judge.hold(judged, () if self.options.regenerate else self.changed_facts(judged))

    def changed_facts(self, row: Row) -> list[str]:
        """The exact facts of a row that are recorded otherwise, each with both values."""
        return changes(self.baselines.facts(row.case), self.facts(row))

    def environment(self, row: Row) -> Environment:
        """The environment a row was measured in."""
        return Environment.from_dict(self.world(row))

    def world(self, row: Row) -> Mapping[str, Any]:
        """The same as JSON: of this process's measurements, or of the report that is being resumed."""
        here = self.runner.environments.get(row.environment)
        return here or self.directory.known_environments().get(row.environment, {})

    def nll(self, sha: str) -> NDArray[np.float32] | None:
        """Per-token NLL by its sha, from this report or from the baselines of any model."""
        return losses.find((self.directory.losses, *sorted(self.options.baselines.glob("*/nll"))), sha)

    def facts(self, row: Row) -> dict[str, Any]:
        """The exact facts a row brings, to be held with pytest-regressions."""
        return {} if row.case.family == "invariant" else exact_facts(row, member_of(row.case))

    def close(self) -> None:
        """End the group's process."""
        self.runner.close()
