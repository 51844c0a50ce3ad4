"""Files that survive a crash: atomic replacement, flushed appends, and a lock that the kernel releases."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from platformdirs import user_cache_path


def cache_dir() -> Path:
    """Where converted and trained checkpoints lie: $HARNESS_CACHE, else the user's cache directory."""
    chosen = os.environ.get("HARNESS_CACHE")
    return Path(chosen).expanduser() if chosen else user_cache_path("llm-quantization-harness")


def timing_lock() -> Path:
    """What whoever times something on this machine holds, one at a time."""
    return cache_dir() / "timing.lock"


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: a temporary neighbour, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """`replace_bytes` for UTF-8 text."""
    replace_bytes(path, text.encode())


@contextlib.contextmanager
def rewritten(path: Path) -> Iterator[Path]:
    """A copy of the file under the same name elsewhere, which replaces it whole at the end, an error or not."""
    before = path.read_bytes() if path.is_file() else None
    with tempfile.TemporaryDirectory(prefix="harness-draft-") as folder:
        draft = Path(folder) / path.name
        if before is not None:
            draft.write_bytes(before)
        try:
            yield draft
        finally:
            if draft.is_file() and draft.read_bytes() != before:
                replace_bytes(path, draft.read_bytes())


def append_line(path: Path, line: str) -> None:
    """Append one line and force it to disk, so that a crash keeps every line before it.

    What a crash left of a line is ended first. A line that does not go in whole (a full disk) is taken back.
    """
    with path.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        try:
            rest = memoryview(f"{line}\n".encode())
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def sha256_file(path: Path) -> str:
    """sha256 (hex) of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def owned(path: Path) -> IO[str] | None:
    """The open file that holds a lock for as long as it stays open, None where another process holds it.

    The kernel drops the lock when its holder dies, and no program that the holder starts inherits it.
    """
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold a lock across processes; the kernel drops it when the holder dies.

    Takers pass a turnstile first, so that one who waits for the exclusive lock is not starved by a stream of
    shared holders. The lock files stay (empty); what is locked is their inode, never their existence.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file, path.with_name(path.name + ".turnstile").open("a") as turnstile:
        fcntl.flock(turnstile, fcntl.LOCK_EX)
        try:
            fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        finally:
            fcntl.flock(turnstile, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
