"""The group's process: answers measure requests through a pipe until the other end is gone.

Forked from a server that has imported torch but loaded no model, touched no device and started no thread pool,
so that a segfault or the kernel's out-of-memory killer takes down one group and nothing else.

What groups will take, predicted before any starts: for an engine that places them by it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers.models.gpt2.modeling_gpt2  # this, the next and tiny: so that the fork server imports them, once
import transformers.models.llama.modeling_llama  # noqa: F401

from harness.core import catalog, errors, gpus
from harness.core.contracts import Checkpoint
from harness.core.errors import HarnessError
from harness.core.options import Options
from harness.core.records import Case
from harness.core.specification import parse
from harness.inputs.models import cache, checkpoints, folder, sizes
from harness.methods.quantizing import arguments, bnb
from harness.metrics.measuring.checks import LAYER
from harness.run.fingerprints import files
from harness.run.group import CODE, Group, LayerGroup
from harness.run.messages import Job, Reply
from harness.run.plan import method_of, missing_packages
from harness.run.upgrade import interleaved

CONSULTED = ("prepare", "needs", "code")


def prepare(job: Job, cases: list[Case], connection: Connection) -> dict[str, str]:
    """Make every checkpoint and token plan that the cases need, so that what cannot be is said before measuring.

    Returns what identifies each: a group that reads something else later refuses to measure.
    """

    def say(line: str) -> None:
        connection.send(Reply("said", text=line))

    options, inputs = job.options, dict[str, str]()
    for model in dict.fromkeys(case.model for case in cases if case.model != LAYER):
        checkpoint = checkpoints.of_session(model, options, say, verify=True)
        seen = folder.stamp(checkpoint.directory)  # before the group hashes them
        first = next(case for case in cases if case.model == model)
        group = Group(Job(options, model, first.method, "cpu", job.reference, job.threads, job.log), connection)
        for dataset, protocol in dict.fromkeys((case.dataset, case.protocol) for case in cases if case.dataset):
            group.plan_of(dataset, protocol)
        inputs |= {**group.inputs.seen, files(model): seen}
    return inputs


def consulted(job: Job, verb: str, argument: Any, connection: Connection) -> Reply:
    """What needs no group: making ready, what groups will take, and which code this process runs."""
    if verb == "needs":
        return Reply("needs", data=vars(needs(job.options, argument)))
    if verb == "code":
        return Reply("code", text=CODE)
    return Reply("done", data=prepare(job, argument, connection))


def begun(job: Job, connection: Connection) -> Group | LayerGroup:
    """The group; HarnessError where this process was forked from one that had started CUDA, which it then cannot."""
    if job.device == "cuda" and torch.cuda._is_in_bad_fork() and gpus.cuda_devices():
        raise HarnessError(
            "CUDA was initialised before this process was forked: something that every Python of this environment "
            "imports at its start (sitecustomize, a .pth file) asks for a card; take it out"
        )
    return LayerGroup(job) if job.model == LAYER else Group(job, connection)


def answered(group: Group | LayerGroup, verb: str, argument: Any) -> Reply:
    """What a living group answers: a key, one repetition of a timing, or a row."""
    if verb == "key":
        return Reply("key", text=group.key(*argument))
    if verb == "repetition" and isinstance(group, Group):
        return interleaved.answer(group, argument)
    if verb == "reference" and isinstance(group, Group):
        group.compute_reference(argument)
        return Reply("done")
    row = group.measure(*argument)
    kind, _ = errors.blamed(RuntimeError(row.detail.get("exception", "")))  # a finding of an invariant's
    return Reply("row", row=row, data=group.environment.to_dict(), blamed=kind)


def serve(job: Job, connection: Connection) -> None:
    """The process's main loop: (verb, argument) in, `Reply` out, until 'close' or the other end is gone.

    Behind a device error it ends: its context is dead, and the controller starts another process for what is left.
    """
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the fork server
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the controller's to handle
    with job.log.open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    group: Group | LayerGroup | None = None
    with bnb.quiet():
        while True:
            try:
                verb, argument = connection.recv()
            except EOFError:
                return
            if verb == "close":
                return
            try:
                if verb in CONSULTED:
                    reply = consulted(job, verb, argument, connection)
                else:
                    group = group or begun(job, connection)
                    reply = answered(group, verb, argument)
            except Exception as error:
                reply = failure(error)
            connection.send(reply)
            if reply.blamed == errors.DEVICE:
                return


def failure(error: Exception) -> Reply:
    """What went wrong: one line where the user or the machine is to blame, else a traceback."""
    text = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, HarnessError):
        return Reply("error", text=str(error))
    kind, line = errors.blamed(error)
    if kind:
        return Reply("error", text=errors.explained(kind, line), blamed=kind)
    if cache.no_room(error):
        return Reply("error", text=f"a disk is full or cannot be written ({text}): make room, then --resume")
    return Reply("bug", text="".join(traceback.format_exception(error)))


@dataclass(frozen=True)
class Needs:
    """Predicted bytes by group (`Case.group`), and by model where its plain folder lies."""

    bytes: dict[str, int]
    folders: dict[str, str]


def needs(options: Options, cases: Sequence[Case]) -> Needs:
    """Of every group of the cases; a group that cannot be predicted counts as the reference alone."""
    predicted = Needs({}, {})
    for model in dict.fromkeys(case.model for case in cases if case.model != LAYER):
        checkpoint = checkpoints.of_session(model, options)
        predicted.folders[model] = str(checkpoint.directory)
        for case in {case.group: case for case in cases if case.model == model}.values():
            predicted.bytes[case.group] = group_bytes(case, checkpoint)
    return predicted


def group_bytes(case: Case, checkpoint: Checkpoint) -> int:
    """The larger of loading the model under its method, and of what is left of it with the reference loaded beside."""
    reference = method_of(parse(case.reference), catalog.methods())
    method = method_of(parse(case.method), catalog.methods())
    config = checkpoints.read_config(checkpoint)
    given = arguments.resolve(parse(case.reference), reference, case.device)
    beside = sizes.loading_peak(config, reference, given).bytes
    if case.method == case.reference or missing_packages(method):
        return beside
    try:
        given = arguments.resolve(parse(case.method), method, case.device)
        loading = sizes.loading_peak(config, method, given).bytes
        return max(loading, int(sizes.predict(config, method, given)["memory.storage"]) + beside)
    except HarnessError:
        return beside  # its cases will say why
