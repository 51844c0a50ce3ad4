"""What lies in the harness's cache, how much it takes, and how to let go of it. No torch."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.core.errors import HarnessError
from harness.core.files import cache_dir, owned, timing_lock

DAY = 86_400.0  # seconds
KINDS = {  # folder of the cache: whether each folder in it is an entry of its own, and what is lost with it
    "checkpoints": (
        True,
        "models converted to a plain folder; made again from what they came from",
    ),
    "environments": (True, "a package's version each, for `upgrade`; installed again"),
    "identities": (False, "what a model folder was found to be; read again from its files"),
    "numba": (False, "compiled loops; compiled again, half a minute"),
    "ray": (False, "what came from other nodes of a cluster; sent again"),
    "scratch": (False, "files of runs that were killed"),
    "verified": (False, "which files of the Hub's cache were hashed; hashed again"),
}


@dataclass(frozen=True)
class Cached:
    """A part of the cache.

    name: where it lies, from the cache's folder. size: bytes of its files. used: when one of them was last read or
    written, seconds since the epoch; a file system that keeps no such times (noatime) tells the writing alone.
    """

    name: str
    size: int
    used: float

    @property
    def idle_days(self) -> float:
        """Days since it was used."""
        return max(0.0, time.time() - self.used) / DAY


def entries() -> list[Cached]:
    """Every part that holds anything, the largest first."""
    home = cache_dir()
    found = [_entry(path) for kind, (single, _) in KINDS.items() for path in _parts(home / kind, single)]
    return sorted((entry for entry in found if entry.size), key=lambda entry: -entry.size)


def _parts(folder: Path, single: bool) -> Iterator[Path]:
    if folder.is_dir():
        made = (
            path for path in folder.iterdir() if path.is_dir() and path.name[:1] != "."
        )  # a dot: under construction
        yield from made if single else (folder,)


def _entry(path: Path) -> Cached:
    states = [file.lstat() for file in path.rglob("*") if not file.is_dir()]
    used = max((max(state.st_atime, state.st_mtime) for state in states), default=0.0)
    return Cached(str(path.relative_to(cache_dir())), sum(state.st_size for state in states), used)


def prune(idle_days: float) -> list[Cached]:
    """Delete what was not used for so many days; what was deleted. Nothing that cannot be made again lies in a cache.

    What another process is making just now stays: whoever makes a folder holds the lock of its name.

    Raises:
        HarnessError: something is being measured on this machine, which may read any of it.
    """
    home = cache_dir()
    if not home.is_dir():
        return []
    measuring = owned(timing_lock())
    if measuring is None:
        raise HarnessError("a run measures on this machine, and may read what would be deleted: wait for its end")
    with measuring:
        idle = [entry for entry in entries() if entry.idle_days >= idle_days]
        return [entry for entry in idle if _deleted(home / entry.name)]


def _deleted(folder: Path) -> bool:
    """Delete a part, unless somebody holds the lock beside it."""
    with contextlib.ExitStack() as stack:
        if folder.parent != cache_dir():  # an entry of its own, see KINDS
            making = owned(folder.with_name(f"{folder.name}.lock"))
            if making is None:
                return False
            stack.enter_context(making)
        shutil.rmtree(folder)
    return True
