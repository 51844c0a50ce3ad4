"""The whole of an upgrade: sides read, measured in turn, compared, and one report over all of it. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import report
from harness.files import replace_text
from harness.options import Options
from harness.upgrade import driver, sides

STATUS_SEVERITY = (1, 3, 0)  # harm, undecided, fine


@dataclass(frozen=True)
class Done:
    """The report's text, where it lies, and the exit status."""

    text: str
    path: Path
    status: int


def pairs(count: int) -> list[tuple[int, int]]:
    """Which sides are compared: every step, and with more than one step the whole way."""
    steps = list(itertools.pairwise(range(count)))
    return steps + ([(0, count - 1)] if count > 2 else [])


def run(texts: Sequence[str], options: Options, command: str, say: Callable[[str], None]) -> Done:
    """Measure the sides and compare them; the report lies in `options.report_dir`/upgrade.md."""
    parsed = sides.parse_all(texts)
    cases = driver.plan(options)
    live = driver.measure(parsed, options, cases, command, say)
    compared = [
        (live[a], live[b], report.compare_paths(live[a].folder, live[b].folder, options.baselines))
        for a, b in pairs(len(live))
    ]
    status = min((one.status for _, _, one in compared), key=STATUS_SEVERITY.index)
    text = "\n".join(report.render_comparison(c, name_a=a.side.label, name_b=b.side.label) for a, b, c in compared)
    path = options.report_dir / "upgrade.md"
    replace_text(path, text)
    return Done(text, path, status)
