"""The end of a session that measures: its last lines, and what a signal does.

SIGTERM and SIGHUP end it as Ctrl-C does, with a report. Other people's handlers stay, and a signal that is ignored
(nohup) stays ignored. While the end of a session writes, signals wait: the report is a matter of seconds, and half of
one is worth nothing.
"""

from __future__ import annotations

import math
import shlex
import shutil
import signal
import threading
from collections.abc import Generator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import pytest
from pluggy import HookimplMarker
from tabulate import tabulate

from harness.core.records import Row, Verdict
from harness.core.text import NOTHING, mib, plural, visible
from harness.judge.two_reports import INVARIANT
from harness.report import account, tables
from harness.report.account import decide
from harness.results.directory import PAGE

if TYPE_CHECKING:
    from harness.plugin.collector import Collector

hookimpl = HookimplMarker("pytest")
ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Ending:
    """Registered in the controller (or the only process) when its session is about to measure."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.ended = 0  # by this signal
        if threading.current_thread() is threading.main_thread():  # elsewhere Python takes no handlers
            self.taken = [number for number in ENDING if signal.getsignal(number) is signal.SIG_DFL]
        for number in self.taken:
            signal.signal(number, self.end)

    def end(self, number: int, frame: FrameType | None) -> None:
        """End the session as Ctrl-C does: pytest's own exit is an Exception, which other people's code catches."""
        self.ended = number
        raise KeyboardInterrupt(f"ended by {signal.Signals(number).name}")

    @hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, None, None]:
        """Note what comes while everything is written; a second Ctrl-C is obeyed at once."""
        came: list[int] = []

        def note(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and number in came:
                raise KeyboardInterrupt
            came.append(number)

        held = [*self.taken, signal.SIGINT] if threading.current_thread() is threading.main_thread() else []
        before: dict[int, Any] = {number: signal.signal(number, note) for number in held}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.pytest_unconfigure()  # what comes from here on finds everything written
        if self.ended:
            session.exitstatus = 128 + self.ended  # as a shell says it
        elif came:
            interrupted = int(pytest.ExitCode.INTERRUPTED)
            session.exitstatus = interrupted if came[0] == signal.SIGINT else 128 + came[0]

    @hookimpl
    def pytest_unconfigure(self) -> None:
        """Give the signals back, those that are still ours."""
        for number in self.taken:
            if signal.getsignal(number) == self.end:
                signal.signal(number, signal.SIG_DFL)


FOLDED = 20  # lines of the table; what is beyond stands in the report
KINDS = (account.QUALITY, account.MEMORY, account.SPEED)
HEAD = ("model", "text", "method", "ratio [95%]", "MiB", "prefill x", "decode x", "verdict", *KINDS)
NAMES, NUMBERS, WORST = range(2), range(3, 7), 7  # places of columns: only where they differ; figures; instead of KINDS
ANY = (1000, 24)  # columns and lines where there is no terminal
FEW = 3  # methods, of which one may be beaten by another


def closing(collector: Collector, config: pytest.Config) -> list[str]:
    """The session in a few lines: a small table, what was recorded, where the report lies, and what to do next."""
    options, rows = collector.state.options, [row for row in collector.rows.values() if row.case.family != INVARIANT]
    lines = table(account.sections(rows)) if any(row.value is not None for row in rows) else []
    if collector.recorded:
        count, files = collector.recorded
        figures = f"{plural(count, 'figure')} into {plural(len(files), 'file')}, and " if count else ""
        lines.append(f"recorded: {figures}exact facts, in {options.baselines}")
    if collector.report_path is None:
        waits = collector.state.session.directory.waits
        return [*lines, *([f"nothing was measured: {options.report_dir} stays as it was"] if waits else [])]
    lines.append(f"report: {collector.report_path}")  # the path alone: scripts read this line
    lines.append(f"browser: {collector.report_path.with_name(PAGE)}")
    step = following(collector, config)
    return [*lines, *([f"next: {step}"] if step else [])]


def table(sections: Sequence[account.Section]) -> list[str]:
    """A line a model, text and method: quality, bytes and speed against the reference, and a verdict of each.

    Where three words a line are wider than the terminal there is one, the most severe.
    """
    lines: list[tuple[int, list[str]]] = []
    for section in sections:
        for text in section.texts or (account.NO_TEXT,):
            for method in section.methods:
                if own := section.rows(method, (text, account.NO_TEXT)):
                    worst = min(row.verdict.severity for row in own)
                    lines.append((worst, list(map(visible, line(section, method, text)))))
    shown = sorted(sorted(range(len(lines)), key=lambda place: lines[place][0])[:FOLDED])
    cells = [lines[place][1] for place in shown]
    told = [place for place in range(len(HEAD)) if any(line[place] != NOTHING for line in cells)]
    told = [place for place in told if place not in NAMES or len({line[place] for _, line in lines}) > 1]
    drawn = aligned(cells, [place for place in told if place != WORST])
    if max(map(len, drawn)) > shutil.get_terminal_size(ANY).columns:
        drawn = aligned(cells, [place for place in told if place <= WORST])
    more = len(lines) - len(shown)
    return ["", *drawn, *([f"… and {plural(more, 'line')} more, in the report"] if more else []), ""]


def aligned(cells: Sequence[Sequence[str]], told: Sequence[int]) -> list[str]:
    """Some columns, numbers to the right."""
    return tabulate(
        [[line[place] for place in told] for line in cells],
        [HEAD[place] for place in told],
        tablefmt="simple",
        colalign=["right" if place in NUMBERS else "left" for place in told],
        disable_numparse=True,
    ).splitlines()


def line(section: account.Section, method: str, text: account.Text) -> list[str]:
    """Every column of a method on a text."""
    kinds: dict[str, list[Row]] = {}
    for row in section.rows(method, (text, account.NO_TEXT)):
        kinds.setdefault(account.kind(row.case), []).append(row)
    found = {kind: decided.verdict for kind, own in kinds.items() if (decided := decide(own))}
    worst = min(found.values(), key=lambda verdict: verdict.severity)
    of = [kind for kind, verdict in found.items() if verdict is worst]
    kept = section.row(method, "memory.storage") or section.row(method, "memory.footprint")
    return [
        section.model,
        " ".join(text),
        f"{method} (reference)" if method == section.reference else method,
        tables.quality(section, method, text).removesuffix(f" {tables.NO_INTERVAL}"),
        tables.shown(kept, mib),
        speed(section, method, "prefill"),
        speed(section, method, "decode"),
        str(worst) if len(of) == len(found) else f"{worst} ({', '.join(of)})",
        *(str(found.get(kind, NOTHING)) for kind in KINDS),
    ]


def speed(section: account.Section, method: str, what: str) -> str:
    """A method's time over that of the reference beside it."""
    row = section.row(method, section.timed.get(f"latency.{what}", ""))
    if row is None or row.value is None or method == section.reference:
        return tables.shown(row, lambda value: "1")
    found = tables.time_ratio(row)
    return NOTHING if found is None else f"{math.exp(found.value):.2f}"


def following(collector: Collector, config: pytest.Config) -> str:
    """What to do next, and its command; '' where nothing suggests itself."""
    options, rows, command = collector.state.options, list(collector.rows.values()), "python -m harness"
    report, given = shlex.quote(str(options.report_dir)), list(map(str, config.invocation_params.args))
    again = shlex.join(["pytest", *(word for word in given if word != "--resume")])
    if options.shard:
        return f"when every shard is there: {command} merge DIR... -o whole"
    if any(row.missing for row in rows):
        return "" if options.allow_missing else f"to measure what is missing: {again} --resume"
    if options.regenerate:
        folder = shlex.quote(str(options.baselines))
        return f"to see what was recorded: git add -N {folder} && git diff {folder}"
    if any(map(account.failing, rows)):
        return f"to see what would be recorded if these changes are meant: {command} rebaseline {report}"
    if any(row.verdict_baseline is Verdict.UNRECORDED for row in rows):
        return f"to record these figures and hold later ones against them: {again} --regen-all"
    if len({row.method for row in rows if row.case.family == "perplexity"}) < FEW:
        return ""
    return f"to see what is beaten by what: {command} frontier {report}"
