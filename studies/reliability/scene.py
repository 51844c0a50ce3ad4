"""A scratch project with everything that a session reads and writes in one folder, and sessions in it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from harness.core.contracts import Checkpoint
from harness.core.records import Row
from harness.inputs.models.gguf_format import write
from harness.inputs.models.names import TINY_HOME

ROOT = Path(__file__).parents[2]
METHODS = "absmax-int8"  # and the reference
LIMIT_SECONDS = 400  # for one session of some ten seconds, on a machine that others use too: longer is a hang
SETTLE_SECONDS = 30  # for the processes of a killed session to end
# what the model and the text are: converted into the cache and generated, or the user's own files
VARIANTS = {"cached": ("path:model.gguf", "synthetic"), "own": ("path:model", "text:text.txt")}


@dataclass
class Session:
    """One pytest process and what came of it."""

    process: subprocess.Popen[bytes]
    log: Path
    started: float = field(default_factory=time.monotonic)
    hung: bool = False
    seconds: float = 0.0

    def wait(self) -> int:
        """Its exit status, once it has ended; a session over the limit is killed and has hung."""
        left = LIMIT_SECONDS  # counted second by second: while the whole campaign is paused, none passes
        while self.process.poll() is None and not self.hung:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
            left -= 1
            self.hung = left <= 0 and self.process.poll() is None
        if self.hung:
            end_group(self.process.pid)
        self.seconds = round(time.monotonic() - self.started, 1)
        return self.process.wait()

    @property
    def output(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace")

    def tree(self) -> list[psutil.Process]:
        """Every living process below it."""
        with contextlib.suppress(psutil.Error):
            return list(psutil.Process(self.process.pid).children(recursive=True))
        return []


def end_group(pid: int) -> None:
    """Kill every process of a session that we started as a group of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


class Scene:
    """The folder: `report`, `baselines`, `cache`, `tmp`, `model.gguf`, or `model` and `text.txt`."""

    def __init__(self, folder: Path, variant: str) -> None:
        self.folder, self.variant = folder, variant
        self.report, self.baselines, self.cache = folder / "report", folder / "baselines", folder / "cache"
        self.tmp, self.clock = folder / "tmp", folder / "clock"
        self.sessions: list[Session] = []

    def command(self, *more: str) -> list[str]:
        """A session of the scene's small matrix."""
        model, dataset = VARIANTS[self.variant]
        words = ["-p", "no:cacheprovider", "-q", "--models", model, "--methods", METHODS, "--datasets", dataset]
        words += ["--max-tokens", "1024", "--protocols", "chunk:256", "--metrics", "perplexity,memory"]
        return [sys.executable, "-m", "pytest", *words, "--report-dir", "report", "--device", "cpu", *more]

    def start(self, *more: str) -> Session:
        """Start a session as a process group of its own."""
        self.tmp.mkdir(exist_ok=True)
        paths = (str(Path(__file__).parent / "clock"), str(ROOT), os.environ.get("PYTHONPATH", ""))
        own = {"HARNESS_CACHE": str(self.cache), "TMPDIR": str(self.tmp), "FAULTS_CLOCK": str(self.clock)}
        own["RAY_TMPDIR"] = tempfile.gettempdir()  # its sockets' names would be too long below the scene
        environment = {**os.environ, **own, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        log = self.folder / f"session-{len(self.sessions)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                self.command(*more),
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        session = Session(process, log)
        self.sessions.append(session)
        return session

    def rows(self) -> dict[str, Row]:
        """Rows that can be read, by case id, the last one winning; unreadable lines are left out."""
        path, found = self.report / "measurements.jsonl", {}
        for line in path.read_bytes().split(b"\n") if path.is_file() else ():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = Row.from_json(line.decode())
                found[row.case.id] = row
        return found

    def close(self) -> None:
        """End what still runs."""
        for session in self.sessions:
            end_group(session.process.pid)
            session.process.wait()


def lay_out(folder: Path) -> None:
    """A fresh project."""
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text("[tool.harness]\n")
    (folder / "test_cases.py").write_text("from harness.cases.test_measured import test_measured\n")


@dataclass(frozen=True)
class Template:
    """An undisturbed session: its folder is copied for every trial, its rows are what a trial's must equal."""

    scene: Scene
    rows: dict[str, Row]
    seconds: float

    @contextlib.contextmanager
    def copy(self, folder: Path, *, with_cache: bool = True) -> Iterator[Scene]:
        """A scene of one's own, no report in it yet."""
        left_out = shutil.ignore_patterns("report", "*.log", "tmp", *([] if with_cache else ["cache"]))
        shutil.copytree(self.scene.folder, folder, ignore=left_out)
        scene = Scene(folder, self.scene.variant)
        try:
            yield scene
        finally:
            scene.close()
            shutil.rmtree(folder, ignore_errors=True)


def template(folder: Path, variant: str, before: Template | None = None) -> Template:
    """Run the undisturbed session, its figures recorded as the baselines; behind one `before` it is the 'own' variant.

    A folder that holds one already is taken as it is.
    """
    scene, told = Scene(folder, variant), folder / "seconds.txt"
    if not told.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        told.write_text(str(undisturbed(scene, before)))
    return Template(scene, scene.rows(), float(told.read_text()))


def undisturbed(scene: Scene, before: Template | None) -> float:
    """Lay the scene out, record baselines, measure; seconds of the second session."""
    lay_out(scene.folder)
    if before is None:
        write.write(Checkpoint("tiny-gpt2", TINY_HOME / "gpt2", ""), "F32", scene.folder / "model.gguf")
    else:
        shutil.copytree(TINY_HOME / "gpt2", scene.folder / "model")
        (scene.folder / "text.txt").write_text(words())
    for more in ("--regen-all",), ():
        session = scene.start(*more)
        if session.wait():
            raise RuntimeError(f"the undisturbed session fails:\n{session.output}")
    plan, rows = json.loads((scene.report / "plan.json").read_text()), scene.rows()
    if len(plan) != len(rows) or any(row.value is None for row in rows.values()):
        raise RuntimeError(f"the undisturbed session measured {len(rows)} of {len(plan)} cases:\n{session.output}")
    return session.seconds


def words() -> str:
    """Text of the tiny models' language."""
    from harness.inputs.texts import synthetic

    return synthetic.text(2048, synthetic.HELD_OUT_SEED)
