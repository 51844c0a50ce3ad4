"""What groups will take, predicted before any starts: for an engine that places them by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness import arguments, catalog, checkpoints, fits, memory
from harness.contracts import Checkpoint
from harness.errors import HarnessError
from harness.invariants import LAYER
from harness.options import Options
from harness.planning import method_of, missing_packages
from harness.records import Case
from harness.specifications import parse


@dataclass(frozen=True)
class Needs:
    """Predicted bytes by group (`Case.group`), and by model where its plain folder lies."""

    bytes: dict[str, int]
    folders: dict[str, str]


def needs(options: Options, cases: Sequence[Case]) -> Needs:
    """Of every group of the cases; a group that cannot be predicted counts as the reference alone."""
    found = Needs({}, {})
    for model in dict.fromkeys(case.model for case in cases if case.model != LAYER):
        checkpoint = checkpoints.of_session(model, options)
        found.folders[model] = str(checkpoint.directory)
        for case in {case.group: case for case in cases if case.model == model}.values():
            found.bytes[case.group] = group_bytes(case, checkpoint)
    return found


def group_bytes(case: Case, checkpoint: Checkpoint) -> int:
    """The larger of loading the model under its method, and of what is left of it with the reference loaded beside."""
    reference = method_of(parse(case.reference), catalog.methods())
    method = method_of(parse(case.method), catalog.methods())
    config = checkpoints.read_config(checkpoint)
    given = arguments.resolve(parse(case.reference), reference, case.device)
    beside = fits.loading_peak(config, reference, given).bytes
    if case.method == case.reference or missing_packages(method):
        return beside
    try:
        given = arguments.resolve(parse(case.method), method, case.device)
        loading = fits.loading_peak(config, method, given).bytes
        return max(loading, int(memory.predict(config, method, given)["memory.storage"]) + beside)
    except HarnessError:
        return beside  # its cases will say why
