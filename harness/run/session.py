"""One session's work on cases, as a plain object: resume, measure, judge. No pytest, no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from harness import judge
from harness.core import gpus
from harness.core.catalog import member_of
from harness.core.environment import Environment, capture
from harness.core.errors import HarnessError, refused
from harness.core.files import timing_lock
from harness.core.records import Case, Row, Verdict
from harness.judge import baselines, bounds, exact, known_faults, rules
from harness.judge.baselines import changes, exact_facts
from harness.metrics.measuring import sequential
from harness.results import losses
from harness.results.directory import IDENTITIES, ReportDirectory
from harness.run import plan
from harness.run.fingerprints import protocol_of
from harness.run.local import Arrived, Runner, missing
from harness.run.messages import UNFIT, Asked, Stop

if TYPE_CHECKING:
    from harness.core.options import Options


class Session:
    """Everything a process needs to answer `check(case)`."""

    def __init__(
        self,
        options: Options,
        threads: int,
        cases: Sequence[Case] = (),
        *,
        cuda: bool = True,
        runner: Callable[..., Runner] | None = None,
    ) -> None:
        """`cases` share one error rate: with --shard they are the whole plan's, otherwise those selected.

        `cuda` says whether a case can run on a CUDA device. `runner` makes what measures: by default, the engine.
        """
        self.options, self.cuda = options, cuda
        self.whole = self.meant = tuple(cases)  # in plan order, of all shards; and this session's own, once prepared
        self._gone: set[Case] = set()  # of those, without a figure
        self._failing: dict[str, Case] = {}  # by group: the case that fails for changed exact facts
        self.directory = ReportDirectory(options.report_dir)
        self.bounds = bounds.load(options.baselines)
        self.faults = known_faults.load(options.baselines)
        self.baselines = baselines.Baselines(options.baselines)
        self.tests = self.tests_of(cases)
        if options.engine == "ray" and runner is None:
            from harness.run.ray.ray_runner import RayRunner as runner  # local: only where Ray is asked for
        # machine-wide: a latency measured in one session must not run beside another session's cases
        self.runner: Runner = (runner or Runner)(options, threads=threads, lock=timing_lock())

    @cached_property
    def resumable(self) -> dict[str, Row]:
        """Finished rows of the report directory by case id, with --resume."""
        return self.directory.resumable() if self.options.resume else {}

    def open(self, cases: Sequence[Case], say: Callable[[str], None], arrived: Arrived, workers: int = 0) -> None:
        """Take the report directory, make what the cases need and write the plan down, before anything is measured.

        Args:
            cases: those that are meant; none where this is a shard of nothing.
            say: gets a line on what takes long.
            arrived: gets rows that an engine measured ahead of their turn.
            workers: of pytest-xdist, which measure in this process's place.

        Raises:
            HarnessError: what a user must mend; the directory is given up.
        """
        plan.check_cards(cases, self.options, self.cuda, workers)
        try:
            self.directory.own()
            if self.options.resume:
                self.resumable = self.directory.resumable(say)
            self.runner.arrived, self.runner.say = arrived, say
            runnable = [case for case in cases if not self.absent(case)]
            inputs = self.prepare(runnable, say) if runnable else {}
            self.directory.open(keep=self.options.resume)
            self.directory.keep_identities(self.runner.identities)
            if lacking := self.baselines.unidentified(runnable):
                say(f"harness: {lacking}")
            self.directory.keep_plan(cases)
            if workers:
                self.hand_over(inputs)
        except HarnessError:
            self.directory.release()
            raise
        except OSError as error:
            self.directory.release()
            raise HarnessError(refused(error) or str(error)) from error

    def hand_over(self, inputs: Mapping[str, str]) -> None:
        """Leave what preparing found to pytest-xdist's workers."""
        unfit = [[case.told(), reason] for case, reason in self.runner.unfit.items()]
        found = {IDENTITIES: json.dumps(dict(self.runner.identities)), UNFIT: json.dumps(unfit)}
        self.directory.keep_inputs({**inputs, **found})

    def take_over(self) -> None:
        """In such a worker: be held to what the controller's session found; what cannot be had is not tried again."""
        inputs = self.directory.known_inputs()
        self.runner.identities = json.loads(inputs.pop(IDENTITIES, "{}"))
        self.runner.unfit = {Case(**told): reason for told, reason in json.loads(inputs.pop(UNFIT, "[]"))}
        self.runner.inputs = inputs

    def tests_of(self, cases: Sequence[Case]) -> int:
        """How many statistical tests a session of these cases makes."""
        unpaired = self.baselines.unpaired(cases)
        return rules.tests(cases, self.bounds, stop_early=self.options.stop_early, unpaired=unpaired)

    def absent(self, case: Case) -> str:
        """Why a case cannot run here at all; '' when it can."""
        return "no CUDA device" if case.device == "cuda" and not self.cuda else ""

    def prepare(self, cases: Sequence[Case], say: Callable[[str], None]) -> Mapping[str, str]:
        """Make what the cases need; returns what identifies it, to be held to for the whole session."""
        self.meant = tuple(cases)
        self.whole = self.whole or self.meant
        inputs = self.runner.prepare(cases, say)
        self.refuse_loss()
        self.runner.begin(cases, lambda case: Asked(case, self.resumable.get(case.id), self.stop(case)))
        return inputs

    def refuse_loss(self) -> None:
        """HarnessError where a resumed session would put missing rows in the place of measured ones."""
        for case, reason in self.runner.unfit.items():
            if case.id in self.resumable:
                raise HarnessError(
                    f"{case.model} cannot be measured now, and its measured rows in {self.options.report_dir} stay: "
                    f"run again when what it needs can be had ({reason})"
                )

    def check(self, case: Case) -> tuple[Row, str]:
        """Measure and judge a case; returns its row and, where a bug was met, the traceback."""
        if reason := self.absent(case):
            return missing(case, reason), ""
        try:
            row, trouble = self.runner.measure(case, self.resumable, self.stop(case))
            row = row if row.value is None else self.judged(row)
        except (HarnessError, OSError) as error:  # a baseline or a loss file that became unreadable under the session
            row, trouble = missing(case, f"not judged: {error}"), ""
        if row.value is None:
            self._gone.add(case)
        else:  # at another try
            self._gone.discard(case)
        return row, trouble

    def ahead(self) -> list[Row]:
        """Judged rows that an engine measured ahead and that no test asked for: the session ended before."""
        return [row if row.value is None else self.judged(row) for row in self.runner.ahead()]

    def stop(self, case: Case) -> Stop | None:
        """When an early-stopped delta is decided, by its bound and its recorded variance; None to read everything."""
        if not self.options.stop_early or case.metric != "perplexity.delta":
            return None
        rule = self.bounds.against_reference(case)
        world, most = capture(case.device, self.runner.threads), self.options.max_tokens
        limits = (f"first {most}", "all") if most else ("all",)
        reading = baselines.reading_of(self.runner.inputs.get(protocol_of(case.dataset, case.protocol, case.model), ""))
        found = (self.baselines.find(case, world, limit, reading) for limit in limits)
        recorded = next(filter(None, found), None)
        known = recorded if recorded and recorded.carries else None
        variance = sequential.variance_bound(known.interval, known.count) if known else None
        alpha = rules.level(self.tests) if rule else rules.ALPHA  # without a bound nothing is tested
        return Stop(rule.limit if rule else None, variance, known.token_hash if known else "", alpha)

    def judged(self, row: Row) -> Row:
        """The row with its verdicts, against the reference and against the record."""
        world = self.environment(row)
        if row.case.family == "invariant":
            return known_faults.judge(row, self.faults, world)
        recorded = self.baselines.serving(row, world)
        kept = self.options.baselines  # losses are those of this report, or recorded ones of any model
        judged = judge.judge(
            row,
            member_of(row.case),
            bounds=self.bounds,
            recorded=recorded,
            environment=world,
            nll=lambda sha: losses.find((self.directory.losses, *sorted(kept.glob("*/nll"))), sha),
            tests=self.tests,
            identities=self.identities,
        )
        if self.options.regenerate:
            return judged
        document = self.baselines.facts(row.case)
        lines = changes(document, self.facts(judged))
        texts = [line for line in lines if line.startswith(("token_hash ", "tokens "))]
        known = document.get("provenance", {}).get("identity")  # facts of another model: the verdict says so
        other = judged.verdict_baseline is Verdict.INPUT_CHANGED or bool(known and row.identity not in ("", known))
        weights = [] if other else [line for line in lines if line not in texts]
        first = self._first(row.case, weights)
        held = judge.hold(judged, texts)
        return exact.hold(held, weights, baselines.whence(document, row.case), first)

    def _first(self, case: Case, lines: Sequence[str]) -> Case:
        """The case that fails for changed exact facts: of a census, which every case of a group meets, the first one
        of the whole plan, or the first one here where that is known to have no figure; of bytes, the first here that
        met any.
        """
        if any(line.startswith("census ") for line in lines):
            group = [one for one in self.whole if one.group == case.group and one.family != "invariant"]
            own = set(self.meant)
            first = (one for place, one in enumerate(group) if place == 0 or one in own)
            return next((one for one in first if one not in self._gone), case)
        return self._failing.setdefault(case.group, case) if lines else case

    def environment(self, row: Row) -> Environment:
        """The environment a row was measured in."""
        return Environment.from_dict(self.world(row))

    def world(self, row: Row) -> Mapping[str, Any]:
        """The same as JSON: of this process's measurements, or of the report that is being resumed."""
        here = self.runner.environments.get(row.environment)
        return here or self.directory.known_environments().get(row.environment, {})

    def identities(self, name: str) -> Mapping[str, str] | None:
        """The facts behind a digest that a row or a record names; None where nobody has them."""
        here = self.runner.identities.get(name) or self.directory.known_identities().get(name)
        return here or self.baselines.identity(name)

    def facts(self, row: Row) -> dict[str, Any]:
        """The exact facts a row brings, to be held with pytest-regressions."""
        return {} if row.case.family == "invariant" else exact_facts(row, member_of(row.case))

    def close(self) -> None:
        """End the group's process, and leave the report directory to the next session."""
        self.runner.close()
        self.directory.release()


def check_engine(engine: str, workers: int) -> None:
    """HarnessError where the engine is not installed, or xdist's workers are asked for beside it."""
    if engine != "ray":
        return
    if workers:
        raise HarnessError("-n starts workers of pytest-xdist and --engine ray has Ray's: leave one of them out")
    from harness.run.ray import ray_runner  # local: only where Ray is asked for

    ray_runner.require()


def has_cuda(device: str, address: str | None) -> bool:
    """Whether cases can run on a CUDA device: here, or on a node of the Ray cluster at an address.

    Nobody is asked where `device` wants none.
    """
    if device == "cpu":
        return False
    here = bool(gpus.cuda_devices())
    if here or not address:
        return here
    from harness.run.ray import ray_runner  # local: likewise

    return any(node.gpus for node in ray_runner.living(ray_runner.connect(address, plan.threads())))
