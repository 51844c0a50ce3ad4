"""The stub of the CUDA driver (driver.c), compiled where there is a C compiler, and what makes a process load it."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
import weakref
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("driver.c")
LIBRARY = "libcuda.so.1"
# not taken from the caller, which may be a worker of xdist itself
XDIST = ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID")
HIDDEN = ("CUDA_VISIBLE_DEVICES", "STUB_CARDS", "STUB_MIG", "STUB_FAIL", "STUB_LOG", *XDIST)


class Folder:
    """A temporary folder for as long as this process lives."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="harness-stub-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@functools.cache
def built() -> Folder | None:
    """The folder that holds the library; None without a C compiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    folder = Folder()
    command = [compiler, "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o", str(folder.path / LIBRARY)]
    command.append(str(SOURCE))
    subprocess.run(command, check=True)
    return folder


def variables(
    cards: int, *, log: Path | None = None, fails: str = "", mig: bool = False, visible: str | None = None
) -> dict[str, str]:
    """The variables under which a new process finds the stub in the driver's place.

    They work on processes that start under them: the loader reads LD_LIBRARY_PATH once. The test is skipped where
    nothing can compile the stub, and fails there in CI.

    Args:
        cards: of the machine.
        log: gets a line for each process that starts the driver.
        fails: 'cuInit:999': a call and the status that it answers.
        mig: the cards are partitioned.
        visible: CUDA_VISIBLE_DEVICES; None where it is not set.
    """
    folder = built()
    if folder is None:
        told = "no C compiler (cc, gcc, clang): the stub of the driver cannot be built"
        if os.environ.get("CI") == "true":
            pytest.fail(told)
        pytest.skip(told)
    path = os.pathsep.join(filter(None, (str(folder.path), os.environ.get("LD_LIBRARY_PATH"))))
    chosen = {"STUB_LOG": str(log or ""), "STUB_FAIL": fails, "STUB_MIG": "1" if mig else ""}
    found = {"LD_LIBRARY_PATH": path, "STUB_CARDS": str(cards), **{name: text for name, text in chosen.items() if text}}
    return found if visible is None else {**found, "CUDA_VISIBLE_DEVICES": visible}


def world(found: dict[str, str], **more: str) -> dict[str, str]:
    """The environment of a process under `variables`, nothing of the caller's own cards left in it."""
    return {name: text for name, text in os.environ.items() if name not in HIDDEN} | found | more


def started(log: Path) -> dict[int, set[str]]:
    """By pid of each process that started the driver, CUDA_VISIBLE_DEVICES as it then stood ('(unset)' for none)."""
    found: dict[int, set[str]] = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        pid, _, visible = line.partition(" ")
        found.setdefault(int(pid), set()).add(visible)
    return found
