"""Files that survive a crash: atomic replacement, flushed appends, and a lock that the kernel releases."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import IO

from platformdirs import user_cache_path

from harness.core import progress
from harness.core.errors import HarnessError

NAME = "llm-quantization-harness"
SOON = 0.001  # seconds until a lock that is held is asked for again, doubled each time up to LATE
LATE = 0.2
PATIENCE_SECONDS = 5.0  # before somebody who waits for a lock says so
EVERYBODY = 0o666  # of a lock's file, which holds nothing
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def cache_dir() -> Path:
    """Where converted and trained checkpoints lie: $HARNESS_CACHE, else the user's cache directory."""
    chosen = os.environ.get("HARNESS_CACHE")
    return Path(chosen).expanduser() if chosen else user_cache_path(NAME)


def cache_folder(name: str) -> Path:
    """A folder of the cache, made where it is not there; HarnessError, which names the fix, where it cannot be."""
    folder = cache_dir() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fix = "make room, or set HARNESS_CACHE to a folder with more"
        raise HarnessError(f"{folder} cannot be made in the cache ({error.strerror}): {fix}") from error
    return folder


def timing_lock() -> Path:
    """What whoever times something on this machine holds, one at a time.

    It lies in the cache; where that cannot be written, the lock is of this user alone.
    """
    home = cache_dir()
    try:
        home.mkdir(parents=True, exist_ok=True)
        writable = os.access(home, os.W_OK)
    except OSError:
        writable = False
    user = getattr(os, "getuid", int)()
    return (home / "timing.lock") if writable else Path(tempfile.gettempdir()) / f"{NAME}-{user}.lock"


def read_plain(path: Path) -> bytes:
    """A file's bytes; OSError for a folder, a pipe or a device, which could be waited on for ever."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is no plain file", str(path))
    with os.fdopen(handle, "rb") as file:
        return file.read()


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: a temporary neighbour, fsync, rename. Its permissions are the umask's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
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
    progress.note(f"reading {path.name}")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kernel_locks() -> ModuleType:
    """The module `fcntl`; HarnessError where the system has none, which alone is asked of it before measuring."""
    try:
        import fcntl  # local: another project's pytest loads this package on Windows too
    except ImportError as error:
        raise HarnessError(
            "measuring needs file locks that the kernel drops with their holder (fcntl), and this system has none: "
            "use Linux or macOS, on Windows inside WSL"
        ) from error
    return fcntl


def open_lock(path: Path) -> IO[str]:
    """The file of a lock, open: made for everybody who can enter its folder, whatever the umask.

    Of another user's that is closed to writing reading will do, the kernel locks it just as well. It is made only where
    there is none: in a folder like /tmp the system refuses to "make" a stranger's file that is there.
    """

    def opened(name: str, flags: int) -> int:
        try:
            return os.open(name, os.O_RDWR)
        except FileNotFoundError:
            handle = os.open(name, os.O_RDWR | os.O_CREAT, EVERYBODY)
            with contextlib.suppress(PermissionError):  # another user has made it meanwhile
                os.fchmod(handle, EVERYBODY)
            return handle
        except OSError as error:
            if error.errno not in CLOSED:
                raise
            return os.open(name, os.O_RDONLY)

    return open(path, encoding="utf-8", opener=opened)


def owned(path: Path) -> IO[str] | None:
    """The open file that holds a lock for as long as it stays open, None where another process holds it.

    The kernel drops the lock when its holder dies, and no program that the holder starts inherits it.
    """
    locks = kernel_locks()
    file = open_lock(path)
    try:
        locks.flock(file, locks.LOCK_EX | locks.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Hold a lock across processes; the kernel drops it when the holder dies.

    Takers pass a turnstile first, so that one who waits for the exclusive lock is not starved by a stream of
    shared holders. The lock files stay (empty); what is locked is their inode, never their existence. `say` gets a
    line where it takes long.
    """
    locks = kernel_locks()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_lock(path) as file, open_lock(path.with_name(path.name + ".turnstile")) as turnstile:
        _take(turnstile, locks.LOCK_EX, say)
        try:
            _take(file, locks.LOCK_SH if shared else locks.LOCK_EX, say)
        finally:
            locks.flock(turnstile, locks.LOCK_UN)
        try:
            yield
        finally:
            locks.flock(file, locks.LOCK_UN)


def _take(file: IO[str], how: int, say: Callable[[str], None]) -> None:
    """Ask for a lock until it is given: a wait inside the kernel could tell nobody."""
    locks, pause, begun, told = kernel_locks(), SOON, time.monotonic(), False
    while True:
        try:
            locks.flock(file, how | locks.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() - begun > PATIENCE_SECONDS:
                line = f"{progress.WAITING}{file.name}, which another process holds"
                progress.note(line)
                if not told:
                    say(line)
                told = True
            time.sleep(pause)
            pause = min(2 * pause, LATE)
        else:
            return
