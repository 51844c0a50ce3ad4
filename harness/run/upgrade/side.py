"""One side's process: measures what the driver asks for, under the side's own interpreter and packages.

It is the controller of a session as pytest would be (the same `Session`, one child process a group), with a pipe in
pytest's place. Started by `remote`; ends when the pipe does.
"""

from __future__ import annotations

import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

from harness.core.errors import HarnessError
from harness.run.local import Died
from harness.run.messages import Turn
from harness.run.session import Session


def main() -> int:
    """Answer (verb, argument) with ('value', answer), ('said', line), ('error', line) or ('bug', traceback)."""
    connection: Any = Connection(int(sys.argv[1]))
    options, threads = connection.recv()
    session = Session(options, threads)
    try:
        while True:
            try:
                verb, argument = connection.recv()
            except EOFError:
                return 0
            try:
                connection.send(("value", _answer(session, connection, verb, argument)))
            except HarnessError as error:
                connection.send(("error", str(error)))
            except Died as error:
                connection.send(("died", str(error)))
            except Exception:
                connection.send(("bug", traceback.format_exc()))
    finally:
        session.close()


def _answer(session: Session, connection: Any, verb: str, argument: Any) -> Any:
    if verb == "prepare":
        return session.prepare(argument, lambda line: connection.send(("said", line)))
    if verb == "check":
        row, trouble = session.check(argument)
        return row, trouble, dict(session.world(row)) if row.environment else {}
    return _turn(session, argument)


def _turn(session: Session, turn: Turn) -> Any:
    """Seconds and token counts of one repetition, or the row of a finished timing with its world."""
    reply = session.runner.ask(turn.case, "turn", turn)
    if reply.kind == "row" and reply.row is not None:
        return reply.row, "", dict(reply.data or {})
    if reply.kind == "seconds":
        return dict(reply.data or {})
    if reply.kind == "error":
        raise HarnessError(reply.text)
    raise RuntimeError(reply.text)


if __name__ == "__main__":
    sys.exit(main())
