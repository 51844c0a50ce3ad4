"""The whole of an upgrade: sides read, the same cases measured on each in turn, and one report over all. No torch.

Cases go one after another; within one, the sides alternate in who is first. A timed case keeps every side's process
alive at once and interleaves them. A side that cannot be built, loaded or asked gives rows that say why.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness import report
from harness.core.catalog import member_of
from harness.core.environment import Environment, first_card
from harness.core.errors import BadFile, HarnessError
from harness.core.files import append_line, locked, replace_text, timing_lock
from harness.core.options import Options
from harness.core.records import Case, Figure, Row
from harness.report.rows import compare
from harness.results.directory import SIDE, TROUBLE, ReportDirectory
from harness.run import engines
from harness.run import plan as planning
from harness.run.local import missing
from harness.run.messages import Repetition
from harness.run.upgrade.interleaved import interleave
from harness.run.upgrade.process import Remote, SideFailed, SideGone
from harness.run.upgrade.sides import Built, Side, build, parse_all

Say = Callable[[str], None]


@dataclass
class Running:
    """One side of a running upgrade."""

    side: Side
    folder: Path
    command: str
    built: Built | None = None
    remote: Remote | None = None
    trouble: str = ""  # why it cannot be asked, in one line
    rows: dict[Case, Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.directory = ReportDirectory(self.folder)

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
        self.directory.append(row, world)

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
            append_line(self.directory.path(TROUBLE), f"{case.id}\n{trouble}")
        return self.put(row, world)

    def finish(self, figure: Figure | str, case: Case) -> None:
        """Keep what came of an interleaved timing."""
        if isinstance(figure, str):
            return self.fail(case, figure)
        try:
            row, _, world = self.ask("repetition", Repetition(case, figure=figure))
        except SideFailed as error:
            return self.fail(case, str(error))
        return self.put(row, world)


def plan(options: Options) -> tuple[Case, ...]:
    """Every case of each side, in the order of measuring."""
    if options.device == "cuda":
        first_card()  # or one line, and not a row without a number a case
    return planning.whole(options, engines.cuda(options))


def measure(sides: Sequence[Side], options: Options, cases: Sequence[Case], command: str, say: Say) -> list[Running]:
    """Measure the cases on every side; each leaves its report in a folder of its own under `options.report_dir`.

    Raises:
        HarnessError: no side at all could be built and started, with the reasons.
    """
    live = [Running(side, options.report_dir / side.slug, command) for side in sides]
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


def _start(one: Running, options: Options, cases: Sequence[Case], say: Say) -> None:
    """Build, start and prepare a side; what fails is its trouble."""
    one.directory.open(keep=False)
    one.directory.keep_plan(cases)
    try:
        one.built = build(one.side, say)
        own = replace(options, report_dir=one.folder, engine="local")  # its processes alternate with the others'
        one.remote = Remote(one.built.python, own, engines.threads(), one.folder / "side.log")
        one.ask("prepare", cases, say)
    except HarnessError as error:
        one.end(str(error))
        say(f"{one.side.label}: {error}")


def _timed(live: Iterable[Running], case: Case, blocks: int) -> None:
    asked = {one.side.label: one for one in live if one.remote is not None}
    with locked(timing_lock()):  # machine-wide, as for a session's timed cases
        asks = {label: lambda asked, one=one: one.ask("repetition", asked) for label, one in asked.items()}
        figures = interleave(asks, case, blocks)
    for one in live:
        one.finish(figures.get(one.side.label, one.trouble), case)


def _write(one: Running, cases: Sequence[Case]) -> None:
    """The side's own report, every planned case in it."""
    for case in cases:
        if case not in one.rows:
            one.fail(case, one.trouble or "not reached: the upgrade stopped before it")
    rows = [one.rows[case] for case in cases]
    one.directory.keep(rows)
    facts = {"label": one.side.label, "trouble": one.trouble, "packages": dict(one.built.packages) if one.built else {}}
    one.directory.put({SIDE: json.dumps(facts, indent=1) + "\n"})
    notes = [f"This is the side {one.side.label} of an upgrade; its times are paired with the other sides'."]
    report.write(one.folder, rows, cases, one.directory.environments, notes=notes, command=one.command)


def run(texts: Sequence[str], options: Options, command: str, say: Say) -> tuple[str, int]:
    """Measure the sides and compare them.

    Returns:
        The report, which lies in `options.report_dir`/upgrade.md too, and the exit status.
    """
    live = measure(parse_all(texts), options, plan(options), command, say)
    text, status = report_on([one.folder for one in live], options.baselines, command)
    path = options.report_dir / "upgrade.md"
    replace_text(path, text)
    say(f"report: {os.path.relpath(path)}")
    return text, status


def pairs(count: int) -> list[tuple[int, int]]:
    """Which sides are compared: every step, and with more than one step the whole way, last."""
    steps = list(itertools.pairwise(range(count)))
    return steps + ([(0, count - 1)] if count > 2 else [])


def report_on(folders: Sequence[Path], baselines: Path, command: str) -> tuple[str, int]:
    """The report over the sides' directories, in order, and its exit status; nothing is measured."""
    facts = [read_side(folder) for folder in folders]
    steps = [report.Step(a, b, compare(folders[a], folders[b], baselines=baselines)) for a, b in pairs(len(folders))]
    return report.render_upgrade(facts, steps, where=place(folders), command=command), report.worst(steps)


def read_side(folder: Path) -> report.SideFacts:
    """One side's report directory; BadFile where it is none."""
    try:
        facts = json.loads((folder / SIDE).read_text(encoding="utf-8"))
        label, packages, trouble = str(facts["label"]), dict(facts["packages"]), str(facts["trouble"])
    except (OSError, ValueError, KeyError) as error:
        raise BadFile(f"{folder} is no side of an upgrade ({error}): measure it again") from error
    rows = {row.case: row for row in report.read_report(folder).rows}
    return report.SideFacts(label, packages, trouble, rows)


def place(folders: Sequence[Path]) -> str:
    """The machine that measured, in words."""
    for folder in folders:
        for world in report.read_report(folder).environments.values():
            here = Environment.from_dict(world)
            name = here.gpu or here.cpu
            return f"{name} ({here.device_class}), {here.threads} threads, Python {here.python}"
    return "a machine that measured nothing"
