import ast
import contextlib
import errno
import multiprocessing
import os
import re
import tempfile
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

import harness
from harness.core import files
from harness.core.errors import HarnessError
from harness.core.files import (
    append_line,
    cache_dir,
    cache_folder,
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


@pytest.mark.parametrize("mask", [0o077, 0o777])
def test_a_lock_is_everybodys_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with locked(tmp_path / "a"):
            pass
        held = owned(tmp_path / "b")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666}
    assert held is not None
    held.close()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_lock_of_another_users_is_taken_by_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path, real = tmp_path / "lock", os.open
    path.touch()

    def opened(name: Path, flags: int, *more: int) -> int:
        if flags & (os.O_RDWR | os.O_CREAT):
            raise OSError(number, os.strerror(number))
        return real(name, flags, *more)

    monkeypatch.setattr(os, "open", opened)
    first = owned(path)
    assert first is not None
    assert owned(path) is None
    first.close()


def unnamed(call: ast.Call) -> bool:
    """Whether a call reads or writes text in whatever encoding the locale has."""
    function, given = call.func, {word.arg: word.value for word in call.keywords}
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if "encoding" in given or None in given:
        return False
    if name in ("read_text", "write_text"):
        return len(call.args) <= (name == "write_text")
    if name in ("run", "Popen", "check_output", "check_call"):
        return bool(given.keys() & {"text", "universal_newlines"})
    modes = [str(one.value) for one in (*call.args, *given.values()) if isinstance(one, ast.Constant)]
    text = any(re.fullmatch("[rwaxt+]{1,3}", mode) for mode in modes)
    binary = any(re.fullmatch("[rwax+]*b[rwax+]*", mode) for mode in modes)
    if name == "open" and isinstance(function, ast.Attribute) and (call.args or given):
        return text  # os.open, and whatever else of ours is called so, has no such mode
    return name in ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile") and not binary


WRONG = ("open(p)", "open(p, 'w')", "p.open()", "p.open('a')", "os.fdopen(1)", "p.read_text()", "p.write_text(t)")
FINE = ("open(p, 'rb')", "p.open('xb')", "p.read_text('utf-8')", "run(c)", "os.open(p, 0)", "session.open(cases)")


def test_every_text_names_its_encoding() -> None:
    for line in (*WRONG, "run(c, text=True)", *FINE):
        (call,) = [node for node in ast.walk(ast.parse(line)) if isinstance(node, ast.Call)]
        assert unnamed(call) is (line not in FINE), line
    found = [
        f"{path}:{node.lineno}"
        for path in sorted(Path(harness.__file__).parent.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Call) and unnamed(node)
    ]
    assert found == []


def test_a_read_only_cache_has_its_timing_lock_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    assert timing_lock() == tmp_path / "timing.lock"
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as where a file system is mounted read-only
    assert tmp_path not in timing_lock().parents
    monkeypatch.undo()
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "new"))  # not there yet: it is made
    assert timing_lock() == tmp_path / "new" / "timing.lock"
    monkeypatch.setenv("HARNESS_CACHE", "/dev/null/cache")  # nor can be
    assert timing_lock().parent == Path(tempfile.gettempdir())


def test_a_cache_that_cannot_be_made_names_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    assert cache_folder("scratch").is_dir()
    monkeypatch.setenv("HARNESS_CACHE", "/proc/nowhere")
    with pytest.raises(HarnessError, match=r"No such file or directory.*set HARNESS_CACHE"):
        cache_folder("scratch")
