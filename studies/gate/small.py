"""Sessions of the small matrix in this process: the harness's own session, metrics, judge and baselines.

What a pytest session adds (child processes, xdist, pytest's face) is left out, so that a fault is a patch of a few
lines and a session takes seconds. Recording goes through `python -m harness rebaseline --write`'s own code.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from harness import judge
from harness.core.errors import HarnessError
from harness.core.files import replace_text
from harness.core.options import Declared, Options
from harness.core.records import Case, Row, Verdict
from harness.core.specification import parse
from harness.judge import rules
from harness.methods.quantizing import arguments, bnb
from harness.results.directory import ReportDirectory
from harness.run import plan as planning
from harness.run import rebaseline
from harness.run.group import Group
from harness.run.local import missing
from harness.run.messages import Job, Stop
from harness.run.session import Session

MODELS = ("tiny-gpt2", "tiny-olmo")
MOVED = (
    Verdict.MISSING,
    Verdict.INPUT_CHANGED,
    Verdict.OUT_OF_BOUND,
    Verdict.WORSE,
    Verdict.UNUSABLE,
    Verdict.NOT_COMPARABLE,
    Verdict.BETTER,
)
Order = Callable[[Sequence[Case]], Sequence[Case]]


class Inline:
    """A runner without processes: one group at a time, in this one, or every group with its model kept loaded."""

    def __init__(self, options: Options, kept: dict[str, Group] | None = None) -> None:
        self.options, self.threads, self.kept = options, torch.get_num_threads(), kept
        self.environments: dict[str, dict[str, Any]] = {}
        self.groups: dict[str, Group] = {}

    def group(self, case: Case) -> Group:
        """The case's group: anew, or with the model that an earlier session of this bench loaded."""
        job = Job(self.options, case.model, case.method, case.device, case.reference, self.threads, Path())
        before = (self.kept or {}).get(case.group)
        if before is None:
            made = Group(job, SimpleNamespace(send=lambda reply: None))  # type: ignore[arg-type]
        else:
            made = copy.copy(before)  # the models are shared, nothing that was measured is
            made.job, made._nll = job, {}
            made.batch_size = self.options.batch_size if made.method.batch_invariant else 1
            made.method_id = arguments.method_id(made.method, made.arguments, made.batch_size)
            made.environment = dataclasses.replace(made.environment, threads=self.threads)
            vars(made).pop("world", None)
        if self.kept is not None:
            self.kept[case.group] = made
        return made

    def measure(self, case: Case, resumable: Mapping[str, Row], stop: Stop | None = None) -> tuple[Row, str]:
        """One row, or why there is none, as the real runner words it."""
        try:
            if case.group not in self.groups:
                self.groups = {**(self.groups if self.kept is not None else {}), case.group: self.group(case)}
            group = self.groups[case.group]
            row = group.measure(case, stop)
        except HarnessError as error:
            return missing(case, str(error)), ""
        self.environments[row.environment] = group.environment.to_dict()
        return row, ""

    def close(self) -> None:
        """Nothing to end."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A judged session."""

    rows: tuple[Row, ...]
    tests: int  # 0 where pytest's own session counted them

    @property
    def alarms(self) -> list[Row]:
        """Rows that fail the session as CI runs it."""
        return [row for row in self.rows if judge.fails(row, require_baselines=True, allow_missing=False)]

    @property
    def moved(self) -> list[Row]:
        """Rows whose verdict is not that all is as it was."""
        return [row for row in self.rows if row.verdict in MOVED]


@dataclasses.dataclass(frozen=True)
class Bench:
    """A folder with one recorded session, and sessions held against it."""

    folder: Path
    options: Options

    def session(self, order: Order = list, kept: dict[str, Group] | None = None, **changes: Any) -> Outcome:
        """Measure and judge every planned case."""
        options = dataclasses.replace(self.options, **changes)
        cases = planning.plan(options, False)
        directory = ReportDirectory(options.report_dir)
        directory.open(keep=False)
        live = Session(options, torch.get_num_threads(), cases)
        live.runner = Inline(options, kept)  # type: ignore[assignment]
        with bnb.quiet():
            found = {case: live.check(case)[0] for case in order(cases)}
        rows = rules.settle([found[case] for case in cases], live.tests)
        directory.keep(rows, live.runner.environments)
        directory.keep_plan(cases)
        return Outcome(tuple(rows), live.tests)

    def workers(self, count: int) -> Outcome:
        """The same session by pytest itself, shared among `count` pytest-xdist workers; its groups run in children.

        Raises:
            RuntimeError: pytest ended otherwise than by passing or by failed cases, with the end of what it said.
        """
        told, report = self.options, self.folder / "workers report"
        declared = {"models": told.declared.models, "datasets": told.declared.datasets}
        lines = ["[tool.harness]"]
        for table, names in declared.items():
            lines += [f"[tool.harness.{table}]", *(f"{json.dumps(key)} = {json.dumps(names[key])}" for key in names)]
        replace_text(self.folder / "pyproject.toml", "\n".join(lines) + "\n")
        chosen = {
            "models": map(str, told.models), "datasets": map(str, told.datasets), "metrics": told.metrics,
            "protocols": map(str, told.protocols), "max-tokens": [str(told.max_tokens)], "device": [told.device],
            "baselines": [str(told.baselines)], "report-dir": [str(report)],
        }  # fmt: skip
        words = [word for name, given in chosen.items() for word in (f"--{name}", ",".join(given))]
        command = [sys.executable, "-m", "pytest", "--pyargs", "harness.cases", "-q", "-n", str(count), *words]
        world = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(command, cwd=self.folder, env=world, capture_output=True, text=True, check=False)
        if done.returncode not in (0, 1):
            raise RuntimeError(f"pytest -n {count} ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
        rows = tuple(map(Row.from_json, (report / "measurements.jsonl").read_text(encoding="utf-8").splitlines()))
        if len(rows) != len(planning.plan(told, False)):
            raise RuntimeError(f"pytest -n {count} left {len(rows)} rows: {done.stdout[-2000:]}")
        return Outcome(rows, 0)

    def record(self, check: bool = True) -> Outcome:
        """Record one session as the baseline; the outcome is another judged against it, unless `check` is False."""
        first = self.session()
        proposal = rebaseline.propose(self.options.report_dir, self.options.baselines)
        rebaseline.write(proposal, self.options.baselines)
        return self.session() if check else first


def options(folder: Path, **changes: Any) -> Options:
    """The small matrix: what `changes` does not say is the tiny models, synthetic text, and every exact metric."""
    chosen: dict[str, Any] = {
        "models": MODELS,
        "methods": (),
        "metrics": ("perplexity", "memory", "divergence.kl", "divergence.same_top", "divergence.rms_dp"),
        "datasets": ("synthetic",),
        "protocols": ("chunk:256",),
        "max_tokens": 4096,
        **changes,
    }
    for name in ("models", "methods", "datasets", "protocols"):
        chosen[name] = tuple(parse(item) if isinstance(item, str) else item for item in chosen[name])
    declared = chosen.pop("declared", Declared(folder))
    return Options(
        declared, device="cpu", report_dir=folder / "report", baselines=folder / "baselines", repetitions=6, **chosen
    )


@contextlib.contextmanager
def bench(**changes: Any) -> Iterator[Bench]:
    """A bench in a scratch folder, nothing recorded yet."""
    with tempfile.TemporaryDirectory(prefix="harness-gate-") as name:
        yield Bench(Path(name), options(Path(name), **changes))


def share_of(count: int, runs: int) -> tuple[float, float]:
    """A share and the half-width of its own 95% interval (Wilson's, which is never zero)."""
    z = 1.959964
    part = count / runs
    spread = z / (1 + z * z / runs) * math.sqrt(part * (1 - part) / runs + z * z / (4 * runs * runs))
    return part, spread


def upper_limit(count: int, runs: int, confidence: float = 0.95) -> float:
    """The largest rate under which so few of so many runs would still be seen with a chance of 1 - confidence.

    Clopper and Pearson's upper limit, one-sided: P(at most `count` of `runs`) = 1 - confidence, by bisection.
    """
    if count >= runs:
        return 1.0
    low, high = count / runs, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        terms = [
            math.lgamma(runs + 1) - math.lgamma(seen + 1) - math.lgamma(runs - seen + 1)
            + seen * math.log(rate) + (runs - seen) * math.log1p(-rate)
            for seen in range(count + 1)
        ]  # fmt: skip
        low, high = (rate, high) if sum(map(math.exp, terms)) > 1 - confidence else (low, rate)
    return (low + high) / 2
