"""How many files of the package a case crosses, from the option as a user writes it to the line of the report.

    python -m studies.house [--way measure|pytest] [--all]

A case *crosses* a file where a function of it is entered with the case as an argument, in whatever shape it travels:
the options until they are planned, then the case, the subject of its metric, its figure, its row, the question of its
verdict, or a collection of them. Files that only help with a part (a tokenizer, a matrix product, a table's cell) are
*entered* and not crossed: `--all` lists them too. Counted is what runs between the call and the rendered report, in the
order of first entry, and not what is imported: module and class bodies are left out with whatever they call (the
catalogue lists every method that way), and so is code without source (what dataclasses write). `core` is counted apart:
it holds the nouns that everybody knows.

A profile ends where a process does, so the group's process and the controller are one process here: a runner that
starts no child stands in for the one that does, and `run/local.py` counts as far as it decides, not as it forks.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import harness

HOME = str(Path(harness.__file__).parent) + os.sep
LIMIT = 20  # files that a reader should have to open: 14 as far as the verdict, the others are the two reports
TEXT = {"datasets": "synthetic", "protocols": "chunk:256", "max_tokens": "1024", "device": "cpu"}
CASES: Mapping[str, Mapping[str, Any]] = {  # each beside its reference, in one model under one method
    "perplexity": {"metrics": "perplexity.delta", **TEXT},
    "memory": {"metrics": "memory.storage", "device": "cpu"},
    "latency": {"metrics": "latency.decode", "repetitions": "3", "device": "cpu"},
}
MODEL, METHOD = "tiny-gpt2", "nf4"
QUIET = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # the package is imported before pytest is


@dataclass
class Crossed:
    """What was entered of one file: functions by name, and how often."""

    functions: dict[str, int] = field(default_factory=dict)
    handed: bool = False  # the case itself, in one of its shapes, as an argument


class Profile:
    """Notes every function of the package that is entered, but for those that imports call."""

    def __init__(self) -> None:
        self.files: dict[str, Crossed] = {}  # relative names, in the order of first entry
        self.planned = False  # whether there is a case yet; until then it lies in the options

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """As `sys.setprofile` wants it."""
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(HOME) or not code.co_flags & inspect.CO_OPTIMIZED:
            return
        name = code.co_filename[len(HOME) :]
        known = self.files.get(name)
        if known is None and importing(frame):
            return
        crossed = self.files.setdefault(name, Crossed())
        crossed.functions[code.co_qualname] = crossed.functions.get(code.co_qualname, 0) + 1
        if not crossed.handed:
            arguments = [
                frame.f_locals.get(one) for one in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            ]
            self.planned = self.planned or any(map(travels, arguments))
            crossed.handed = any(map(travels if self.planned else is_asked, arguments))


def is_asked(value: Any) -> bool:
    """Whether a value is the case before it is planned: the options."""
    return isinstance(value, harness.Options)


def travels(value: Any) -> bool:
    """Whether a value is the case on its way, or a collection of such, or holds it as its `case` or `row`."""
    if isinstance(value, list | tuple | dict) and value and not isinstance(value, harness.Case):
        value = next(iter(value.values() if isinstance(value, dict) else value))
    held = getattr(value, "__dict__", {})
    kinds = harness.Case | harness.Figure | harness.Row
    return any(isinstance(one, kinds) for one in (value, held.get("case"), held.get("row")))


def importing(frame: FrameType | None) -> bool:
    """Whether a module's body is being run further out, for its import."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(HOME):
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def profiled() -> Iterator[Profile]:
    """Profile this thread and those that it starts."""
    profile = Profile()
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield profile
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


@contextlib.contextmanager
def in_this_process() -> Iterator[None]:
    """Let sessions measure without a child process."""
    from harness.core.records import Case
    from harness.results.directory import IDENTITIES
    from harness.run import group, session
    from harness.run.local import Process, Runner
    from harness.run.messages import UNFIT, Job, Reply

    class Silent:
        """A pipe to nobody."""

        def send(self, reply: Reply) -> None:
            """Nobody listens."""

    class Answering(Process):
        """A group that answers without a pipe; an error ends the study."""

        def __init__(self, group: group.Group | group.LayerGroup) -> None:
            self.group, self.predicted, self.ended = group, {}, False

        def ask(self, verb: str, argument: Any, say: Callable[[str], None] = print) -> Reply:
            return group.answered(self.group, verb, argument)

        def close(self) -> None:
            """Nothing to end."""

    class Here(Runner):
        """Measures where it is."""

        def job(self, case: Case) -> Job:
            asked = (case.model, case.method, case.device, case.reference)
            return Job(self.options, *asked, self.threads, self._logs / "unused")

        def prepare(self, cases: Sequence[Case], say: Callable[[str], None]) -> Mapping[str, str]:
            told = group.prepare(self.job(cases[0]), list(cases), Silent())  # type: ignore[arg-type]
            self.identities = told.pop(IDENTITIES)
            self.unfit = dict(told.pop(UNFIT))
            return told

        def _process_for(self, case: Case) -> Process:
            if self._process is None or self._group[0] != case.group:
                self._process = Answering(group.begun(self.job(case), Silent()))  # type: ignore[arg-type]
                self._group = (case.group, "")
            return self._process

    before, vars(session)["Runner"] = Runner, Here
    try:
        yield
    finally:
        vars(session)["Runner"] = before


def measured(options: Mapping[str, Any]) -> Profile:
    """Through `harness.measure` and `harness.render`."""
    with in_this_process(), profiled() as profile:
        rows = harness.measure(MODEL, methods=METHOD, **options)
        text = harness.render(rows)
    assert all(row.value is not None for row in rows), [row.reason for row in rows]
    assert f"`{METHOD}`" in text
    return profile


def tested(options: Mapping[str, Any]) -> Profile:
    """Through pytest, in this process; report and plots are written at its end."""
    import pytest

    flags = [f"--harness-{name.replace('_', '-')}={value}" for name, value in options.items()]
    with tempfile.TemporaryDirectory() as folder, in_this_process(), profiled() as profile:
        base = ["--pyargs", "harness.cases.test_measured", "-q", "-p", "no:cacheprovider", "--rootdir", folder, *QUIET]
        chosen = [f"--harness-models={MODEL}", f"--harness-methods={METHOD}", f"--harness-report-dir={folder}/report"]
        status = pytest.main([*base, *chosen, *flags])
    assert status == 0, f"pytest ended with {status}"
    return profile


WAYS: Mapping[str, Callable[[Mapping[str, Any]], Profile]] = {"measure": measured, "pytest": tested}


def is_core(name: str) -> bool:
    """Whether a file holds nouns and plain tools."""
    return name.startswith(f"core{os.sep}")


def table(profile: Profile, *, every: bool) -> str:
    """One line a file that is crossed (or entered at all), in the order of first entry, and the counts."""
    crossed = [name for name, one in profile.files.items() if one.handed]
    lines = [
        f"{crossed.index(name) + 1 if one.handed else '':>3} {name:40} {len(one.functions):3} functions, "
        f"{sum(one.functions.values()):6,} calls"
        for name, one in profile.files.items()
        if every or one.handed
    ]
    nouns = sum(map(is_core, crossed))
    counts = f"{len(crossed)} files are crossed: {len(crossed) - nouns} and {nouns} of core (wanted: at most {LIMIT})"
    helping = sum(map(is_core, profile.files.keys() - set(crossed)))
    rest = len(profile.files) - len(crossed)
    return "\n".join([*lines, f"{counts}; {rest} more are entered, {helping} of them of core"])


def main() -> None:
    """Count, and print what was found."""
    parser = argparse.ArgumentParser(description="files of the package that a case crosses")
    parser.add_argument("--way", choices=WAYS, default="measure", help="who measures")
    parser.add_argument("--all", action="store_true", help="list the files too that are entered without the case")
    arguments = parser.parse_args()
    found = {name: WAYS[arguments.way](options) for name, options in CASES.items()}
    for name, profile in found.items():
        print(f"{MODEL} x {METHOD} x {name}, by {arguments.way}\n{table(profile, every=arguments.all)}\n")


if __name__ == "__main__":
    main()
