"""Runs groups in child processes and turns what comes back, or does not, into rows. No pytest, no torch."""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from harness.core import gpus
from harness.core.catalog import member, member_of
from harness.core.errors import DEVICE, HarnessError, refused
from harness.core.files import locked
from harness.core.progress import WAITING, Piece
from harness.core.records import Case, Row, Verdict
from harness.core.specification import parse
from harness.core.text import plural
from harness.inputs.models import names
from harness.inputs.texts import corpora
from harness.methods.quantizing import compiled
from harness.results.directory import IDENTITIES
from harness.run.messages import UNFIT, Asked, Job, Reply, Stop
from harness.run.plan import models_of

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import BaseContext
    from multiprocessing.process import BaseProcess

    from harness.core.options import Options

WORKERS = "PYTEST_XDIST_WORKER_COUNT"  # pytest-xdist's, which share the cores
DEATHS = 2  # a group whose process died this often is given up: the machine cannot carry it
ENDING_SECONDS = 5  # for a process to end once it is told to
Arrived = Callable[[Row, Mapping[str, Any]], None]
Watch = Callable[[Piece], None]


def unseen(piece: Piece) -> None:
    """Nobody looks."""


class Died(Exception):
    """The group's process ended without an answer, or was ended because none came."""


class Hung(Died):
    """It was ended since it took no step for too long."""


@dataclass
class Process:
    """One group's process and the pipe to it."""

    process: BaseProcess
    connection: Any
    log: Path
    patience: float  # seconds without a step forward until it counts as hung
    predicted: Mapping[str, int] = field(default_factory=dict)
    ended: bool = False  # by itself, behind its last answer, or by us
    asked: int = 0  # requests so far: the number of the last
    watch: Watch = unseen  # gets the pieces of work that may be shown

    def ask(self, verb: str, argument: Any, say: Callable[[str], None] = lambda line: None) -> Reply:
        """Send a request and wait for its answer; `Died` when the process ends instead, or hangs.

        Whatever else ends the waiting (Ctrl-C, somebody's timeout) ends the process with it: its answer would be taken
        for the next request's.
        """
        self.asked += 1
        try:
            self.connection.send((self.asked, verb, argument))
            return self._answer(say)
        except (EOFError, OSError) as error:
            raise Died(self.obituary()) from error
        except BaseException:
            self.kill()
            raise

    def _answer(self, say: Callable[[str], None]) -> Reply:
        step = "its beginning"
        while self.connection.poll(self.patience):
            number, reply = self.connection.recv()
            if reply.kind == "at":
                if reply.text.startswith(WAITING) and reply.text != step:
                    say(reply.text)
                step = reply.text
                if reply.data is not None:
                    self.watch(Piece(**reply.data))
            elif reply.kind == "predicted":
                self.predicted = dict(reply.data or {})
            elif reply.kind == "said":
                say(reply.text)
                step = reply.text
            elif number != self.asked:
                raise Died(f"the group's process answered request {number} where {self.asked} was asked")
            else:
                self.ended = reply.blamed == DEVICE
                return reply  # type: ignore[no-any-return]
        minutes = f"{self.patience / 60:g} minutes"
        raise Hung(f"the group's process hung at {step}: no step in {minutes} (--progress-timeout), so it was ended")

    @property
    def need(self) -> str:
        """What the group's model takes, as the end of a sentence; '' where it was not predicted yet."""
        needed = self.predicted.get("memory.storage")
        return f"; it needs {needed / 2**20:,.0f} MiB by prediction" if needed else ""

    def obituary(self) -> str:
        """How the process ended and what it needed by prediction."""
        self.process.join(10)
        code = self.process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            cause = {"SIGKILL": "killed (SIGKILL: out of memory?)", "SIGSEGV": "segmentation fault (SIGSEGV)"}
            how = cause.get(name, f"died of {name}")
        else:
            lines = self.log.read_text("utf-8", "replace").strip().splitlines() if self.log.is_file() else []
            how = f"ended with exit status {code}" + (f" ({lines[-1][:200]})" if lines else "")
        return f"the group's process was {how}" if how.startswith("killed") else f"the group's process: {how}"

    def close(self) -> None:
        """End the process, gently first."""
        with contextlib.suppress(OSError):
            self.connection.send((0, "close", None))
        self.process.join(ENDING_SECONDS)
        self.kill()

    def kill(self) -> None:
        """End the process now; it answers nothing more."""
        self.ended = True
        for end in (self.process.kill, kill_server):  # a fork server that is stopped tells of no death
            if self.process.is_alive():
                end()
                self.process.join(ENDING_SECONDS)
        self.connection.close()


def kill_server() -> None:
    """End this process's fork server; the next process starts another."""
    pid = vars(forkserver._forkserver)["_forkserver_pid"]
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """A fork server that starts no process in that time is ended, so that whoever waits for it hears of it."""
    timer = threading.Timer(seconds, kill_server)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Runner:
    """Measures cases one after another, keeping one group's process alive while its cases last."""

    def __init__(self, options: Options, *, threads: int, lock: Path) -> None:
        self.options, self.threads, self.lock = options, threads, lock
        self.environments: dict[str, dict[str, Any]] = {}
        self.inputs: Mapping[str, str] = {}  # what weights and texts were when the session began, where that is known
        self.identities: Mapping[str, Mapping[str, str]] = {}  # facts of the prepared models by their digest
        self.unfit: dict[Case, str] = {}  # cases whose model or text cannot be had, and why
        self.arrived: Arrived = lambda row, world: None  # told of rows that were measured ahead
        self.say: Callable[[str], None] = lambda line: None  # gets a line where a lock is waited for
        self.watch: Watch = unseen  # gets the pieces of work, as they begin
        self.crowded = int(os.environ.get(WORKERS) or 1) > 1  # others measure on these cores at the same time
        self._group = ("", "")  # and how its threads wait
        self._process: Process | None = None
        self._deaths: dict[str, list[str]] = {}  # by group: of what its processes died
        self._logs = Path(tempfile.mkdtemp(prefix="harness-logs-"))
        weakref.finalize(self, shutil.rmtree, self._logs, ignore_errors=True)

    def prepare(self, cases: Sequence[Case], say: Callable[[str], None]) -> Mapping[str, str]:
        """Make checkpoints and token plans in a process of their own, once the assets are known to be there.

        A model or text that cannot be had costs its own cases, which are `unfit` then, each with the reason.

        Returns what identifies the weights and texts (`group.prepare`): every group is held to it.

        Raises:
            HarnessError: what is the user's to act on, before anything ran: no case is left.
        """
        self.check_assets(cases)
        _, note = compiled.kept_in()
        if note and importlib.util.find_spec("numba"):
            say(note)
        told = self._prepared(self.fit(cases), say)
        for case, reason in told.pop(UNFIT, ()):
            self.unfit[case] = reason
        self.fit(cases)
        for (model, reason), count in Counter((case.model, reason) for case, reason in self.unfit.items()).items():
            say(f"harness: {plural(count, 'case')} of {model} cannot be measured: {reason}")
        self.identities = told.pop(IDENTITIES, {})
        self.inputs = told
        return self.inputs

    def _prepared(self, cases: Sequence[Case], say: Callable[[str], None]) -> dict[str, Any]:
        """What `group.prepare` answers; where its process dies, the models are prepared one by one."""
        models = dict.fromkeys(case.model for case in cases)
        try:
            return dict(self.consult("prepare", cases, say).data or {})
        except HarnessError as error:
            if len(models) == 1:
                return {UNFIT: [(case, str(error)) for case in cases]}
        whole: dict[str, Any] = {UNFIT: [], IDENTITIES: {}}
        for model in models:
            told = self._prepared([case for case in cases if case.model == model], say)
            whole[UNFIT] += told.pop(UNFIT, [])
            whole[IDENTITIES] |= told.pop(IDENTITIES, {})
            whole |= told
        return whole

    def fit(self, cases: Sequence[Case]) -> list[Case]:
        """Those that can be measured as far as is known; HarnessError with the reasons where there is none."""
        left = [case for case in cases if case not in self.unfit]
        if not left:
            raise HarnessError("; ".join(dict.fromkeys(self.unfit[case] for case in cases)))
        return left

    def check_assets(self, cases: Sequence[Case]) -> None:
        """Note, without torch, whose model or text is nowhere to be found or may not be opened."""
        options = self.options
        permitted = {"allow_pickle": options.allow_pickle, "trust_remote_code": options.trust_remote_code}
        for model in models_of(cases):
            with self.costing(case for case in cases if model in models_of([case])):
                names.locate(parse(model), options.declared, **permitted)
        for dataset in dict.fromkeys(case.dataset for case in cases if case.dataset):
            with self.costing(case for case in cases if case.dataset == dataset):
                corpora.check(parse(dataset), options.declared)

    @contextlib.contextmanager
    def costing(self, cases: Iterable[Case]) -> Iterator[None]:
        """Cases that are unfit where what is done within fails."""
        try:
            yield
        except (HarnessError, OSError) as error:
            for case in cases:
                self.unfit.setdefault(case, refused(error) or str(error))

    def consult(self, verb: str, cases: Sequence[Case], say: Callable[[str], None]) -> Reply:
        """Ask about all cases, in a process that loads no model; its failure is the session's, its death is not yet."""
        for tries in range(DEATHS):
            try:
                process = self._start(cases[0], {})
                try:
                    reply = process.ask(verb, list(cases), say)
                finally:
                    process.close()
                break
            except Died as error:
                if tries + 1 == DEATHS or isinstance(error, Hung):
                    raise HarnessError(f"preparing {cases[0].model} failed: {error}") from error
        if reply.kind == "error":
            raise HarnessError(reply.text)
        if reply.kind == "bug":
            raise RuntimeError(reply.text)
        return reply

    def begin(self, cases: Sequence[Case], ask: Callable[[Case], Asked]) -> None:
        """Every case that will be measured, before the first is: for an engine that works ahead. This one does not."""

    def ahead(self) -> list[Row]:
        """Rows without verdict that came in and that nobody has asked for yet; none where nothing works ahead."""
        return []

    def measure(self, case: Case, resumable: Mapping[str, Row], stop: Stop | None = None) -> tuple[Row, str]:
        """One row without verdict, and a traceback where a bug was met; timed cases run with nothing beside them."""
        if case in self.unfit:
            return missing(case, self.unfit[case]), ""
        deaths = self._deaths.setdefault(case.group, [])
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(self.lock, shared=not member_of(case).timed, say=self.say))
            except OSError as error:
                fix = "make room, or set HARNESS_CACHE to a folder with more"
                return missing(case, f"the lock {self.lock} cannot be written ({error.strerror}): {fix}"), ""
            if len(deaths) >= DEATHS:
                return missing(case, f"not tried: {deaths[-1]}"), ""
            process: Process | None = None
            try:
                process = self._process_for(case)
                before = resumable.get(case.id)
                if before is not None:
                    key = process.ask("key", (case, stop), self.say)
                    if key.kind == "key" and key.text == before.key:
                        return before, ""
                    process = self._process_for(case)  # another where the asked one ended
                reply = process.ask("measure", (case, stop), self.say)
            except Died as error:
                deaths.append(f"{error}{process.need if process else ''}")
                self.close()
                return missing(case, deaths[-1]), ""
            if reply.kind == "row" and reply.row is not None:
                self.environments[reply.row.environment] = dict(reply.data or {})
                return reply.row, ""
            if reply.kind == "left out":
                return left_out(case, reply.text), ""
            if reply.kind == "error":
                return missing(case, reply.text + (process.need if reply.blamed else "")), ""
            return missing(case, reply.text.strip().splitlines()[-1]), reply.text

    def ask(self, case: Case, verb: str, argument: Any) -> Reply:
        """One request to the process of the case's group, started if need be; `Died` when it ends instead."""
        try:
            return self._process_for(case).ask(verb, argument, self.say)
        except Died:
            self.close()
            raise

    def _process_for(self, case: Case) -> Process:
        group = case.group, self.waiting(case)
        if self._process is None or self._process.ended or self._group != group:
            self.close()
            self._process, self._group = self._start(case, self.inputs), group
        return self._process

    def waiting(self, case: Case | None = None) -> str:
        """OMP_WAIT_POLICY of a case's process, or of most; '' leaves it as the user has it, as a plain script does.

        Threads that spin between two operations are the quicker ones where nothing else runs, as beside a timed case;
        those of several processes take the cores from each other.
        """
        if self.options.wait_policy != "auto":
            return self.options.wait_policy
        measured = None if case is None else member(case.metric)
        return "passive" if self.crowded and not (measured and measured.timed) else ""

    def _start(self, case: Case, inputs: Mapping[str, str]) -> Process:
        """A group's process; `Died` where the system gives none, a fork server that went down tried anew once."""
        asked = (case.model, case.method, case.device, case.reference)
        shown = os.environ.get(gpus.VISIBLE) if case.device == "cuda" else ""  # a case on the processor sees no card
        job = Job(self.options, *asked, self.threads, self._logs / "child.log", inputs, shown)
        patience = 60.0 * self.options.progress_timeout
        beside = {"HARNESS_BESIDE_CARD": "1"} if gpus.beside_card() else {}  # which the server must not ask about
        usual, variables = (
            server_environment(self.threads, waiting) | beside for waiting in (self.waiting(), self.waiting(case))
        )
        for tries in range(DEATHS):
            try:
                context = forking(usual) if variables == usual else multiprocessing.get_context("spawn")
                here, there = context.Pipe()
                process: BaseProcess = context.Process(target=run_group, args=(job, there), daemon=True)  # type: ignore[attr-defined]
                with environment_variables(variables), without_main(), deadline(patience):
                    process.start()
                there.close()
                return Process(process, here, job.log, patience, watch=self.watch)
            except (OSError, EOFError) as error:
                if tries + 1 == DEATHS:
                    fix = ": set TMPDIR to a shorter path" if "AF_UNIX" in str(error) else ""
                    raise Died(f"the group's process could not be started ({error!r}){fix}") from error
        raise AssertionError("unreachable")

    def close(self) -> None:
        """End the group's process."""
        if self._process is not None:
            self._process.close()
            self._process = None


def run_group(job: Job, connection: Connection) -> None:
    """The child's entry: torch is imported on this side only (the fork server has done it already).

    It sees the cards that its asker sees now: Ray hands one worker, and with it one fork server, another card a task.
    """
    os.environ.pop(gpus.VISIBLE, None)
    os.environ.update({} if job.visible is None else {gpus.VISIBLE: job.visible})
    from harness.run.group import serve

    serve(job, connection)


_server: dict[str, str] = {}  # under what variables this process's fork server was started


def forking(variables: Mapping[str, str]) -> BaseContext:
    """What starts processes under these variables: the fork server, where it was started under the same.

    Thread pools read them once, at the import of torch, which the server has done; a spawned process imports it anew.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["harness.run.preload"])
    if not _server:
        _server.update(variables)
    if _server != variables:
        return multiprocessing.get_context("spawn")
    with environment_variables(variables):
        forkserver.ensure_running()
    return context


def server_environment(threads: int, waiting: str = "") -> dict[str, str]:
    """Variables that must stand before torch starts its thread pool; recorded with each measurement.

    Args:
        threads: of the pool.
        waiting: OMP_WAIT_POLICY, "" for the caller's own.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": "1",  # numpy's pool would start at import, before the fork; nothing hot uses it
        "TOKENIZERS_PARALLELISM": "false",  # its thread pool does not survive a fork
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic cuBLAS
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0",  # containers set 1, which makes TF32 of every fp32 product
        "NVIDIA_TF32_OVERRIDE": "0",
        **({"OMP_WAIT_POLICY": waiting} if waiting else {}),
    }


@contextlib.contextmanager
def without_main() -> Iterator[None]:
    """Hide the caller's script from multiprocessing, which would run it again in a process that needs nothing of it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def environment_variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for the fork server that starts within, and put the caller's own back."""
    before = {name: os.environ[name] for name in values if name in os.environ}
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def missing(case: Case, reason: str) -> Row:
    """A planned case without a number, and why."""
    return Row.of(case, verdict=Verdict.MISSING, reason=reason)


def left_out(case: Case, reason: str) -> Row:
    """A planned case that this text or model can have no figure of, and why."""
    return Row.of(case, verdict=Verdict.NOT_COMPARABLE, reason=f"left out: {reason}")
