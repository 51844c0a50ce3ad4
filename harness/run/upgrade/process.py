"""A side's process and the driver's end of it. No torch here: groups are processes of their own.

The process measures what the driver asks for, under the side's own interpreter and packages. It is the controller of a
session as pytest would be (the same `Session`, one child process a group), with a pipe in pytest's place; it is
started by `Remote` and ends when the pipe does.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import harness
from harness.core.errors import HarnessError
from harness.core.options import Options
from harness.judge.baselines import now
from harness.run.lifetime import end_with_controller
from harness.run.local import Died, server_environment
from harness.run.session import Session

ENDING_SECONDS = 10  # for a process to end by itself once its pipe is closed
DROPPED = ("VIRTUAL_ENV", "PYTHONHOME", "PYTHONSTARTUP")  # of the running environment


class SideFailed(HarnessError):
    """A request that the side could not answer, and why in one line."""


class SideGone(SideFailed):
    """The side's process ended."""


class Remote:
    """One live side."""

    def __init__(self, python: Path, options: Options, threads: int, log: Path) -> None:
        ours, theirs = socket.socketpair()
        self.log = log
        variables = {name: value for name, value in os.environ.items() if name not in DROPPED}
        variables |= server_environment(threads) | {"PYTHONPATH": str(Path(harness.__file__).parents[1])}
        with theirs, log.open("a", encoding="utf-8") as output:
            output.write(f"-- {now()}: {python}\n")  # what an earlier round said stays above
            output.flush()
            self._begun = output.tell()
            self._process = subprocess.Popen(
                [str(python), "-m", "harness.run.upgrade.process", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=variables,
            )
        self._connection: Any = Connection(ours.detach())
        with contextlib.suppress(OSError):  # a process that has ended already says so at the first request
            self._connection.send((options, threads))

    def ask(self, verb: str, argument: Any, say: Callable[[str], None] = lambda line: None) -> Any:
        """The answer to one request.

        Raises:
            SideGone: the side's process ended.
            SideFailed: it lives, but could not do this: its reason.
            RuntimeError: a bug met there, with its traceback.
        """
        try:
            self._connection.send((verb, argument))
            while True:
                kind, answer = self._connection.recv()
                if kind != "said":
                    break
                say(answer)
        except (EOFError, OSError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(ENDING_SECONDS)
            status = self._process.returncode
            raise SideGone(f"the side's process ended with exit status {status}{self.last_words()}") from error
        if kind == "value":
            return answer
        if kind == "bug":
            raise RuntimeError(answer)
        raise SideFailed(f"{answer}{self.last_words()}" if kind == "died" else str(answer))

    def last_words(self) -> str:
        """The last line that the side printed, in brackets; an import that fails says there what failed."""
        said = self.log.read_bytes()[self._begun :].decode("utf-8", "replace") if self.log.is_file() else ""
        lines = said.strip().splitlines()
        return f" ({lines[-1].strip()[:200]})" if lines else ""

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        try:
            self._process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main() -> int:
    """Answer (verb, argument) with ('value', answer), ('said', line), ('error', line) or ('bug', traceback).

    'prepare' answers with the models' identities, 'check' with a row, its traceback and its world, and 'repetition'
    with seconds and token counts, or behind the last one as 'check' does.
    """
    connection: Any = Connection(int(sys.argv[1]))
    end_with_controller(connection, grace=ENDING_SECONDS)
    options, threads = connection.recv()
    session = Session(options, threads)
    answer: Any
    try:
        while True:
            try:
                verb, argument = connection.recv()
            except (EOFError, OSError):  # a controller that was killed resets the pipe
                return 0
            try:
                if verb == "prepare":
                    session.prepare(argument, lambda line: connection.send(("said", line)))
                    answer = dict(session.runner.identities)
                elif verb == "check":
                    row, trouble = session.check(argument)
                    answer = row, trouble, dict(session.world(row)) if row.environment else {}
                else:
                    reply = session.runner.ask(argument.case, verb, argument)
                    if reply.kind in ("error", "left out"):
                        raise HarnessError(reply.text)
                    if reply.kind == "bug":
                        raise RuntimeError(reply.text)
                    data = dict(reply.data or {})
                    answer = data if reply.row is None else (reply.row, "", data)
                connection.send(("value", answer))
            except HarnessError as error:
                connection.send(("error", str(error)))
            except Died as error:
                connection.send(("died", str(error)))
            except Exception:
                connection.send(("bug", traceback.format_exc()))
    finally:
        session.close()


if __name__ == "__main__":
    sys.exit(main())
