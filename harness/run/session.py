"""One session's work on cases, as a plain object: resume, measure, judge, record. No pytest, no torch."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from harness import judge
from harness.core.catalog import member_of
from harness.core.environment import Environment, capture
from harness.core.errors import BadFile, HarnessError
from harness.core.files import cache_dir, owned
from harness.core.records import Case, Row, Verdict
from harness.core.specification import parse
from harness.core.values import parse_json
from harness.inputs.models import names as models
from harness.inputs.texts import corpora
from harness.judge import baselines, bounds, error_rate, known_faults
from harness.judge.facts import changes, exact_facts
from harness.metrics.measuring import sequential
from harness.metrics.measuring.invariants.checks import LAYER
from harness.results import losses as nllfiles
from harness.results.reading import sound_rows
from harness.run import engines
from harness.run.messages import Asked, Stop

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from harness.core.options import Options


# what a session leaves in its report directory beside plots and losses
TABLES = (
    "measurements.jsonl",
    "environments.json",
    "plan.json",
    "session.json",
    "shard.json",
    "published.json",
    "report.md",
    "inputs.json",
)
OWNED = ".session.lock"  # in a report directory: held by the session that writes it
UNFINISHED = (*(f".{name}.*" for name in TABLES), ".*.svg.*", ".writable-*", "nll/.*.npz.*", "nll/.reference-*")


class Session:
    """Everything a process needs to answer `check(case)`."""

    def __init__(self, options: Options, threads: int, cases: Sequence[Case] = ()) -> None:
        self.options = options
        self.bounds = bounds.load(options.baselines)
        self.faults = known_faults.load(options.baselines)
        self.baselines = baselines.Baselines(options.baselines)
        self.tests = error_rate.tests(cases, self.bounds, stop_early=options.stop_early)
        # machine-wide: a latency measured in one session must not run beside another session's cases
        self.runner = engines.runner_of(options)(options, threads=threads, lock=cache_dir() / "timing.lock")

    @cached_property
    def resumable(self) -> dict[str, Row]:
        """Finished rows of the report directory by case id, with --resume."""
        return read_rows(self.options.report_dir / "measurements.jsonl") if self.options.resume else {}

    def prepare(self, cases: Sequence[Case], say: Callable[[str], None]) -> Mapping[str, str]:
        """Check assets here, without torch, then make checkpoints and token plans in a process of their own.

        Returns what identifies them, to be held to for the whole session.
        """
        declared = self.options.declared
        for model in dict.fromkeys(case.model for case in cases if case.model != LAYER):
            models.check(
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
        return here or known_environments(self.options.report_dir).get(row.environment, {})

    def nll(self, sha: str) -> NDArray[np.float32] | None:
        """Per-token NLL by its sha, from this report or from the baselines of any model."""
        for folder in (self.options.report_dir / "nll", *sorted(self.options.baselines.glob("*/nll"))):
            found = nllfiles.load(folder, sha)
            if found is not None:
                return found
        return None

    def facts(self, row: Row) -> dict[str, Any]:
        """The exact facts a row brings, to be held with pytest-regressions."""
        return {} if row.case.family == "invariant" else exact_facts(row, member_of(row.case))

    def close(self) -> None:
        """End the group's process."""
        self.runner.close()


def read_rows(path: Path, note: Callable[[str], None] = lambda line: None) -> dict[str, Row]:
    """Measured rows by case id that can be resumed, the last one winning.

    A damaged line, and a row whose losses or environment are gone or damaged, are left out: their cases are measured
    again. `note` gets a line on them.
    """
    rows, damaged = sound_rows(path) if path.is_file() else ((), 0)
    measured = {row.case.id: row for row in rows if row.value is not None}
    worlds = known_environments(path.parent)
    whole = functools.cache(functools.partial(nllfiles.holds, path.parent / "nll"))  # many rows share a loss
    found = {name: row for name, row in measured.items() if row.environment in worlds and losses_hold(row, whole)}
    if damaged or len(found) < len(measured):
        lost = len(measured) - len(found)
        note(f"harness: {damaged} damaged lines and {lost} rows without their losses or environment: measured again")
    return found


def losses_hold(row: Row, whole: Callable[[str], bool]) -> bool:
    """Whether the per-token losses that a row names are there and whole."""
    names = [name for name in (row.nll, row.detail.get("reference_nll")) if name]
    return all(isinstance(name, str) and whole(name) for name in names)


def open_report(folder: Path, *, keep: bool) -> None:
    """Make the report directory ready, emptied of an earlier session's measurements unless they are kept.

    Only what sessions leave is removed, never what lies behind a link.
    """
    losses = folder / "nll"
    try:
        for path in (losses, *(folder / name for name in TABLES)):
            if path.is_symlink():  # what is written and removed here stays here
                raise HarnessError(f"--report-dir {folder}: its {path.name} is a link to another place: remove it")
        losses.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
        for pattern in UNFINISHED:  # of a session that was killed
            for left in folder.glob(pattern):
                left.unlink(missing_ok=True)
        for old in () if keep else (*(folder / name for name in TABLES), *folder.glob("*.svg"), *losses.iterdir()):
            old.unlink(missing_ok=True)
    except OSError as error:
        raise HarnessError(f"--report-dir {folder} cannot be written: {error.strerror or error}") from error


def take(folder: Path) -> IO[str]:
    """The lock that one session holds on its report directory; HarnessError where another one has it."""
    with writing(folder, "--report-dir "):
        folder.mkdir(parents=True, exist_ok=True)
        owner = owned(folder / OWNED)
    if owner is None:
        raise HarnessError(f"another session writes --report-dir {folder}: wait for its end, or name another directory")
    return owner


def give_up(folder: Path, owner: IO[str] | None) -> None:
    """Leave a report directory that a session took and could not begin in; nothing half-made stays."""
    if owner is None:
        return
    with contextlib.suppress(OSError):
        if [path.name for path in folder.iterdir()] == [OWNED]:
            (folder / OWNED).unlink()
            folder.rmdir()
    owner.close()


@contextlib.contextmanager
def writing(folder: Path, option: str = "") -> Iterator[None]:
    """Turn what a disk says (full, read-only, gone) into one line, which names the option that chose the folder."""
    try:
        yield
    except OSError as error:
        raise HarnessError(
            f"{option}{folder} cannot be written ({error.strerror or error}): make room or name another"
        ) from error


def known_environments(folder: Path) -> dict[str, Mapping[str, Any]]:
    """environments.json of a report directory, each known by the digest that it still has; empty without one."""
    path = folder / "environments.json"
    try:
        data = parse_json(path.read_bytes())
        return {name: world for name, world in data.items() if Environment.from_dict(world).id == name}
    except (OSError, ValueError, AttributeError, TypeError, BadFile):
        return {}
