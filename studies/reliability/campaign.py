"""One trial: a session is disturbed at a random moment, then resumed undisturbed; what must hold is checked."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import random
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from harness.core.errors import HarnessError
from harness.core.records import Row
from harness.judge import baselines
from harness.run import merge
from studies.reliability.disturbances import EVERYBODY, FAULTS, SIGNALS, Fault, Impossible, Stage, small_disk
from studies.reliability.scene import LIMIT_SECONDS, SETTLE_SECONDS, Scene, Session, Template
from studies.scale import ray_cluster

USAGE = 4  # pytest's exit status for a refusal; a signal that nobody handled gives a negative one
ALLOWED = (0, 1, USAGE, -signal.SIGKILL)  # of a session that ended by itself or was killed
ENDED = (2, 129, 143)  # of one that a signal ended, with a report
SIGNALLED_ENDS = (*ALLOWED, *ENDED, *(-number for number in SIGNALS))
JUDGED = ("verdict", "verdict_reference", "verdict_baseline", "reason")
START, TAKEN = -1, -2  # moments before the first row
POLL_SECONDS = 0.02
TRACES = ("Traceback (most recent call last)", "INTERNALERROR")
TEMPORARY = ("report/.*", "report/nll/.*", "cache/checkpoints/.*", "baselines/.*", "baselines/*/.*")
SCRATCH = "tmp/harness-*"  # a killed controller's or worker's log stays in the system's temporary folder


@dataclass
class Trial:
    """What happened, as it is kept: JSON."""

    number: int
    fault: str
    moment: str
    note: str = ""  # what the fault hit
    possible: bool = True
    first: dict[str, int] = field(default_factory=dict)  # rows measured and missing when the disturbed session was over
    repeated: int = 0  # finished cases that --resume measured again because what they rest on was damaged
    exits: list[int] = field(default_factory=list)  # exit statuses of all sessions
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)  # what did not hold


def run(number: int, seed: int, fault: Fault, template: Template, home: Path) -> Trial:
    """One trial; equal numbers and seeds draw equal moments and places."""
    draw, started = random.Random(f"{seed}/{number}"), time.monotonic()
    after, delay = drawn_moment(draw, fault, len(template.rows))
    awaited = {TAKEN: "the report directory was taken", START: "the start", 0: "the plan"}
    trial = Trial(number, fault.name, f"{delay} s after {awaited.get(after, f'row {after}')}")
    cache = draw.random() < 0.5 if fault.cache is None else fault.cache
    with template.copy(home / f"trial-{number}", with_cache=cache) as scene, contextlib.ExitStack() as stack:
        try:
            if fault.disk:
                stack.enter_context(small_disk(scene.folder / fault.disk))
            arguments, node = stack.enter_context(ray_of(fault, scene))
        except Impossible as error:
            trial.possible, trial.note = False, str(error)
            return trial
        stage = Stage(scene, scene.start(*arguments), draw, node=node)
        await_moment(stage, after, delay)
        trial.note = fault.act(stage)
        disturbed(trial, stage, template, judged="baseline" not in fault.name, phase=fault.phase)
        resumed(trial, stage, template, fault, arguments)
        trial.exits = [session.process.returncode for session in scene.sessions]
        if trial.wrong:
            keep_logs(scene, home / "failed" / f"trial-{number}")
    trial.seconds = round(time.monotonic() - started, 1)
    return trial


def drawn_moment(draw: random.Random, fault: Fault, rows: int) -> tuple[int, float]:
    """Behind how many rows (or START, TAKEN, 0: the plan) a fault comes, and how many seconds later."""
    if not fault.phase:
        after, longest = draw.randrange(0 if fault.begun else START, rows), 3 if draw.random() < 0.4 else 0.4
    elif fault.phase == "measuring":
        after, longest = draw.randrange(rows - 1), 1.0
    else:
        after, longest = {"starting": (START, 2.0), "preparing": (TAKEN, 4.0), "writing": (rows, 0.6)}[fault.phase]
    return after, round(draw.uniform(0, longest), 3)


@contextlib.contextmanager
def ray_of(fault: Fault, scene: Scene) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The session's arguments, and the second node of its cluster, which ends with the trial."""
    if fault.ray and importlib.util.find_spec("ray") is None:
        raise Impossible("Ray is not installed: pip install ray")
    if fault.ray != "cluster":
        yield fault.arguments, None
        return
    with ray_cluster.cluster(scene.cache, scene.cache) as (address, node):
        yield (*fault.arguments, "--ray-address", address), node


def await_moment(stage: Stage, after: int, delay: float) -> None:
    """Wait until so many rows are written (0: the plan is) and a little longer, or the session is over."""
    report = stage.scene.report
    plan, path = report / "plan.json", report / "measurements.jsonl"

    def reached() -> bool:
        if after == TAKEN:
            return (report / ".session.lock").is_file()
        if after <= 0:
            return after == START or plan.is_file()
        return path.is_file() and path.read_bytes().count(b"\n") >= after

    polls = int(LIMIT_SECONDS / POLL_SECONDS)
    while stage.session.process.poll() is None and not reached() and polls:
        time.sleep(POLL_SECONDS)
        polls -= 1
    time.sleep(delay)


def disturbed(trial: Trial, stage: Stage, template: Template, *, judged: bool, phase: str) -> None:
    """Let every session end and hold what they left to what must be true of a disturbed session.

    `judged`: verdicts must be the undisturbed ones too, which they cannot be under another baseline. `phase`: of the
    signal, where one came; before handlers stand it ends the session as it ends any program.
    """
    sessions = [stage.session, *stage.others]
    statuses = [session.wait() for session in sessions]
    for session, status in zip(sessions, statuses, strict=True):
        over(trial, session, status, SIGNALLED_ENDS if phase else ALLOWED)
    rows = stage.scene.rows()
    trial.first = {
        "measured": sum(row.value is not None for row in rows.values()),
        "missing": sum(row.value is None for row in rows.values()),
    }
    compare(trial, rows, template, "the disturbed session", judged=judged)
    trial.wrong += [wrong for check in stage.checks if (wrong := check())]
    begun = (stage.scene.report / "plan.json").is_file()
    if min(statuses) < 0 or all(status == USAGE for status in statuses) or (phase and not begun):
        return  # killed, or over before it measured anything: the user resumes
    if statuses[0] in ENDED and not (stage.scene.report / "report.md").is_file():
        trial.wrong.append(f"status {statuses[0]} and no report")
    told = "could not be written" in stage.session.output or "cannot be written" in stage.session.output
    absent = template.rows.keys() - rows.keys()
    # the file was damaged behind the last writing of it: the session told of every case, --resume measures again
    behind = "measurements" in trial.note and f"{len(template.rows)} ran, 0 missing" in stage.session.output
    if absent and not behind and not (told and 1 in statuses):
        trial.wrong.append(f"{len(absent)} planned cases have no row and nothing was said: {min(absent)}")
    trial.wrong += [
        f"{name} is missing without a reason" for name, row in rows.items() if row.value is None and not row.reason
    ]


def over(trial: Trial, session: Session, status: int, allowed: Sequence[int] = ALLOWED) -> None:
    """How a session may end: by itself, in time, without a traceback, leaving no process."""
    name = session.log.stem
    if session.hung:
        trial.wrong.append(f"{name} hung")
        return
    if status not in allowed:
        trial.wrong.append(f"{name} ended with status {status}")
    if status == USAGE and "ERROR: " not in session.output:
        trial.wrong.append(f"{name} refused without a line")
    if EVERYBODY not in trial.note and "starting" not in trial.fault:  # Python and execnet tell where they were
        trial.wrong += [f"{name} printed {text!r}" for text in TRACES if text in session.output]
    tries = 10 * SETTLE_SECONDS
    while (left := alive(session.process.pid)) and tries:
        time.sleep(0.1)
        tries -= 1
    if left:
        trial.wrong.append(f"{name} left {len(left)} processes behind")


def alive(group: int) -> list[int]:
    """Living processes of a session's process group, zombies left out."""
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def compare(trial: Trial, rows: dict[str, Row], template: Template, where: str, *, judged: bool = True) -> None:
    """Every figure that was measured is the undisturbed one, and its verdict."""
    for name, row in rows.items():
        expected = template.rows.get(name)
        if expected is None:
            trial.wrong.append(f"{where} has a row of a case that was not planned: {name}")
        elif row.value is not None:
            row = row if judged else replace(row, **{field: getattr(expected, field) for field in JUDGED})
            try:
                merge.agree((expected, Path("undisturbed")), (row, Path(where)))
            except HarnessError as error:
                trial.wrong.append(str(error))


def resumed(trial: Trial, stage: Stage, template: Template, fault: Fault, arguments: Sequence[str]) -> None:
    """Undo, resume, and hold the result to the undisturbed session's."""
    scene = stage.scene
    for undo in stage.undo:
        undo()
    before = scene.rows()
    session = scene.start("--resume", *arguments)
    status = session.wait()
    over(trial, session, status)
    if status:
        trial.wrong.append(f"--resume ended with status {status}: {last_line(session)}")
    rows = scene.rows()
    trial.wrong += [
        f"after --resume there is no figure of {name}" for name in template.rows if not measured(rows, name)
    ]
    compare(trial, rows, template, "the resumed session")
    repeated = [name for name, row in before.items() if row.value is not None and work(row) != work(rows.get(name))]
    trial.repeated = len(repeated)
    if repeated and not fault.name.endswith("damaged"):
        trial.wrong.append(f"--resume measured {len(repeated)} finished cases again: {repeated[0]}")
    killed = "controller" in fault.name or "worker" in fault.name or bool(fault.phase)
    trial.wrong += [f"left behind: {path}" for path in leftovers(scene, TEMPORARY if killed else (*TEMPORARY, SCRATCH))]
    trial.wrong += [
        f"still locked: {path.name}" for path in scene.folder.rglob("*lock*") if path.is_file() and held(path)
    ]
    try:
        baselines.validate(scene.baselines)
    except HarnessError as error:
        trial.wrong.append(f"the baselines cannot be read: {error}")


def measured(rows: dict[str, Row], name: str) -> bool:
    """Whether a case has a figure."""
    return name in rows and rows[name].value is not None


def work(row: Row | None) -> Any:
    """What changes when a case is measured again: how long it took, and what is unsteady in it."""
    return row and (row.value, row.seconds, row.detail.get("process_bytes"))


def leftovers(scene: Scene, patterns: Sequence[str]) -> Iterator[str]:
    """Files that a session should have taken away; empty lock files stay by design."""
    for pattern in patterns:
        for path in scene.folder.glob(pattern):
            if not path.name.endswith((".lock", ".turnstile")):
                yield str(path.relative_to(scene.folder))


def held(path: Path) -> bool:
    """Whether somebody holds a lock on the file."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def last_line(session: Session) -> str:
    lines = [line for line in session.output.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def keep_logs(scene: Scene, folder: Path) -> None:
    """What a failed trial printed, for whoever looks into it."""
    folder.mkdir(parents=True, exist_ok=True)
    for session in scene.sessions:
        (folder / session.log.name).write_text(session.output)


def order(trials: int, seed: int, kinds: Sequence[Fault] = FAULTS) -> list[Fault]:
    """Every kind equally often, in a drawn order."""
    faults = [kinds[number % len(kinds)] for number in range(trials)]
    random.Random(seed).shuffle(faults)
    return faults


def as_dict(trial: Trial) -> dict[str, Any]:
    """JSON."""
    return asdict(trial)
