"""The whole of an upgrade: sides read, measured in turn, compared, and one report over all of it. No torch."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import report
from harness.core.environment import Environment
from harness.core.errors import BadFile
from harness.core.files import replace_text
from harness.core.options import Options
from harness.run.upgrade import sides
from harness.run.upgrade import steps as driver

Say = Callable[[str], None]


@dataclass(frozen=True)
class Done:
    """The report's text, where it lies, and the exit status."""

    text: str
    path: Path
    status: int


def run(texts: Sequence[str], options: Options, command: str, say: Say) -> Done:
    """Measure the sides and compare them; the report lies in `options.report_dir`/upgrade.md."""
    parsed = sides.parse_all(texts)
    cases = driver.plan(options)
    live = driver.measure(parsed, options, cases, command, say)
    text, status = report_on([one.folder for one in live], options.baselines, command)
    path = options.report_dir / "upgrade.md"
    replace_text(path, text)
    say(f"report: {os.path.relpath(path)}")
    return Done(text, path, status)


def pairs(count: int) -> list[tuple[int, int]]:
    """Which sides are compared: every step, and with more than one step the whole way, last."""
    steps = list(itertools.pairwise(range(count)))
    return steps + ([(0, count - 1)] if count > 2 else [])


def report_on(folders: Sequence[Path], baselines: Path, command: str) -> tuple[str, int]:
    """The report over the sides' directories, in order, and its exit status; nothing is measured."""
    facts = [read_side(folder) for folder in folders]
    steps = [report.Step(a, b, report.compare_paths(folders[a], folders[b], baselines)) for a, b in pairs(len(folders))]
    return report.render_upgrade(facts, steps, where=place(folders), command=command), report.worst(steps)


def read_side(folder: Path) -> report.SideFacts:
    """One side's report directory; BadFile where it is none."""
    try:
        told = json.loads((folder / "side.json").read_text(encoding="utf-8"))
        label, packages, trouble = str(told["label"]), dict(told["packages"]), str(told["trouble"])
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
