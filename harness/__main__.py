"""`python -m harness COMMAND`: what needs no pytest. Each command is a module of `commands`; torch stays out
unless the command needs it.

Exit status: 0 fine, 1 harm, 2 usage, 3 undecided.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.core.errors import HarnessError
from harness.core.options import read_declared
from harness.run import commands

USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a HarnessError is one line and exit status 2."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m harness", description=commands.__doc__)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    names = sorted(info.name for info in pkgutil.iter_modules(commands.__path__))
    for name in given[:1] if given and given[0] in names else names:  # one command's imports, where it is named
        importlib.import_module(f"harness.run.commands.{name}").add(subparsers)
    parsed = parser.parse_args(given)
    try:
        declared = read_declared(Path.cwd())[1]
        if declared.methods or declared.metrics or declared.models or declared.datasets:
            from harness.run import project

            project.open_to(declared)
        status: int = parsed.run(parsed)
    except HarnessError as error:
        print(f"python -m harness {parsed.command}: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:
        return 0
    return status


if __name__ == "__main__":
    sys.exit(main())
