"""What a session's weights and texts were when it began, and whether they still are.

The controller tells them to every group's process, which holds what it reads to them: no report mixes figures of two
texts or two weights under one name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from harness.core.contracts import Checkpoint
from harness.core.errors import HarnessError
from harness.core.identity import identity_of
from harness.inputs.models import folder

STAMPS = "files of"  # entries that hold on one machine: sizes, times and inodes


def files(model: str) -> str:
    """The entry of a model's files."""
    return f"{STAMPS} {model}"


def protocol_of(dataset: str, protocol: str, model: str) -> str:
    """The entry of how a text is read for a model, in full: `TokenPlan.protocol_id`."""
    return f"reading of {dataset} under {protocol} for {model}"


def portable(inputs: Mapping[str, str]) -> dict[str, str]:
    """Those of a session's inputs that hold on other machines too: what files contain, not where and when."""
    return {name: value for name, value in inputs.items() if not name.startswith(STAMPS)}


class StartInputs:
    """What one process reads, held to what the session began with."""

    def __init__(self, began: Mapping[str, str]) -> None:
        self.began = began
        self.seen: dict[str, str] = {}

    def hold(self, what: str, value: str) -> None:
        """Note what an input is; HarnessError where the session began with another one."""
        self.seen[what] = value
        if self.began.get(what, value) != value:
            raise HarnessError(f"the {what} changed while the session ran: go on with --resume")

    def checkpoint(self, materialise: Callable[[], Checkpoint]) -> Checkpoint:
        """The model's folder, held to what the session began with."""
        checkpoint = materialise()
        name = files(checkpoint.specification)
        self.seen[name] = folder.stamp(checkpoint.directory)
        if self.began.get(name) != self.seen[name]:
            checkpoint = materialise()  # hashed anew: the files may have changed while they were hashed
        self.hold(f"weights of {checkpoint.specification}", checkpoint.revision)
        self.hold(f"config, tokenizer or code of {checkpoint.specification}", identity_of(checkpoint))
        return checkpoint

    def untouched(self, checkpoint: Checkpoint) -> None:
        """HarnessError where a model's files were written to since they were seen; a live module has none."""
        name = files(checkpoint.specification)
        if name in self.seen and folder.stamp(checkpoint.directory) != self.seen[name]:
            raise HarnessError(f"the {name} changed while they were in use: go on with --resume")
