"""What runs in Ray's processes: a group's cases through the same `Runner` as on one machine, and the driver's depot."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from harness.core.catalog import member_of
from harness.core.errors import HarnessError
from harness.core.files import cache_dir, locked, owned, timing_lock
from harness.core.options import Options
from harness.core.records import Row
from harness.core.values import parse_json
from harness.inputs.models.folder import CHECK, RECORD, built
from harness.results.directory import LOSSES
from harness.run.local import Died, Runner
from harness.run.messages import Asked
from harness.run.plan import open_to

Losses = Mapping[str, bytes]  # files of a report's nll/ by name


@dataclass(frozen=True)
class Errand:
    """One task: complete."""

    options: Options
    threads: int
    code: str  # digest of the driver's harness and of packages that bring methods: a node must have the same
    folders: tuple[str, ...]  # of the cache's checkpoints: the built ones of the models that the cases read
    asked: tuple[Asked, ...]
    inputs: Mapping[str, str] = field(default_factory=dict)  # what the session began with, as far as nodes share it


@dataclass(frozen=True)
class Came:
    """What comes back for one case."""

    row: Row
    trouble: str = ""  # a traceback, where a bug was met
    world: Mapping[str, Any] = field(default_factory=dict)
    losses: Losses = field(default_factory=dict)


def measure_group(errand: Errand, depot: Any, reference: Losses) -> Iterator[Came | None]:
    """Rows in the order asked; None for a case whose row the driver had before this try."""
    import ray

    known = ray.get(depot.known.remote())
    with runner_for(errand, depot, reference) as runner:
        for asked in errand.asked:
            case = asked.case
            if case.id in known:
                yield None
                continue
            row, trouble = runner.measure(case, {case.id: asked.before} if asked.before else {}, asked.stop)
            if row.value is not None and row is not asked.before and member_of(case).timed:
                row = replace(row, detail={**row.detail, "node": node_name()})
            shas = (row.nll, row.detail.get("reference_nll"))
            files = [runner.options.report_dir / LOSSES / f"{sha}.npz" for sha in shas]
            losses = {path.name: path.read_bytes() for path in files if path.name not in reference and path.is_file()}
            yield Came(row, trouble, runner.environments.get(row.environment, {}), losses)


def reference_losses(errand: Errand, depot: Any, before: Losses) -> Losses:
    """The reference's losses on every text of the cases asked for, those of `before` not computed again.

    Empty where they cannot be had: each group then meets the reason by itself and tells it.
    """
    cases = [asked.case for asked in errand.asked]
    with runner_for(errand, depot, before) as runner:
        with contextlib.suppress(Died):
            runner.ask(cases[0], "reference", cases)
        folder = runner.options.report_dir / LOSSES
        return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@contextlib.contextmanager
def runner_for(errand: Errand, depot: Any, losses: Losses) -> Iterator[Runner]:
    """A runner that writes to a folder of its own, with the model and the reference's losses at hand."""
    open_to(errand.options.declared)
    with own_folder(cache_dir() / "ray") as folder:
        options = replace(errand.options, report_dir=folder)
        runner = Runner(options, threads=errand.threads, lock=timing_lock())
        runner.inputs, runner.crowded = errand.inputs, True  # by other tasks of the node
        try:
            (folder / LOSSES).mkdir()
            for name, content in losses.items():
                (folder / LOSSES / name).write_bytes(content)
            for name in errand.folders:
                bring(name, depot)
            same_code(errand, runner)
            yield runner
        finally:
            runner.close()


@contextlib.contextmanager
def own_folder(home: Path) -> Iterator[Path]:
    """An empty folder for as long as it is needed; what killed processes left beside it is cleared away."""
    with locked(home / "lock"):
        for alive in home.glob("*/alive"):
            with contextlib.suppress(OSError):  # its maker holds it while that lives
                if (left := owned(alive)) is not None:
                    with left:
                        shutil.rmtree(alive.parent, ignore_errors=True)
        folder = Path(tempfile.mkdtemp(dir=home))
        mark = owned(folder / "alive")
        assert mark is not None, "the folder is new"
    with mark:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def same_code(errand: Errand, runner: Runner) -> None:
    """HarnessError where this node would measure with another harness than the driver plans with."""
    with contextlib.suppress(Died):  # then the first case tells how
        reply = runner.ask(errand.asked[0].case, "code", None)
        if reply.kind == "code" and reply.text != errand.code:
            raise HarnessError(
                f"{node_name()} has another version of the harness, or of a package of methods, than the driver: "
                "install the same on every node"
            )


def node_name() -> str:
    """This node as a reader would look for it: its host, and its id in the cluster."""
    import ray

    return f"{socket.gethostname()} ({ray.get_runtime_context().get_node_id()[:8]})"


class Depot:
    """An actor on the driver's node; asked by tasks, told by the driver."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache  # the driver's
        self.received: set[str] = set()
        self.folders: dict[str, dict[str, Any]] = {}

    def note(self, case_id: str) -> None:
        """The driver has the row of a case."""
        self.received.add(case_id)

    def known(self) -> set[str]:
        """Ids of the cases whose rows the driver has: a retried task leaves them out."""
        return self.received

    def folder(self, name: str) -> dict[str, Any]:
        """The files of a built folder by name, in the object store once however many nodes ask."""
        import ray

        if name not in self.folders:
            files = sorted(path for path in (self.cache / "checkpoints" / name).iterdir() if path.is_file())
            self.folders[name] = {path.name: ray.put(np.fromfile(path, dtype=np.uint8)) for path in files}
        return self.folders[name]


def bring(name: str, depot: Any) -> None:
    """Put a folder that the driver's cache built into this node's cache, where it does not lie whole already."""
    import ray

    def build(destination: Path) -> dict[str, str]:
        for file, content in ray.get(depot.folder.remote(name)).items():
            ray.get(content).tofile(destination / file)
        record = destination / RECORD  # the driver's: of files with other times
        facts = parse_json(record.read_bytes())
        record.unlink()
        return {key: value for key, value in facts.items() if key not in ("files", CHECK)}

    built(name, build)
