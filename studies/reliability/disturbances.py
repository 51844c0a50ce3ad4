"""The faults: what each one does to a running session, and how the user undoes it before `--resume`.

An act gets the trial (scene, running session, random numbers) at the drawn moment, and returns a note of what it hit.
It raises `Impossible` where this machine does not allow it.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from studies.reliability.scene import Scene, Session
from studies.scale import ray_cluster

MIB = 2**20
DISK = 8 * MIB  # bytes of the small file systems: what a whole session writes takes a quarter of it
FORK_SERVER = "multiprocessing.forkserver"  # in its command line, which its children inherit
CLOCK_JUMPS = (-86400 * 365, -3600, -61, 61, 3600, 86400 * 365)  # seconds
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
EVERYBODY = "the whole session"
PHASES = ("starting", "preparing", "measuring", "writing")  # when signals come: `campaign.drawn_moment`
ENGINES = {"one process": (), "two workers": ("-n", "2"), "Ray": ("--engine", "ray")}  # name: arguments


class Impossible(Exception):
    """This machine does not allow the fault."""


@dataclass
class Stage:
    """What an act works on."""

    scene: Scene
    session: Session
    draw: random.Random
    undo: list[Callable[[], object]] = field(default_factory=list)  # what the user repairs before --resume
    others: list[Session] = field(default_factory=list)  # sessions beside the first
    node: Any = None  # the second node of a Ray cluster
    checks: list[Callable[[], str]] = field(default_factory=list)  # of what the sessions left: '' or what is wrong
    spoiled: set[str] = field(default_factory=set)  # cases whose finished rows must not be kept


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        name: in the page's table.
        act: done to a running session.
        variant: of the scene.
        arguments: of the session, beside the scene's own.
        disk: the folder that lies on a small file system of its own, '' for none.
        begun: whether the session has looked at its inputs before: what changes earlier is simply what it measures.
        phase: of the session, in which it comes; '' for any time.
        ray: "own" (the session starts a Ray of its own), "cluster" (of two nodes), "" without Ray.
        cache: False: the session starts without the trained model; None: either, drawn.
    """

    name: str
    act: Callable[[Stage], str]
    variant: str = "cached"
    arguments: tuple[str, ...] = ()
    disk: str = ""
    begun: bool = False
    ray: str = ""
    phase: str = ""
    cache: bool | None = True


# processes


def command_of(process: psutil.Process) -> str:
    """Its command line, '' where it is gone."""
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def fork_servers(session: Session) -> list[psutil.Process]:
    """The fork servers of a session, themselves children of the controller or of workers."""
    inside = groups(session)
    return [one for one in session.tree() if FORK_SERVER in command_of(one) and one not in inside]


def groups(session: Session) -> list[psutil.Process]:
    """The processes that hold a model: children of fork servers."""
    found: list[psutil.Process] = []
    for process in session.tree():
        with contextlib.suppress(psutil.Error):
            parent = process.parent()
            if parent is not None and FORK_SERVER in command_of(parent):
                found.append(process)
    return found


def workers(session: Session) -> list[psutil.Process]:
    """Workers of xdist: children of the controller that execnet started."""
    found: list[psutil.Process] = []
    for process in session.tree():
        with contextlib.suppress(psutil.Error):
            if process.ppid() == session.process.pid and "exec(eval(" in command_of(process):
                found.append(process)
    return found


def ray_workers(session: Session) -> list[psutil.Process]:
    """Ray's workers with a group in hand, which stands in their title."""
    return [one for one in session.tree() if command_of(one).startswith("ray::measure_group")]


def kill_node(stage: Stage) -> str:
    """SIGKILL to every process of the second node at once."""
    found = ray_cluster.processes(stage.node)
    busy = ray_cluster.measuring(found)
    ray_cluster.kill(found)
    return f"a Ray node killed, {busy} groups in hand"


def killing(name: str, find: Callable[[Session], list[psutil.Process]]) -> Callable[[Stage], str]:
    """SIGKILL to one of the processes found, drawn."""
    return _drawn(name, find, psutil.Process.kill, "killed")


def stopping(name: str, find: Callable[[Session], list[psutil.Process]]) -> Callable[[Stage], str]:
    """SIGSTOP to one of the processes found, drawn: it answers nothing more and does not end."""
    return _drawn(name, find, psutil.Process.suspend, "stopped")


def _drawn(
    name: str, find: Callable[[Session], list[psutil.Process]], do: Callable[[psutil.Process], None], done: str
) -> Callable[[Stage], str]:
    def act(stage: Stage) -> str:
        found = find(stage.session)
        if not found:
            return f"no {name} was alive"
        with contextlib.suppress(psutil.Error):
            do(stage.draw.choice(found))
        return f"a {name} {done}"

    return act


def send_signal(stage: Stage) -> str:
    """One of SIGNALS to the controller alone or, as a terminal and a batch system do it, to every process."""
    number, alone = stage.draw.choice(SIGNALS), stage.draw.random() < 0.5
    if stage.session.process.poll() is not None:
        return "no session was left"
    with contextlib.suppress(ProcessLookupError):
        (os.kill if alone else os.killpg)(stage.session.process.pid, number)
    return f"{number.name} to {'the controller' if alone else EVERYBODY}"


def kill_controller(stage: Stage) -> str:
    stage.session.process.kill()
    return "the controller killed"


def cap_memory(stage: Stage) -> str:
    """Cap the address space of the fork server and its children a little above what they have."""
    servers = fork_servers(stage.session)
    spare, capped = stage.draw.randrange(0, 48 * MIB), 0
    for process in (*servers, *groups(stage.session)):
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            limit = process.memory_info().vms + spare
            resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))
            capped += 1
    return f"{capped} processes capped at {spare / MIB:.0f} MiB more than they had"


# disks


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of its own under `folder`, what lay there copied into it."""
    held = folder.with_name(f"{folder.name}-held")
    if folder.exists():
        folder.rename(held)
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Impossible(f"mount: {done.stderr.strip()}")
    try:
        if held.exists():
            shutil.copytree(held, folder, dirs_exist_ok=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(name: str) -> Callable[[Stage], str]:
    """Fill the disk under a folder to the last byte, or to a few pages before it."""

    def act(stage: Stage) -> str:
        filler = stage.scene.folder / name / "filler.bin"
        spare = stage.draw.choice((0, 0, 4096, 16384))
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)
        if spare:
            os.truncate(filler, max(0, filler.stat().st_size - spare))
        stage.undo.append(lambda: filler.unlink(missing_ok=True))
        return f"the disk under {name} filled, {spare} bytes left"

    return act


# damaged files


def damage(path: Path, draw: random.Random, *, torn: bool | None = None) -> str:
    """Cut a file short, or flip one bit of one byte, in place."""
    data = bytearray(path.read_bytes())
    if not data:
        return f"{path.name} was empty"
    torn = draw.random() < 0.5 if torn is None else torn
    if torn:
        del data[draw.randrange(len(data)) :]
    else:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()
    return f"{path.name} {'cut short' if torn else 'a bit flipped'}"


def damaging(*patterns: str, repaired: bool = False) -> Callable[[Stage], str]:
    """Damage one of the scene's files that match; `repaired`: the user brings it back before `--resume`."""

    def act(stage: Stage) -> str:
        found = [path for pattern in patterns for path in sorted(stage.scene.folder.glob(pattern)) if path.is_file()]
        if not found:
            return "no such file was there yet"
        path = stage.draw.choice(found)
        before = path.read_bytes()
        if repaired:
            stage.undo.append(lambda: path.write_bytes(before))
        return damage(path, stage.draw)

    return act


def change_text(stage: Stage) -> str:
    """Another text under the same name, written in place; the user brings the old one back."""
    path = stage.scene.folder / "text.txt"
    before = path.read_text()
    words = before.split()
    stage.draw.shuffle(words)
    path.write_text(" ".join(words))
    stage.undo.append(lambda: path.write_text(before))
    return "text.txt overwritten"


def change_weights(stage: Stage) -> str:
    """Other weights under the same name, in place or renamed over; the user brings the old ones back."""
    path = stage.scene.folder / "model" / "model.safetensors"
    before = path.read_bytes()
    data = bytearray(before)
    for _ in range(64):
        data[stage.draw.randrange(len(data) // 2, len(data))] ^= 1 << stage.draw.randrange(8)
    in_place = stage.draw.random() < 0.5
    target = path if in_place else path.with_suffix(".new")
    target.write_bytes(data)
    if not in_place:
        target.replace(path)
    stage.undo.append(lambda: path.write_bytes(before))
    return f"model.safetensors {'overwritten' if in_place else 'replaced'}"


# others


def second_session(stage: Stage) -> str:
    """Another session on the same report directory (and cache)."""
    stage.others.append(stage.scene.start(*stage.draw.choice(((), ("--resume",)))))
    return "a second session in the same report directory"


def second_cache_user(stage: Stage) -> str:
    """Another session with a report of its own on the same cache."""
    stage.others.append(stage.scene.start("--report-dir", "report-2"))
    return "a second session on the same cache"


def second_recorder(stage: Stage) -> str:
    """Another session that records, into the same files of baselines, figures under another protocol."""
    stage.others.append(stage.scene.start("--report-dir", "report-2", "--regen-all", "--protocols", "chunk:128"))
    stage.checks.append(lambda: unrecorded(stage.scene.baselines))
    return "a second session that records"


def unrecorded(baselines: Path) -> str:
    """What two recorders lost: entries of either protocol, or losses that an entry names; '' where nothing is lost."""
    for path in sorted(baselines.glob("*/*@*.yaml")):
        text = path.read_text()
        for protocol in ("chunk:128", "chunk:256"):
            if "perplexity" in text and protocol not in text:
                return f"{path.name} lost what was recorded under {protocol}"
        for sha in re.findall(r"\b[0-9a-f]{64}\b", " ".join(re.findall(r"nll: .*", text))):
            if not (path.parent / "nll" / f"{sha}.npz").is_file():
                return f"{path.name} names losses {sha[:12]} that are gone"
    return ""


def jump(stage: Stage) -> str:
    seconds = stage.draw.choice(CLOCK_JUMPS)
    stage.scene.clock.write_text(str(seconds))
    return f"the clock off by {seconds} s"


FAULTS = (
    Fault("a group's process is killed", killing("group's process", groups)),
    Fault("the fork server is killed", killing("fork server", fork_servers)),
    Fault("an xdist worker is killed", killing("worker", workers), arguments=("-n", "2")),
    Fault("the controller is killed", kill_controller, cache=None),
    Fault("the controller of two workers is killed", kill_controller, arguments=("-n", "2")),
    Fault("a Ray worker is killed", killing("Ray worker", ray_workers), arguments=("--engine", "ray"), ray="own"),
    Fault("a Ray node is killed", kill_node, arguments=("--engine", "ray"), ray="cluster"),
    Fault("memory is capped", cap_memory),
    Fault("the disk under the report fills up", fill("report"), disk="report"),
    Fault("the disk under the cache fills up", fill("cache"), disk="cache", cache=None),
    Fault("the disk under the baselines fills up", fill("baselines"), arguments=("--regen-all",), disk="baselines"),
    Fault("a cached checkpoint is damaged", damaging("cache/checkpoints/gguf-*/*")),
    Fault("an NLL file is damaged", damaging("report/nll/*.npz", "report/nll/reference-*")),
    Fault("a baseline is damaged", damaging("baselines/*/*.yaml", "baselines/*/nll/*.npz", repaired=True)),
    Fault("a measurements line is damaged", damaging("report/measurements.jsonl")),
    Fault("a table of the report is damaged", damaging("report/*.json")),
    Fault("two sessions share a report directory", second_session),
    Fault("two sessions share a cache", second_cache_user, cache=None),
    Fault("the clock jumps", jump),
    Fault("the text changes under a session", change_text, variant="own", begun=True),
    Fault("the weights change under a session", change_weights, variant="own", begun=True),
)
LATER = (  # kinds that joined after the campaign's numbers were given out
    Fault("a group's process hangs", stopping("group's process", groups), arguments=("--progress-timeout", "1")),
    Fault("the fork server hangs", stopping("fork server", fork_servers), arguments=("--progress-timeout", "1")),
    Fault("a cached loop is damaged", damaging("cache/numba/*/*")),
    Fault("two sessions record baselines at once", second_recorder, arguments=("--regen-all",)),
)
SIGNALLED = tuple(
    Fault(
        f"{phase}, {engine}",
        send_signal,
        arguments=arguments,
        ray="own" if engine == "Ray" else "",
        phase=phase,
        cache=phase != "preparing",  # without it a model is trained
    )
    for engine, arguments in ENGINES.items()
    for phase in PHASES
)
