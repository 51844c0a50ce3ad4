"""What a session's weights and texts were when it began, and whether they still are.

The controller leaves them in the report directory; every group holds what it reads to them, so that no report mixes
figures of two texts or two weights under one name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from harness.core.contracts import Checkpoint
from harness.core.errors import HarnessError
from harness.core.files import replace_text
from harness.core.values import parse_json
from harness.inputs.models import folder as weightfiles

FILE = "inputs.json"


def write(folder: Path, inputs: Mapping[str, str]) -> None:
    """Leave them in a report directory."""
    replace_text(folder / FILE, json.dumps(dict(inputs), indent=1, sort_keys=True) + "\n")


def read(folder: Path) -> dict[str, str]:
    """What was left there; {} where nobody prepared, or where it cannot be read: then nothing is held."""
    try:
        return {str(name): str(value) for name, value in parse_json((folder / FILE).read_bytes()).items()}
    except (OSError, ValueError, AttributeError):
        return {}


def files(model: str) -> str:
    """The entry of a model's files."""
    return f"files of {model}"


class Inputs:
    """What one process finds, held to what the session began with."""

    def __init__(self, began: Mapping[str, str]) -> None:
        self.began = began
        self.found: dict[str, str] = {}

    def hold(self, what: str, found: str) -> None:
        """Note what an input is; HarnessError where the session began with another one."""
        self.found[what] = found
        if self.began.get(what, found) != found:
            raise HarnessError(f"the {what} changed while the session ran: go on with --resume")

    def see(self, model: str, directory: Path) -> bool:
        """Note the state of a model's files; whether it is the one that the session began with."""
        self.found[files(model)] = weightfiles.stamp(directory)
        return self.began.get(files(model)) == self.found[files(model)]

    def checkpoint(self, materialise: Callable[[], Checkpoint]) -> Checkpoint:
        """The model's folder, held to the weights that the session began with."""
        found = materialise()
        if not self.see(found.specification, found.directory):
            found = materialise()  # hashed anew: the files may have changed while they were hashed
        self.hold(f"weights of {found.specification}", found.revision)
        return found

    def untouched(self, checkpoint: Checkpoint) -> None:
        """HarnessError where a model's files were written to since they were seen."""
        name = files(checkpoint.specification)
        if weightfiles.stamp(checkpoint.directory) != self.found[name]:
            raise HarnessError(f"the {name} changed while they were in use: go on with --resume")
