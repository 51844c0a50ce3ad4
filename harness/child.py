"""The group's process: answers measure requests through a pipe until the other end is gone.

Forked from a server that has imported torch but loaded no model, touched no device and started no thread pool,
so that a segfault or the kernel's out-of-memory killer takes down one group and nothing else.
"""

from __future__ import annotations

import ctypes
import os
import signal
import traceback
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers.models.gpt2.modeling_gpt2  # this, the next and tiny: so that the fork server imports them, once
import transformers.models.llama.modeling_llama  # noqa: F401

from harness import bnb, cachefolders, checkpoints, needs, probe, strangers, tiny, turns, weightfiles  # noqa: F401
from harness.errors import HarnessError
from harness.group import CODE, Group
from harness.inputs import files
from harness.invariants import LAYER
from harness.layergroup import LayerGroup
from harness.messages import Job, Reply
from harness.records import Case

CONSULTED = ("prepare", "needs", "code")


def prepare(job: Job, cases: list[Case], connection: Connection) -> dict[str, str]:
    """Make every checkpoint and token plan that the cases need, so that what cannot be is said before measuring.

    Returns what identifies each: a group that finds something else later refuses to measure.
    """

    def say(line: str) -> None:
        connection.send(Reply("said", text=line))

    options, inputs = job.options, dict[str, str]()
    for model in dict.fromkeys(case.model for case in cases if case.model != LAYER):
        checkpoint = checkpoints.of_session(model, options, say, verify=True)
        seen = weightfiles.stamp(checkpoint.directory)  # before the group hashes them
        first = next(case for case in cases if case.model == model)
        group = Group(Job(options, model, first.method, "cpu", job.reference, job.threads, job.log), connection)
        for dataset, protocol in dict.fromkeys((case.dataset, case.protocol) for case in cases if case.dataset):
            group.plan_of(dataset, protocol)
        inputs |= {**group.inputs.found, files(model): seen}
    return inputs


def consulted(job: Job, verb: str, argument: Any, connection: Connection) -> Reply:
    """What needs no group: making ready, what groups will take, and which code this process runs."""
    if verb == "needs":
        return Reply("needs", data=vars(needs.needs(job.options, argument)))
    if verb == "code":
        return Reply("code", text=CODE)
    return Reply("done", data=prepare(job, argument, connection))


def begun(job: Job, connection: Connection) -> Group | LayerGroup:
    """The group; HarnessError where this process was forked from one that had started CUDA, which it then cannot."""
    if job.device == "cuda" and torch.cuda._is_in_bad_fork() and probe.cuda_devices():
        raise HarnessError(
            "CUDA was initialised before this process was forked: something that every Python of this environment "
            "imports at its start (sitecustomize, a .pth file) asks for a card; take it out"
        )
    return LayerGroup(job) if job.model == LAYER else Group(job, connection)


def answered(group: Group | LayerGroup, verb: str, argument: Any) -> Reply:
    """What a living group answers: a key, one turn of a timing, or a row."""
    if verb == "key":
        return Reply("key", text=group.key(*argument))
    if verb == "turn" and isinstance(group, Group):
        return turns.answer(group, argument)
    if verb == "reference" and isinstance(group, Group):
        group.compute_reference(argument)
        return Reply("done")
    row = group.measure(*argument)
    kind, _ = strangers.blamed(RuntimeError(row.detail.get("exception", "")))  # a finding of an invariant's
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
                reply = told(error)
            connection.send(reply)
            if reply.blamed == strangers.DEVICE:
                return


def told(error: Exception) -> Reply:
    """What went wrong: one line where the user or the machine is to blame, else a traceback."""
    text = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, HarnessError):
        return Reply("error", text=str(error))
    kind, line = strangers.blamed(error)
    if kind:
        return Reply("error", text=strangers.told(kind, line), blamed=kind)
    if cachefolders.no_room(error):
        return Reply("error", text=f"a disk is full or cannot be written ({text}): make room, then --resume")
    return Reply("bug", text="".join(traceback.format_exception(error)))
