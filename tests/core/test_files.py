import contextlib
import multiprocessing
import os
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from harness.core import files
from harness.core.files import (
    append_line,
    cache_dir,
    locked,
    owned,
    read_plain,
    replace_bytes,
    replace_text,
    rewritten,
    sha256_file,
    timing_lock,
)


def test_replace_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "file.txt"
    replace_text(path, "one")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        replace_bytes(path, b"two")
    assert path.read_text() == "one"
    assert [item.name for item in path.parent.iterdir()] == ["file.txt"]


def test_append_adds_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_line(path, "a")
    append_line(path, "b")
    assert path.read_text() == "a\nb\n"


def test_a_draft_replaces_the_file_at_its_end_an_error_or_not(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "facts.yaml"
    with rewritten(path) as draft:
        assert draft.name == path.name
        draft.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with contextlib.suppress(ValueError), rewritten(path) as draft:
        assert draft.read_text() == "one"
        draft.write_text("two")
        raise ValueError("told")
    assert path.read_text() == "two"


def test_append_ends_what_a_crash_left_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('whole\n{"torn": ')
    append_line(path, "b")
    assert path.read_text() == 'whole\n{"torn": \nb\n'


def test_a_line_that_does_not_go_in_whole_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    append_line(path, "a")
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        append_line(path, "b")
    assert path.read_text() == "a\n"


def test_one_owner_at_a_time(tmp_path: Path) -> None:
    first = owned(tmp_path / "lock")
    assert first is not None
    assert owned(tmp_path / "lock") is None
    first.close()
    second = owned(tmp_path / "lock")
    assert second is not None
    second.close()


def test_sha256_is_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_cache_follows_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path


def hold(path: Path, shared: bool, holding: Event, release: Event) -> None:
    with locked(path, shared=shared):
        holding.set()
        release.wait(10)


def start(path: Path, shared: bool) -> tuple[multiprocessing.Process, Event, Event]:
    context = multiprocessing.get_context("fork")
    holding, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(path, shared, holding, release))
    process.start()
    return process, holding, release  # type: ignore[return-value]


def test_exclusive_waits_for_shared_and_is_not_starved(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first, first_in, first_out = start(path, True)
    second, second_in, second_out = start(path, True)
    assert first_in.wait(5)
    assert second_in.wait(5)  # two shared holders at once
    writer, writer_in, writer_out = start(path, False)
    time.sleep(0.2)
    late, late_in, late_out = start(path, True)  # comes after the writer: must queue behind it
    assert not writer_in.wait(0.3)
    assert not late_in.is_set()
    first_out.set()
    second_out.set()
    assert writer_in.wait(5)
    assert not late_in.is_set()
    writer_out.set()
    assert late_in.wait(5)
    late_out.set()
    for process in (first, second, writer, late):
        process.join(5)


def test_a_dead_holder_leaves_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    process, holding, _ = start(path, False)
    assert holding.wait(5)
    process.kill()
    process.join()
    with locked(path):
        pass


def test_who_waits_for_a_lock_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE_SECONDS", 0.0)
    process, holding, release = start(tmp_path / "lock", False)
    assert holding.wait(5)
    told: list[str] = []

    def say(line: str) -> None:
        told.append(line)
        release.set()

    with locked(tmp_path / "lock", say=say):
        pass
    process.join(5)
    assert told == [f"waiting for {tmp_path / 'lock'}, which another process holds"]


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_obey_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        replace_text(tmp_path / "a", "text")
        append_line(tmp_path / "b", "text")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~mask}


def test_a_pipe_is_refused_and_never_waited_on(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(OSError, match="it is no plain file"):
            read_plain(path)
    (tmp_path / "file").write_bytes(b"abc")
    assert read_plain(tmp_path / "file") == b"abc"


def test_a_read_only_cache_has_its_timing_lock_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    assert timing_lock() == tmp_path / "timing.lock"
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as where a file system is mounted read-only
    assert tmp_path not in timing_lock().parents
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "new"))  # not there yet: it will be made
    assert timing_lock() == tmp_path / "new" / "timing.lock"
