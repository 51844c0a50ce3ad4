"""The driver's side of `--engine ray`: a `Runner` that hands out every group ahead and takes rows as they come.

Ray is imported when it is asked for, started here or joined; every failure is one line. A task asks for processors,
memory and a share of a card, from its group's predicted bytes: pure arithmetic over the nodes that there are. No more
is asked than some node has: a group that is predicted to fit nowhere gets the roomiest node and fails there as it
would on a machine of that size.

pytest asks for one case after another; what came before its turn waits here, flushed already. A task that failed for
good (its tries are used up, its node is lost, it was killed for memory, no node is large enough) leaves each of its
cases a row that says so.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import os
import secrets
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.core import gpus
from harness.core.catalog import member_of
from harness.core.environment import checkout
from harness.core.errors import HarnessError, MissingPackage
from harness.core.files import cache_dir, replace_bytes
from harness.core.options import Options
from harness.core.records import Case, Row
from harness.core.text import MIB
from harness.results.directory import LOSSES
from harness.run import fingerprints
from harness.run.local import Runner, missing
from harness.run.messages import Asked, Stop
from harness.run.plan import models_of
from harness.run.ray.tasks import Came, Depot, Errand, Losses, measure_group, reference_losses
from harness.run.shards import longest_first

RETRIES = 2  # of a task whose worker or node died: with the first try, three
POLL_SECONDS = 2.0
PATIENCE_SECONDS = 60.0  # for a node that is large enough to come (back)
CARD_SECONDS = 60.0  # for a node to say how large its cards are
PROCESS_BYTES = 1 << 30  # of a group's process beside its models: torch by itself 0.5 GB, and a window's activations
SHARE_STEPS = 100  # a card is shared in hundredths
REACH_SECONDS = 10  # for a cluster's port to open
STATUS_SECONDS = 30  # for a cluster to say how it is: Ray itself waits for minutes
STORE_BYTES = 1 << 28  # of the object store of a Ray of our own: losses pass through it, weights do not
# Set before Ray is imported, where the user has not: it reads them once.
VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_task_oom_retries": "2",  # by itself it repeats a task that its memory monitor killed for ever
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # its next default, which it warns of otherwise
}
# The same for a Ray of our own: whoever reaches its ports can run code, so that they are this machine's and ask for a
# token that nobody else has.
OWN = {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # off, Ray keeps to loopback, on Linux too
}
LOOPBACK = "127.0.0.1"
OWN_TOKEN = "RAY_AUTH_TOKEN"
_set: dict[str, str] = {}  # of these, what this process has set


@dataclass(frozen=True)
class Node:
    """A living node of the cluster: all that it has, taken or not; memory in bytes."""

    cpus: float
    memory: float
    gpus: float = 0.0


@dataclass(frozen=True)
class Request:
    """What one task asks for; memory in bytes."""

    cpus: float
    memory: int
    gpus: float = 0.0

    def options(self) -> dict[str, Any]:
        """As Ray's task options."""
        return {"num_cpus": self.cpus, "memory": self.memory, "num_gpus": self.gpus}

    def fits(self, nodes: Sequence[Node]) -> bool:
        """Whether some node could ever hold it."""
        return any(node.cpus >= self.cpus and node.memory >= self.memory and node.gpus >= self.gpus for node in nodes)

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPUs", f"{self.memory / 2**30:.1f} GiB of memory"]
        return ", ".join(parts + ([f"{self.gpus:g} GPUs"] if self.gpus else []))


def request(device: str, predicted: int, *, timed: bool, threads: int, nodes: Sequence[Node], card: int) -> Request:
    """The request of a group on a device, 'cpu' or 'cuda', among the living nodes.

    `predicted` are bytes of its models at their peak and `card` those of the smallest card, 0 where not known;
    `threads` are alike on every node. A `timed` group has a device to itself: the whole node, or a whole card.
    """
    needed = predicted + PROCESS_BYTES
    if device == "cuda":
        share = 1.0
        if card and predicted and not timed:
            share = min(1.0, math.ceil(needed / card * SHARE_STEPS) / SHARE_STEPS)
        host = max((node for node in nodes if node.gpus), key=lambda node: node.memory, default=None)
        return Request(1, min(needed, int(host.memory)) if host else needed, share)
    roomy = [node for node in nodes if node.memory >= needed and node.cpus >= threads]
    if roomy and timed:
        return Request(max(node.cpus for node in roomy), needed)
    if roomy or not nodes:
        return Request(threads, needed)
    best = max(nodes, key=lambda node: (node.memory, node.cpus))
    cpus = best.cpus if timed else min(float(threads), best.cpus)
    return Request(cpus, min(needed, int(best.memory)))


def require() -> None:
    """MissingPackage where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise MissingPackage("ray", "--engine ray")


def connect(address: str | None, threads: int) -> Any:
    """The module `ray`, connected: to the cluster at `address`, or to one of this machine's own with `threads` CPUs.

    Raises:
        HarnessError: no such cluster, or not from here.
    """
    require()
    if address and OWN_TOKEN in _set:
        apart = "a Ray of its own, which keeps to itself"
        raise HarnessError(f"this process has started {apart}: join a cluster from another")
    variables = VARIABLES if address else {**VARIABLES, **OWN, OWN_TOKEN: secrets.token_hex(32)}
    if "ray" in sys.modules:  # it has read the mode; by itself it turns the token on when it starts a cluster
        variables = {name: value for name, value in variables.items() if name != "RAY_AUTH_MODE"}
    _set.update({name: value for name, value in variables.items() if name not in os.environ})
    os.environ.update(_set)
    if address:
        reach(address)
    with warnings.catch_warnings():  # of its own code: a session may turn warnings into errors
        warnings.simplefilter("ignore")
        ray: Any = importlib.import_module("ray")
        if ray.is_initialized():
            return ray
        own: dict[str, Any] = {
            "num_cpus": threads,
            "include_dashboard": False,
            "object_store_memory": STORE_BYTES,
            "_node_ip_address": LOOPBACK,
        }
        try:
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level="ERROR",
                **({} if address else own),
            )
        except Exception as error:  # whatever Ray raises: RuntimeError, ConnectionError, ValueError, its own
            first = (str(error).strip().splitlines() or [repr(error)])[0]
            where = f"the Ray cluster at {address}" if address else "a Ray of this machine's own"
            fix = "; the command runs on a node of the cluster, with the cluster's version of Ray" if address else ""
            raise HarnessError(f"{where} cannot be used ({first[:200]}){fix}") from error
    return ray


def reach(address: str) -> None:
    """HarnessError unless something answers at 'HOST:PORT'; 'auto' is for Ray to find."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
        command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
        answered = subprocess.run(command, capture_output=True, timeout=STATUS_SECONDS, check=False).returncode == 0
        trouble = "" if answered else "what is there is no Ray"
    except (OSError, subprocess.TimeoutExpired) as error:
        trouble = "no answer" if isinstance(error, subprocess.TimeoutExpired) else error.strerror or str(error)
    if trouble:
        raise HarnessError(f"no Ray cluster answers at {address} ({trouble}): start one with `ray start --head`")


def living(ray: Any) -> list[Node]:
    """The cluster's living nodes, with all that each has."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Node(has.get("CPU", 0.0), has.get("memory", 0.0), has.get("GPU", 0.0)) for has in alive]


@dataclass
class Task:
    """One group on its way."""

    cases: tuple[Case, ...]
    rows: Any  # Ray's generator of references to `Came`
    requests: tuple[Request, ...]  # its own, and that of the task it waits for
    predicted: int = 0  # bytes
    reference: Any = None  # Ray's reference to the losses that the driver writes down once
    unfit: float | None = None  # since when no node could hold it


class RayRunner(Runner):
    """Measures cases as Ray tasks."""

    def __init__(self, options: Options, *, threads: int, lock: Path) -> None:
        super().__init__(options, threads=threads, lock=lock)
        self.came: dict[str, tuple[Row, str]] = {}  # by case id, each with its traceback where a bug was met
        self.taken: set[str] = set()  # those that were asked for
        self.tasks: list[Task] = []
        self.handed: set[str] = set()  # ids of cases that some task has
        self.ray: Any = None
        self.depot: Any = None
        self.needs: Mapping[str, Any] = {}
        self.code = ""
        self.card = 0
        self.place = checkout(Path.cwd())  # the cases' own: a node's working directory says nothing

    def prepare(self, cases: Sequence[Case], say: Callable[[str], None]) -> Mapping[str, str]:
        """Reach Ray, make checkpoints and token plans here, and predict what each group takes."""
        if self.options.stop_early and any(case.device == "cuda" for case in cases) and not gpus.cuda_devices():
            raise HarnessError("--stop-early looks at this device's record: start the session on a node with a card")
        self.check_assets(cases)  # what the user must mend is said before a cluster is reached
        self.fit(cases)
        self.ray = connect(self.options.ray_address, self.threads)
        inputs = super().prepare(cases, say)
        left = self.fit(cases)
        self.needs = self.consult("needs", left, say).data or {}
        self.code = self.consult("code", left, say).text
        nodes = living(self.ray)
        say(f"Ray: {len(nodes)} node{'s' * (len(nodes) != 1)}, {sum(node.cpus for node in nodes):g} CPUs")
        return inputs

    def begin(self, cases: Sequence[Case], ask: Callable[[Case], Asked]) -> None:
        """Hand out every group, the dearest first."""
        cases = [case for case in cases if case not in self.unfit]
        here = self.ray.get_runtime_context().get_node_id()
        beside = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False)
        self.depot = self.ray.remote(Depot).options(num_cpus=0, scheduling_strategy=beside).remote(cache_dir())
        if any(case.device == "cuda" for case in cases):
            self.card = self._smallest_card()
        groups: dict[str, list[Case]] = {}
        for case in cases:
            groups.setdefault(case.group, []).append(case)
        references = self._references(list(groups.values()))
        for name in longest_first(cases):
            self._submit(groups[name], ask, references.get((groups[name][0].model, groups[name][0].device)))

    def measure(self, case: Case, resumable: Mapping[str, Row], stop: Stop | None = None) -> tuple[Row, str]:
        """The case's row, waited for; one that was not handed out ahead is now."""
        if case in self.unfit:
            return missing(case, self.unfit[case]), ""
        if self.depot is None:
            self.prepare([case], lambda line: None)
            self.begin([case], lambda case: Asked(case, resumable.get(case.id), stop))
        if case.id not in self.handed:
            self._submit([case], lambda case: Asked(case, resumable.get(case.id), stop), None)
        while case.id not in self.came:
            self._take()
        self.taken.add(case.id)
        return self.came[case.id]

    def ahead(self) -> list[Row]:
        """Rows that nobody asked for yet."""
        return [row for name, (row, _) in self.came.items() if name not in self.taken]

    def close(self) -> None:
        """Leave the cluster, or end our own; what still runs there ends with it."""
        super().close()
        self.tasks = []
        if self.ray is not None:
            self.ray.shutdown()
            self.ray = None

    # out

    def _request(self, cases: Sequence[Case], *, timed: bool) -> Request:
        return request(
            cases[0].device,
            self.needs.get("bytes", {}).get(cases[0].group, 0),
            timed=timed,
            threads=self.threads,
            nodes=living(self.ray),
            card=self.card,
        )

    def _errand(self, asked: Sequence[Asked]) -> Errand:
        known = self.needs.get("folders", {})
        folders = [Path(known[model]) for model in models_of(one.case for one in asked) if model in known]
        names = tuple(folder.name for folder in folders if folder.parent == cache_dir() / "checkpoints")
        return Errand(self.options, self.threads, self.code, names, tuple(asked), fingerprints.portable(self.inputs))

    def _submit(
        self, cases: Sequence[Case], ask: Callable[[Case], Asked], reference: tuple[Any, Request] | None
    ) -> None:
        own = self._request(cases, timed=any(member_of(case).timed for case in cases))
        losses, others = (reference[0], (reference[1],)) if reference else (None, ())
        remote = self.ray.remote(measure_group).options(num_returns="streaming", max_retries=RETRIES, **own.options())
        rows = remote.remote(self._errand([ask(case) for case in cases]), self.depot, {} if losses is None else losses)
        predicted = self.needs.get("bytes", {}).get(cases[0].group, 0)
        self.handed.update(case.id for case in cases)
        self.tasks.append(Task(tuple(cases), rows, (own, *others), predicted, losses))

    def _references(self, groups: Sequence[Sequence[Case]]) -> dict[tuple[str, str], tuple[Any, Request]]:
        """A task a model and device that computes the reference's losses, where more than one group needs them."""
        wanted: dict[tuple[str, str], list[list[Case]]] = {}
        for group in groups:
            reading = [case for case in group if case.dataset and not member_of(case).timed]
            if reading:
                wanted.setdefault((group[0].model, group[0].device), []).append(reading)
        folder, before = self.options.report_dir / LOSSES, dict[str, bytes]()  # what an earlier session computed
        for index in folder.glob("reference-*") if self.options.resume else ():
            path = folder / f"{index.read_text('utf-8', 'replace')}.npz"
            if path.is_file():
                before |= {index.name: index.read_bytes(), path.name: path.read_bytes()}
        kept = self.ray.put(before) if before else {}
        references: dict[tuple[str, str], tuple[Any, Request]] = {}
        for key, lists in wanted.items():
            if len(lists) < 2:
                continue
            texts = {(case.dataset, case.protocol): case for cases in lists for case in cases}
            asked = [Asked(case._replace(method=case.reference, metric="perplexity")) for case in texts.values()]
            own = self._request([asked[0].case], timed=False)
            remote = self.ray.remote(reference_losses).options(max_retries=RETRIES, **own.options())
            references[key] = remote.remote(self._errand(asked), self.depot, kept), own
        return references

    def _smallest_card(self) -> int:
        """Bytes of the smallest card of the cluster, 0 where a node does not say."""
        sizes = []
        strategy = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        for node in self.ray.nodes():
            if node["Alive"] and node["Resources"].get("GPU"):
                remote = self.ray.remote(gpus.smallest_card).options(
                    num_cpus=0, num_gpus=0.01, scheduling_strategy=strategy(node["NodeID"], soft=False)
                )
                sizes.append(remote.remote())
        try:
            return min(self.ray.get(sizes, timeout=CARD_SECONDS), default=0)
        except self.ray.exceptions.RayError:
            return 0

    # in

    def _take(self) -> None:
        """Take what has come; where nothing has, look whether something can never come."""
        ready, _ = self.ray.wait([task.rows for task in self.tasks], num_returns=1, timeout=POLL_SECONDS)
        for task in [task for task in self.tasks if task.rows in ready]:
            self._next(task)
        if not ready:
            self._give_up()

    def _next(self, task: Task) -> None:
        try:
            came: Came | None = self.ray.get(next(task.rows))
            if came is not None:
                self._keep(task, came)
        except StopIteration:
            self._lost(task, "the Ray task ended without a row for it")
        except HarnessError as error:  # raised in the task; Ray's own error is one too, with a traceback as its text
            self._lost(task, str(getattr(error, "cause", error)))
        except self.ray.exceptions.RayTaskError as error:
            lines = str(error).strip().splitlines()
            self._lost(task, lines[-1], str(error))
        except self.ray.exceptions.RayError as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._lost(task, f"the Ray task was given up ({type(error).__name__}: {first[:300]})")

    def _keep(self, task: Task, came: Came) -> None:
        """Write down what a row names, then the row."""
        row, folder = came.row, self.options.report_dir / LOSSES
        if row.case.id in self.came:
            return
        if task.reference is not None:
            _write(folder, self.ray.get(task.reference))
            task.reference = None
        _write(folder, came.losses)
        world = {**came.world, **self.place} if came.world else {}
        if world:
            self.environments[row.environment] = world
        self.came[row.case.id] = row, came.trouble  # first: an interruption must not lose what is on disk
        if row.value is not None:
            self.arrived(row, world)
        self.depot.note.remote(row.case.id)

    def _lost(self, task: Task, reason: str, trouble: str = "") -> None:
        """Every case of a task that will bring no more rows gets the reason."""
        self.tasks.remove(task)
        needed = f"; it needs {task.predicted / MIB:,.0f} MiB by prediction" if task.predicted else ""
        for case in task.cases:
            self.came.setdefault(case.id, (missing(case, reason + needed), trouble))

    def _give_up(self) -> None:
        """End the tasks that no living node could hold for as long as PATIENCE_SECONDS."""
        nodes, now = living(self.ray), time.monotonic()
        for task in list(self.tasks):
            unfit = next((one for one in task.requests if not one.fits(nodes)), None)
            task.unfit = None if unfit is None else task.unfit or now
            if unfit and now - (task.unfit or now) >= PATIENCE_SECONDS:
                with contextlib.suppress(self.ray.exceptions.RayError):
                    self.ray.cancel(task.rows)
                self._lost(task, f"no node of the cluster has {unfit}")


def _write(folder: Path, losses: Losses) -> None:
    for name, content in losses.items():
        path = folder / name
        if not (path.is_file() and path.read_bytes() == content):  # an earlier session's may be damaged
            replace_bytes(path, content)
