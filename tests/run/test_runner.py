"""The controller's side of a group's process: what a death, a refused start and a strange error become."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from harness import judge
from harness.core.environment import Environment
from harness.core.errors import HarnessError
from harness.core.options import Declared, Options
from harness.core.records import Case, Row, Verdict
from harness.results.directory import IDENTITIES
from harness.run import group, local
from harness.run.group import failure
from harness.run.lifetime import end_with_controller, work_told
from harness.run.local import Died, Process, Runner
from harness.run.messages import UNFIT, Reply

if TYPE_CHECKING:
    from harness.run.messages import Job

ILLEGAL = "CUDA error: an illegal memory access was encountered"
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device"
NO_ROOM = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 7.92 GiB"
NO_WORKSPACE = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED"
ASYNCHRONOUS = "CUDA kernel errors might be asynchronously reported at some other API call."
CASES = [Case("tiny-gpt2", "fp32", "", "", "memory.storage", "cpu")]


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(Options(Declared(tmp_path), report_dir=tmp_path), threads=1, lock=tmp_path / "lock")


@pytest.mark.parametrize("deaths", [0, 1, 2])
def test_preparing_is_tried_twice(runner: Runner, monkeypatch: pytest.MonkeyPatch, deaths: int) -> None:
    left = [Died("killed")] * deaths

    def ask(verb: str, argument: Any, say: Any) -> Reply:
        if left:
            raise left.pop()
        return Reply("done", data={"weights of m": "a"})

    process = SimpleNamespace(ask=ask, close=lambda: None)
    monkeypatch.setattr(runner, "_start", lambda case, inputs: process)
    if deaths < 2:
        assert runner.prepare(CASES, print) == {"weights of m": "a"}
    else:
        with pytest.raises(HarnessError, match="preparing tiny-gpt2 failed: killed"):
            runner.prepare(CASES, print)


def cases_of(*models: str) -> list[Case]:
    texts = (("", "", "memory.storage"), ("synthetic", "rolling:64", "perplexity"))
    return [Case(model, "fp32", *text, "cpu") for model in models for text in texts]


def test_a_model_that_cannot_be_had_costs_its_own_cases(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    cases, told = cases_of("tiny-gpt2", "path:/nowhere", "tiny-olmo"), list[str]()
    lost = [(cases[-1], "rolling needs a tokenizer with BOS")]  # as `group.prepare` answers
    monkeypatch.setattr(runner, "consult", lambda verb, left, say: Reply("done", data={"a": "b", UNFIT: lost}))
    assert runner.prepare(cases, told.append) == {"a": "b"}
    assert set(runner.unfit) == {*cases[2:4], cases[-1]}
    for case in runner.unfit:
        row, trouble = runner.measure(case, {})
        assert (row.value, row.verdict, row.reason, trouble) == (None, Verdict.MISSING, runner.unfit[case], "")
    assert "/nowhere" in runner.unfit[cases[2]]
    assert told == [
        f"harness: 2 cases of path:/nowhere cannot be measured: {runner.unfit[cases[2]]}",
        "harness: 1 case of tiny-olmo cannot be measured: rolling needs a tokenizer with BOS",
    ]


def test_a_text_that_cannot_be_had_costs_its_own_cases(runner: Runner) -> None:
    cases = cases_of("tiny-gpt2")
    runner.check_assets([cases[0], cases[1]._replace(dataset="text:nowhere.txt")])
    assert [case.dataset for case in runner.unfit] == ["text:nowhere.txt"]


def test_where_no_case_is_left_nothing_runs(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HarnessError, match=r"/nowhere.*; .*/neither"):
        runner.prepare(cases_of("path:/nowhere", "path:/neither"), print)
    cases = cases_of("tiny-gpt2")
    lost = [(case, "unreadable") for case in cases]
    monkeypatch.setattr(runner, "consult", lambda verb, left, say: Reply("done", data={UNFIT: lost}))
    with pytest.raises(HarnessError, match=r"^unreadable$"):
        runner.prepare(cases, print)


def test_a_model_that_ends_the_process_is_prepared_apart(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def consult(verb: str, cases: list[Case], say: Any) -> Reply:
        if any(case.model == "tiny-olmo" for case in cases):
            raise HarnessError("killed")
        return Reply("done", data={"weights": cases[0].model, UNFIT: [], IDENTITIES: {"x": {}}})

    monkeypatch.setattr(runner, "consult", consult)
    cases = cases_of("tiny-olmo", "tiny-gpt2")
    assert runner.prepare(cases, lambda line: None) == {"weights": "tiny-gpt2"}
    assert runner.unfit == dict.fromkeys(cases[:2], "killed")
    assert runner.identities == {"x": {}}


def test_a_figure_that_cannot_be_is_left_out(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    process: Any = SimpleNamespace(ask=lambda *words: Reply("left out", text="no words"), close=lambda: None)
    monkeypatch.setattr(runner, "_process_for", lambda case: process)
    row, trouble = runner.measure(CASES[0], {})
    assert (row.value, row.left_out, row.reason, trouble) == (None, True, "left out: no words", "")
    for strict in (True, False):
        assert not judge.fails(row, require_baselines=strict, allow_missing=False)
    assert judge.fails(local.missing(CASES[0], "gone"), require_baselines=False, allow_missing=False)


def test_preparing_that_hangs_is_ended_named_and_not_tried_again(
    forked: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, begun = forked._start, list[Process]()

    def started(case: Case, inputs: Any) -> Process:
        begun.append(start(case, inputs))
        return begun[-1]

    def said(line: str) -> None:
        if line == "fetching it":
            assert begun[-1].patience == 30 * 60
            begun[-1].patience = 0.2

    monkeypatch.setattr(forked, "_start", started)
    with pytest.raises(HarnessError, match=r"preparing tiny-gpt2 failed: .* hung at fetching it: no step in"):
        forked.prepare(CASES, said)
    assert len(begun) == 1
    assert begun[0].ended


def test_what_a_process_writes_and_computes_is_a_step_and_waiting_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("harness.core.progress.alive", told.append)
    monkeypatch.setattr("harness.run.lifetime.STEP_SECONDS", 1e9)
    with work_told(lambda: "fetching it", every=0.01):
        time.sleep(0.1)
        assert told == []
        (tmp_path / "weights").write_bytes(bytes(1 << 17))
        time.sleep(0.1)
    assert told == ["fetching it"]
    monkeypatch.setattr("harness.run.lifetime.STEP_SECONDS", 0.0)
    with work_told(lambda: "converting it", every=0.01):
        time.sleep(0.1)
    assert "converting it" in told


def test_groups_are_held_to_what_was_prepared(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[Any] = []

    def start(case: Case, inputs: Any) -> Process:
        held.append(inputs)
        raise Died("far enough")

    monkeypatch.setattr(runner, "consult", lambda verb, cases, say: Reply("done", data={"weights of m": "a"}))
    monkeypatch.setattr(runner, "_start", start)
    runner.prepare(CASES, print)
    assert "far enough" in runner.measure(CASES[0], {})[0].reason
    assert held == [{"weights of m": "a"}]


@pytest.mark.parametrize(
    ("workers", "policy", "metric", "waits"),
    [
        ("", "auto", "perplexity", ""),
        ("", "auto", "latency.decode", ""),
        ("2", "auto", "perplexity", "passive"),
        ("2", "auto", "latency.decode", ""),  # nothing else runs beside it
        ("2", "active", "perplexity", "active"),
        ("", "passive", "latency.decode", "passive"),
    ],
)
def test_threads_wait_as_in_a_plain_script_but_where_processes_share_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: str, policy: str, metric: str, waits: str
) -> None:
    monkeypatch.setenv(local.WORKERS, workers)
    runner = Runner(Options(Declared(tmp_path), wait_policy=policy), threads=1, lock=tmp_path / "lock")
    assert runner.waiting(CASES[0]._replace(metric=metric)) == waits
    variables = local.server_environment(1, waits)
    assert variables.get("OMP_WAIT_POLICY") == (waits or None)
    assert not {name for name in variables if name.startswith(("MALLOC", "GOMP"))}  # as in the user's shell


def test_a_timed_case_of_a_worker_has_a_process_whose_threads_spin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv(local.WORKERS, "2")
    options = Options(Declared(tmp_path), report_dir=tmp_path, repetitions=6)
    runner = Runner(options, threads=1, lock=tmp_path / "lock")
    cases = [CASES[0]._replace(metric=metric) for metric in ("memory.storage", "latency.decode", "memory.footprint")]
    runner.prepare(cases, print)
    try:
        rows = [runner.measure(case, {})[0] for case in cases]
    finally:
        runner.close()
    assert [row.reason for row in rows if row.value is None] == []
    assert [runner.environments[row.environment]["wait_policy"] for row in rows] == ["passive", "", "passive"]
    assert rows[1].detail["wait_policy"] == ""
    assert runner.environments[rows[1].environment]["thread_library"]


@pytest.mark.parametrize(
    "error", [EOFError(), ConnectionRefusedError(), BrokenPipeError(), OSError("AF_UNIX path too long")]
)
def test_a_process_that_cannot_be_started_is_a_missing_row(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refused() -> None:
        raise error

    monkeypatch.setattr("multiprocessing.forkserver.ensure_running", refused)
    monkeypatch.setattr(local, "_server", {})  # else one of other variables, and a spawned process in its place
    row, trouble = runner.measure(CASES[0], {})
    assert row.value is None
    assert "could not be started" in row.reason
    assert ("set TMPDIR to a shorter path" in row.reason) is ("AF_UNIX" in str(error))
    assert not trouble


def test_a_lock_that_cannot_be_taken_is_a_missing_row(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    runner = Runner(Options(Declared(tmp_path)), threads=1, lock=tmp_path / "file" / "lock")
    row, trouble = runner.measure(CASES[0], {})
    assert "cannot be written" in row.reason
    assert "HARNESS_CACHE" in row.reason
    assert not trouble


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (HarnessError("told"), "error", "told"),
        (MemoryError("99 TiB"), "error", "out of memory: 99 TiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), "error", "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "error", "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "error", "a disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "error", "a disk is full"),
        (OSError(errno.EIO, "Input/output error", "w.safetensors"), "error", "'w.safetensors': a disk or"),
        (OSError(errno.ESTALE, "Stale file handle"), "error", "mount it again"),
        (OSError(errno.EMFILE, "Too many open files"), "error", "ulimit -n"),
        (RuntimeError("Input/output error (os error 5)"), "error", "a disk or its connection"),
        (KeyError("a bug"), "bug", "KeyError"),
        (torch.OutOfMemoryError(NO_ROOM), "error", f"out of memory on the card: {NO_ROOM}"),
        (
            RuntimeError(f"{NO_WORKSPACE} when calling `cublasCreate(handle)`"),
            "error",
            "out of memory on the card: CUDA",
        ),
        (
            RuntimeError(f"CUDA error: out of memory\n{ASYNCHRONOUS}"),
            "error",
            "out of memory on the card: CUDA error: o",
        ),
        (RuntimeError(f"{NO_KERNEL}\n{ASYNCHRONOUS}"), "error", f"a kernel is missing for this card ({NO_KERNEL})"),
        (torch.AcceleratorError(f"{ILLEGAL}\n{ASYNCHRONOUS}"), "error", f"a device error ({ILLEGAL})"),
        (RuntimeError("CUDA error: device-side assert triggered"), "error", "a device error"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), "error", "a device e"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "error", "a device error"),
    ],
)
def test_what_the_machine_is_to_blame_for_is_one_line(error: Exception, kind: str, words: str) -> None:
    reply = failure(error)
    assert reply.kind == kind
    assert words in reply.text
    assert kind == "bug" or "\n" not in reply.text


def test_no_log_folder_stays_behind(tmp_path: Path) -> None:
    runner = Runner(Options(Declared(tmp_path)), threads=1, lock=tmp_path / "lock")
    folder = runner._logs
    assert folder.is_dir()
    del runner
    assert not folder.exists()


def test_a_library_that_raised_because_of_the_machine_is_seen_through() -> None:
    error = ValueError("the layer could not be made")
    error.__cause__ = RuntimeError(ILLEGAL)
    assert failure(error).text.startswith(f"a device error ({ILLEGAL})")


class Scripted:
    """A group whose measurements fail as a card's do: each case's method says how."""

    def __init__(self, job: Job, connection: Any) -> None:
        connection.send(Reply("predicted", data={"memory.storage": 3 << 20}))
        self.environment = replace(Environment(), device="cuda")

    def measure(self, case: Case, stop: Any = None) -> Row:
        if case.metric == "perplexity":
            raise RuntimeError(f"{ILLEGAL}\n{ASYNCHRONOUS}")
        if case.metric == "latency.decode":
            time.sleep(60)
        if case.metric == "memory.run_peak":
            raise RuntimeError(NO_ROOM)
        detail = {"exception": f"RuntimeError: {ILLEGAL}"} if case.metric == "invariant.run_twice" else {}
        return Row.of(case, value=float(os.getpid()), detail=detail)


def never_prepared(job: Job, cases: Any, line: Any) -> None:
    line.send(Reply("said", text="fetching it"))
    time.sleep(60)


def scripted(job: Job, connection: Any) -> None:
    """The child's entry, its group replaced."""
    vars(group)["Group"] = Scripted
    vars(group)["prepare"] = never_prepared
    group.serve(job, connection)


@pytest.fixture
def forked(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runner]:
    """Its groups are scripted, its processes forked whatever the server was started under: a spawn takes seconds."""
    monkeypatch.setattr(local, "run_group", scripted)
    monkeypatch.setattr(local, "_server", {})
    yield runner
    runner.close()


def test_a_fresh_process_takes_the_rest_behind_a_device_error(forked: Runner) -> None:
    def measured(metric: str) -> Row:
        row, trouble = forked.measure(CASES[0]._replace(metric=metric), {})
        assert not trouble
        return row

    first = measured("memory.storage").value
    starved = measured("memory.run_peak")
    assert starved.reason == f"out of memory on the card: {NO_ROOM}; it needs 3 MiB by prediction"
    assert measured("memory.storage").value == first  # memory comes back, and the process with it
    lost = measured("perplexity")
    assert lost.value is None
    assert lost.reason.startswith(f"a device error ({ILLEGAL})")
    assert lost.reason.endswith("; it needs 3 MiB by prediction")
    second = measured("memory.storage").value
    assert second not in (None, first)
    assert measured("invariant.run_twice").value == second  # a finding, and the last of its process
    assert measured("memory.storage").value not in (None, first, second)


@pytest.mark.parametrize("blamed", ["", "memory", "kernel", "device"])
def test_only_a_device_error_ends_a_process(tmp_path: Path, blamed: str) -> None:
    process = a_process(tmp_path, (1, Reply("error", blamed=blamed)))
    process.ask("measure", None)
    assert process.ended is (blamed == "device")


def a_process(log: Path, *answers: Any) -> Process:
    """A process that is pretended: its pipe holds these answers, and it dies when it is killed."""
    left, alive = list(answers), [True]

    def kill() -> None:
        alive[0] = False

    connection = SimpleNamespace(
        send=lambda request: None, poll=lambda seconds: bool(left), recv=lambda: left.pop(0), close=lambda: None
    )
    process: Any = SimpleNamespace(is_alive=lambda: alive[0], join=lambda seconds: None, kill=kill)
    return Process(process, connection, log, patience=1.0)


def test_an_answer_to_another_request_ends_the_process(tmp_path: Path) -> None:
    late = Reply("at", text="a window")  # of the request before: it says where that was, and answers nothing
    process = a_process(tmp_path, (0, late), (1, Reply("row")), (1, Reply("row")))
    assert process.ask("measure", None).kind == "row"
    with pytest.raises(Died, match="answered request 1 where 2 was asked"):
        process.ask("measure", None)
    assert process.ended


def test_a_wait_for_a_lock_inside_the_process_is_said_once(tmp_path: Path) -> None:
    waiting = (1, Reply("at", text="waiting for x, which another process holds"))
    told: list[str] = []
    process = a_process(tmp_path, waiting, waiting, (1, Reply("at", text="a window")), (1, Reply("row")))
    process.ask("measure", None, told.append)
    assert told == ["waiting for x, which another process holds"]


def test_a_fork_server_that_is_stopped_holds_up_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = a_process(tmp_path)
    monkeypatch.setattr(process.process, "kill", lambda: None)  # dead, but nobody tells
    monkeypatch.setattr(local, "kill_server", lambda: monkeypatch.setattr(process.process, "is_alive", lambda: False))
    process.close()
    assert process.ended
    assert not process.process.is_alive()


def test_a_hung_process_is_ended_named_and_replaced(forked: Runner) -> None:
    forked.crowded = False  # else a timed case gets a process of its own
    first = forked.measure(CASES[0], {})[0].value
    assert forked._process is not None
    assert forked._process.patience == 30 * 60
    forked._process.patience = 0.6
    row, trouble = forked.measure(CASES[0]._replace(metric="latency.decode"), {})
    assert row.value is None
    assert not trouble
    assert "hung at its beginning: no step in 0.01 minutes (--progress-timeout)" in row.reason
    assert forked.measure(CASES[0], {})[0].value not in (None, first)  # the session goes on


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, pytest.fail.Exception])
def test_an_interrupted_request_gives_its_answer_to_nobody(
    forked: Runner, interruption: Callable[[str], BaseException]
) -> None:
    """As pytest-timeout does it: a signal's handler raises in the middle of a test."""
    first = forked.measure(CASES[0], {})[0].value

    def interrupt(number: int, frame: Any) -> None:
        raise interruption("timed out")

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(interruption, match="timed out"):  # type: ignore[call-overload]
            forked.measure(CASES[0]._replace(metric="latency.decode"), {})
    finally:
        signal.signal(signal.SIGALRM, before)
    row = forked.measure(CASES[0], {})[0]
    assert row.case == CASES[0]
    assert row.value not in (None, first)  # of a fresh process


def busy(connection: Any, other: Any) -> None:
    other.close()
    end_with_controller(connection)
    while True:
        time.sleep(1)


def test_a_process_ends_with_its_controller_whatever_it_does() -> None:
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=busy, args=(there, here))
    process.start()
    there.close()
    process.join(0.3)
    assert process.is_alive()
    here.close()  # as the kernel does it for a controller that was killed
    process.join(10)
    assert process.exitcode == 1
