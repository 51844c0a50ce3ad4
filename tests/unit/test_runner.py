"""The controller's side of a group's process: what a death, a refused start and a strange error become."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from harness.child import told
from harness.errors import HarnessError
from harness.messages import Reply
from harness.options import Declared, Options
from harness.records import Case
from harness.runner import Died, Runner

CASES = [Case("tiny-gpt2", "fp32", "", "", "memory.storage", "cpu")]


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(Options(Declared(tmp_path), report_dir=tmp_path), threads=1, lock=tmp_path / "lock")


@pytest.mark.parametrize("deaths", [0, 1, 2])
def test_preparing_is_tried_twice(runner: Runner, monkeypatch: pytest.MonkeyPatch, deaths: int) -> None:
    left = [Died("killed")] * deaths

    def consulted(verb: str, cases: Any, say: Any) -> Reply:
        if left:
            raise left.pop()
        return Reply("done", data={"weights of m": "a"})

    monkeypatch.setattr(runner, "_consulted", consulted)
    if deaths < 2:
        assert runner.prepare(CASES, print) == {"weights of m": "a"}
    else:
        with pytest.raises(HarnessError, match="preparing tiny-gpt2 failed: killed"):
            runner.prepare(CASES, print)


@pytest.mark.parametrize(
    "error", [EOFError(), ConnectionRefusedError(), BrokenPipeError(), OSError("AF_UNIX path too long")]
)
def test_a_process_that_cannot_be_started_is_a_missing_row(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def started(case: Case, began: Any) -> Any:
        raise error

    monkeypatch.setattr(runner, "_started", started)
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
        (KeyError("a bug"), "bug", "KeyError"),
    ],
)
def test_what_the_machine_is_to_blame_for_is_one_line(error: Exception, kind: str, words: str) -> None:
    reply = told(error)
    assert reply.kind == kind
    assert words in reply.text
    assert kind == "bug" or "\n" not in reply.text


def test_no_log_folder_stays_behind(tmp_path: Path) -> None:
    runner = Runner(Options(Declared(tmp_path)), threads=1, lock=tmp_path / "lock")
    folder = runner._logs
    assert folder.is_dir()
    del runner
    assert not folder.exists()
