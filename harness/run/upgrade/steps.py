"""Runs the same cases on every side in turn and leaves one report directory a side. No torch.

Cases go one after another; within one, the sides alternate in who is first. A timed case keeps every side's process
alive at once and has them take turns. A side that cannot be built, loaded or asked gives rows that say why.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness import report
from harness.core.catalog import member_of
from harness.core.environment import first_card
from harness.core.errors import HarnessError
from harness.core.files import append_line, cache_dir, locked, replace_text
from harness.core.options import Options
from harness.core.records import Case, Figure, Row
from harness.results.reading import plan_text
from harness.run import engines
from harness.run import plan as planning
from harness.run.local import missing
from harness.run.messages import Turn
from harness.run.upgrade import environments
from harness.run.upgrade.environments import Built
from harness.run.upgrade.remote import Remote, SideFailed, SideGone
from harness.run.upgrade.sides import Side
from harness.run.upgrade.timed import take_turns

Say = Callable[[str], None]


@dataclass
class Live:
    """One side of a running upgrade."""

    side: Side
    folder: Path
    command: str
    built: Built | None = None
    remote: Remote | None = None
    trouble: str = ""  # why it cannot be asked, in one line
    rows: dict[Case, Row] = field(default_factory=dict)
    worlds: dict[str, dict[str, Any]] = field(default_factory=dict)

    def ask(self, verb: str, argument: Any, say: Say = lambda line: None) -> Any:
        """One request; a process that is gone takes the rest of the side's cases with it."""
        if self.remote is None:
            raise SideFailed(self.trouble)
        try:
            return self.remote.ask(verb, argument, say)
        except SideGone as error:
            self.end(str(error))
            raise

    def end(self, trouble: str = "") -> None:
        """Close the process."""
        self.trouble = trouble or self.trouble
        if self.remote is not None:
            self.remote.close()
            self.remote = None

    def put(self, row: Row, world: dict[str, Any]) -> None:
        """Keep a row, flushed."""
        self.rows[row.case] = row
        if row.environment and row.environment not in self.worlds:
            self.worlds[row.environment] = world
            text = json.dumps(self.worlds, indent=1, sort_keys=True)
            replace_text(self.folder / "environments.json", text + "\n")
        append_line(self.folder / "measurements.jsonl", row.to_json())

    def fail(self, case: Case, reason: str) -> None:
        """A row without a number."""
        self.put(missing(case, reason), {})

    def check(self, case: Case) -> None:
        """Measure one case."""
        try:
            row, trouble, world = self.ask("check", case)
        except SideFailed as error:
            return self.fail(case, str(error))
        except RuntimeError as error:  # a bug met in the side's process: kept whole beside the rows
            row, trouble, world = missing(case, str(error).strip().splitlines()[-1]), str(error), {}
        if trouble:
            append_line(self.folder / "trouble.log", f"{case.id}\n{trouble}")
        return self.put(row, world)

    def finish(self, figure: Figure | str, case: Case) -> None:
        """Keep what came of a timing in turns."""
        if isinstance(figure, str):
            return self.fail(case, figure)
        try:
            row, _, world = self.ask("turn", Turn(case, figure=figure))
        except SideFailed as error:
            return self.fail(case, str(error))
        return self.put(row, world)


def plan(options: Options) -> tuple[Case, ...]:
    """Every case of each side, in the order of measuring: the invariants first, which cost little, where named."""
    if options.device == "cuda":
        first_card()  # or one line, and not a row without a number a case
    visible = engines.cuda(options)
    rest = tuple(name for name in options.metrics if name != "invariant")
    behaviour = planning.invariant_plan(options, visible) if rest != options.metrics else ()
    return (*behaviour, *(planning.plan(replace(options, metrics=rest), visible) if rest or not behaviour else ()))


def measure(sides: Sequence[Side], options: Options, cases: Sequence[Case], command: str, say: Say) -> list[Live]:
    """Measure the cases on every side; each leaves its report in a folder of its own under `options.report_dir`.

    Raises:
        HarnessError: no side at all could be built and started, with the reasons.
    """
    live = [Live(side, options.report_dir / side.slug, command) for side in sides]
    try:
        for one in live:
            _start(one, options, cases, say)
        if not any(one.remote for one in live):
            raise HarnessError("no side can be measured: " + "; ".join(one.trouble for one in live))
        for number, case in enumerate(cases):
            say(f"[{number + 1}/{len(cases)}] {case.id}")
            ordered = live if number % 2 == 0 else live[::-1]
            if member_of(case).timed:
                _timed(ordered, case, options.repetitions)
            else:
                for one in ordered:
                    one.check(case)
    finally:
        for one in live:
            one.end()
            _write(one, cases)
    return live


def _start(one: Live, options: Options, cases: Sequence[Case], say: Say) -> None:
    """Build, start and prepare a side; what fails is its trouble."""
    _empty(one.folder)
    replace_text(one.folder / "plan.json", plan_text(cases))
    try:
        one.built = environments.build(one.side, say)
        own = replace(options, report_dir=one.folder, engine="local")  # its processes take turns
        threads = len(os.sched_getaffinity(0))
        one.remote = Remote(one.built.python, own, threads, one.folder / "side.log")
        one.ask("prepare", cases, say)
    except HarnessError as error:
        one.end(str(error))
        say(f"{one.side.label}: {error}")


def _empty(folder: Path) -> None:
    """Ready for new rows: nothing of an earlier run is left to be taken for this one's."""
    try:
        shutil.rmtree(folder / "nll", ignore_errors=True)
        (folder / "nll").mkdir(parents=True)
        for name in ("measurements.jsonl", "environments.json", "side.json", "session.json", "trouble.log"):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise HarnessError(f"--report-dir {folder} cannot be written: {error.strerror or error}") from error


def _timed(live: Iterable[Live], case: Case, blocks: int) -> None:
    asked = {one.side.label: one for one in live if one.remote is not None}
    with locked(cache_dir() / "timing.lock"):  # machine-wide, as for a session's timed cases
        asks = {label: lambda turn, one=one: one.ask("turn", turn) for label, one in asked.items()}
        figures = take_turns(asks, case, blocks)
    for one in live:
        one.finish(figures.get(one.side.label, one.trouble), case)


def _write(one: Live, cases: Sequence[Case]) -> None:
    """The side's own report, every planned case in it."""
    for case in cases:
        if case not in one.rows:
            one.fail(case, one.trouble or "not reached: the upgrade stopped before it")
    rows = [one.rows[case] for case in cases]
    replace_text(one.folder / "measurements.jsonl", "".join(row.to_json() + "\n" for row in rows))
    facts = {"label": one.side.label, "trouble": one.trouble, "packages": dict(one.built.packages) if one.built else {}}
    replace_text(one.folder / "side.json", json.dumps(facts, indent=1) + "\n")
    notes = [f"This is the side {one.side.label} of an upgrade; its times are paired with the other sides'."]
    report.write(one.folder, rows, cases, one.worlds, notes=notes, command=one.command)
