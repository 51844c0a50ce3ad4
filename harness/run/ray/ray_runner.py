"""The driver's side of `--engine ray`: a `Runner` that hands out every group ahead and takes rows as they come.

pytest asks for one case after another; what came before its turn waits here, flushed already. A task that failed for
good (its tries are used up, its node is lost, it was killed for memory, no node is large enough) leaves each of its
cases a row that says so.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core import gpus
from harness.core.catalog import member_of
from harness.core.environment import checkout
from harness.core.errors import HarnessError
from harness.core.files import cache_dir, replace_bytes
from harness.core.records import Case, Row
from harness.core.text import MIB
from harness.results.directory import LOSSES
from harness.run import fingerprints
from harness.run.local import Runner, missing
from harness.run.messages import Asked, Stop
from harness.run.ray import cluster
from harness.run.ray.cluster import Request, request
from harness.run.ray.tasks import Came, Depot, Errand, Losses, measure_group, reference_losses
from harness.run.shards import longest_first

if TYPE_CHECKING:
    from harness.core.options import Options

RETRIES = 2  # of a task whose worker or node died: with the first try, three
POLL_SECONDS = 2.0
PATIENCE_SECONDS = 60.0  # for a node that is large enough to come (back)
CARD_SECONDS = 60.0  # for a node to say how large its cards are


@dataclass
class Task:
    """One group on its way."""

    cases: tuple[Case, ...]
    rows: Any  # Ray's generator of references to `Came`
    requests: tuple[Request, ...]  # its own, and that of the task it waits for
    predicted: int = 0  # bytes
    reference: Any = None  # Ray's reference to the losses that the driver writes down once
    unfit: float | None = None  # since when no node could hold it


@dataclass
class Ahead:
    """What came in, by case id."""

    rows: dict[str, tuple[Row, str]] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)


class RayRunner(Runner):
    """Measures cases as Ray tasks."""

    def __init__(self, options: Options, *, threads: int, lock: Path) -> None:
        super().__init__(options, threads=threads, lock=lock)
        self.came = Ahead()
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
        self.ray = cluster.connect(self.options.ray_address, self.threads)
        inputs = super().prepare(cases, say)
        self.needs = self.consult("needs", cases, say).data or {}
        self.code = self.consult("code", cases, say).text
        nodes = cluster.living(self.ray)
        say(f"Ray: {len(nodes)} node{'s' * (len(nodes) != 1)}, {sum(node.cpus for node in nodes):g} CPUs")
        return inputs

    def begin(self, cases: Sequence[Case], ask: Callable[[Case], Asked]) -> None:
        """Hand out every group, the dearest first."""
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
        if self.depot is None:
            self.prepare([case], lambda line: None)
            self.begin([case], lambda case: Asked(case, resumable.get(case.id), stop))
        if case.id not in self.handed:
            self._submit([case], lambda case: Asked(case, resumable.get(case.id), stop), None)
        while case.id not in self.came.rows:
            self._take()
        self.came.taken.add(case.id)
        return self.came.rows[case.id]

    def ahead(self) -> list[Row]:
        """Rows that nobody asked for yet."""
        return [row for name, (row, _) in self.came.rows.items() if name not in self.came.taken]

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
            nodes=cluster.living(self.ray),
            card=self.card,
        )

    def _errand(self, asked: Sequence[Asked]) -> Errand:
        folder = Path(self.needs.get("folders", {}).get(asked[0].case.model, "/"))
        name = folder.name if folder.parent == cache_dir() / "checkpoints" else ""
        return Errand(self.options, self.threads, self.code, name, tuple(asked), fingerprints.portable(self.inputs))

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
        before = self.ray.put(self._kept_references()) if self.options.resume else {}
        references: dict[tuple[str, str], tuple[Any, Request]] = {}
        for key, lists in wanted.items():
            if len(lists) < 2:
                continue
            texts = {(case.dataset, case.protocol): case for cases in lists for case in cases}
            asked = [Asked(_of_reference(case)) for case in texts.values()]
            own = self._request([asked[0].case], timed=False)
            remote = self.ray.remote(reference_losses).options(max_retries=RETRIES, **own.options())
            references[key] = remote.remote(self._errand(asked), self.depot, before), own
        return references

    def _kept_references(self) -> Losses:
        """The reference's losses that the report directory holds from before."""
        folder = self.options.report_dir / LOSSES
        kept: dict[str, bytes] = {}
        for index in folder.glob("reference-*"):
            path = folder / f"{index.read_text()}.npz"
            if path.is_file():
                kept |= {index.name: index.read_bytes(), path.name: path.read_bytes()}
        return kept

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
        if row.case.id in self.came.rows:
            return
        if task.reference is not None:
            _write(folder, self.ray.get(task.reference))
            task.reference = None
        _write(folder, came.losses)
        world = {**came.world, **self.place} if came.world else {}
        if world:
            self.environments[row.environment] = world
        self.came.rows[row.case.id] = row, came.trouble  # first: an interruption must not lose what is on disk
        if row.value is not None:
            self.arrived(row, world)
        self.depot.note.remote(row.case.id)

    def _lost(self, task: Task, reason: str, trouble: str = "") -> None:
        """Every case of a task that will bring no more rows gets the reason."""
        self.tasks.remove(task)
        needed = f"; it needs {task.predicted / MIB:,.0f} MiB by prediction" if task.predicted else ""
        for case in task.cases:
            self.came.rows.setdefault(case.id, (missing(case, reason + needed), trouble))

    def _give_up(self) -> None:
        """End the tasks that no living node could hold for as long as PATIENCE_SECONDS."""
        nodes, now = cluster.living(self.ray), time.monotonic()
        for task in list(self.tasks):
            unfit = next((one for one in task.requests if not one.fits(nodes)), None)
            task.unfit = None if unfit is None else task.unfit or now
            if unfit and now - (task.unfit or now) >= PATIENCE_SECONDS:
                with contextlib.suppress(self.ray.exceptions.RayError):
                    self.ray.cancel(task.rows)
                self._lost(task, f"no node of the cluster has {unfit}")


def _of_reference(case: Case) -> Case:
    """The reference's own case on the same text."""
    return Case(case.model, case.reference, case.dataset, case.protocol, "perplexity", case.device, case.reference)


def _write(folder: Path, losses: Losses) -> None:
    for name, content in losses.items():
        if not (folder / name).exists():
            replace_bytes(folder / name, content)
