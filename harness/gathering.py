"""Reads report directories side by side, each processor some of them: parsing is most of what a large merge does."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from harness.report.reading import Session, measurements_of, read_report

T = TypeVar("T")
LEAST = 2**25  # bytes of measurements from which it is worth while: a process costs some hundredths of a second


@dataclass(frozen=True)
class Readers:
    """A reader of each folder, in the order in which they are best asked: those that are read here come first.

    A reader gives what `read_report` gives, or raises what it raises.
    """

    sessions: Mapping[Path, Callable[[], Session]]
    pool: ProcessPoolExecutor | None = None  # None where all is little

    def beside(self, work: Callable[..., None], *arguments: Any) -> Callable[[], None]:
        """Start `work` in another process (or do it now); what is given waits for its end and raises its error."""
        with contextlib.suppress(BrokenProcessPool):
            if self.pool:
                return functools.partial(_ended, self.pool.submit(work, *arguments), work, *arguments)
        work(*arguments)
        return lambda: None


@contextlib.contextmanager
def readers(folders: Sequence[Path]) -> Iterator[Readers]:
    """Readers of which most read already, in processes that fork from this one; what a killed one had is read here."""
    shares = dealt({folder: size(folder) for folder in folders}, len(os.sched_getaffinity(0)))
    here = {folder: functools.partial(read_report, folder) for folder in shares[0]}
    if len(shares) == 1:
        yield Readers(here)
        return
    with ProcessPoolExecutor(len(shares) - 1, get_context("fork")) as pool:
        there = {folder: pool.submit(read_report, folder) for share in shares[1:] for folder in share}
        came = {folder: functools.partial(_ended, future, read_report, folder) for folder, future in there.items()}
        yield Readers({**here, **came}, pool)


def dealt(sizes: dict[Path, int], count: int) -> list[list[Path]]:
    """At most so many shares of about equal bytes, none empty, the largest first; one share where it all is little."""
    if sum(sizes.values()) < LEAST:
        return [list(sizes)]
    shares: list[list[Path]] = [[] for _ in range(max(1, min(count, len(sizes))))]
    for folder in sorted(sizes, key=lambda folder: -sizes[folder]):
        min(shares, key=lambda share: sum(map(sizes.__getitem__, share))).append(folder)
    return shares


def size(folder: Path) -> int:
    """Bytes of a directory's measurements, 0 where there are none."""
    lines = measurements_of(folder)
    return lines.stat().st_size if lines.is_file() else 0


def _ended(future: Future[T], work: Callable[..., T], *arguments: Any) -> T:
    try:
        return future.result()
    except BrokenProcessPool:
        return work(*arguments)
