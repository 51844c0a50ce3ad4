"""A two-node Ray cluster on this machine, one node killed half-way: is the report that of a run without Ray?"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from harness import report
from harness.core.catalog import member_of
from harness.core.files import cache_dir
from harness.core.records import Row, Verdict
from harness.report import markup
from studies import pages

MODELS = ("tiny-gpt2", "tiny-olmo")
OPTIONS = (
    "--datasets synthetic --max-tokens 1024 --protocols chunk:256 --repetitions 3 "
    "--metrics perplexity,memory,latency.decode"
).split()
NODE_CPUS = len(os.sched_getaffinity(0))  # of each node: groups ask for a local session's threads
LIMIT_SECONDS = 1500


def command(models: Sequence[str], folder: Path, *more: str) -> list[str]:
    """A session on the tiny models under the core list."""
    names = ["--models", ",".join(models), "--report-dir", str(folder)]
    return [sys.executable, "-m", "harness", "run", "-q", *names, *OPTIONS, *more]


@contextlib.contextmanager
def cluster(cache: Path, head: Path | None = None) -> Iterator[tuple[str, Any]]:
    """The address of a head node (with this cache, else the user's), and a second node that has a cache of its own."""
    from ray.cluster_utils import Cluster

    own = {"env_vars": {"HARNESS_CACHE": str(head)}} if head else {}
    hooks = threading.current_thread() is threading.main_thread()  # Ray's at exit need a signal handler
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": NODE_CPUS, **own}, shutdown_at_exit=hooks)
    try:
        yield made.address, made.add_node(num_cpus=NODE_CPUS, env_vars={"HARNESS_CACHE": str(cache)})
    finally:
        made.shutdown()


def processes(node: Any) -> list[psutil.Process]:
    """Every process of a node, its workers' own included."""
    roots = [psutil.Process(info.process.pid) for infos in node.all_processes.values() for info in infos]
    found = {process.pid: process for root in roots for process in (root, *root.children(recursive=True))}
    return list(found.values())


def measuring(found: Sequence[psutil.Process]) -> int:
    """How many of them are Ray workers with a group in hand: Ray writes a task's name into its worker's title."""
    titles = []
    for process in found:
        with contextlib.suppress(psutil.Error):
            titles.append(" ".join(process.cmdline()))
    return sum(title.startswith("ray::measure_group") for title in titles)


def kill(found: Sequence[psutil.Process]) -> None:
    """SIGKILL to all at once."""
    for process in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def measured(folder: Path) -> set[str]:
    """The cases whose rows are on disk."""
    path = folder / "measurements.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return {Row.from_json(line).case.id for line in lines if line.endswith("\n")}


def disturbed(models: Sequence[str], home: Path) -> dict[str, Any]:
    """The session on the cluster; the second node dies when half of the planned rows are there."""
    folder, cache = home / "ray", home / "cache"
    with cluster(cache) as (address, second):
        start = time.monotonic()
        session = subprocess.Popen(
            command(models, folder, "--engine", "ray", "--ray-address", address), cwd=home, stdout=subprocess.DEVNULL
        )
        try:
            while session.poll() is None:
                there, found = halfway(folder), processes(second)
                busy = measuring(found)
                if there and busy:
                    break
                if time.monotonic() - start > LIMIT_SECONDS:
                    raise TimeoutError("the session on the cluster did not come half-way")
                time.sleep(0.2)
            travelled = sorted(path.name for path in (cache / "checkpoints").glob("tiny-*") if path.is_dir())
            kill(found)
            status = session.wait(LIMIT_SECONDS)
        finally:
            session.kill()
            session.wait()
    return {
        "status": status,
        "seconds": time.monotonic() - start,
        "rows_at_kill": there,
        "processes_killed": len(found),
        "groups_killed": busy,
        "killed": second.node_id[:8],
        "travelled": travelled,
    }


def halfway(folder: Path) -> int:
    """Rows on disk, once they are half of the plan; 0 before."""
    plan = folder / "plan.json"
    planned = len(json.loads(plan.read_text(encoding="utf-8"))) if plan.is_file() else 0
    there = len(measured(folder)) if planned else 0
    return there if planned and 2 * there >= planned else 0


def without_times(row: Row) -> Row:
    """The row with every time in it put to one value, and the node's name left out."""
    if row.value is None or not member_of(row.case).timed:
        return replace(row, seconds=0.0)
    constant: dict[str, Any] = {"value": 1.0, "spread": 0.0, "samples": (1.0,), "detail": {}, "reason": ""}
    told: dict[str, Any] = {"verdict": Verdict.UNRECORDED, "verdict_reference": None, "verdict_baseline": None}
    return replace(row, seconds=0.0, **constant, **told)


def page_of(folder: Path, home: Path) -> tuple[dict[str, Row], str]:
    """A session's rows without times, and the report that they make."""
    session = report.read_report(folder)
    rows = [without_times(row) for row in session.rows]
    home.mkdir()
    text = report.write(home, rows, session.planned, session.environments, command="").read_text(encoding="utf-8")
    return {row.case.id: row for row in rows}, text


def measure(models: Sequence[str]) -> dict[str, Any]:
    """Both sessions and their comparison."""
    import ray

    with tempfile.TemporaryDirectory(prefix="harness-ray-page-") as name:
        home, models = Path(name), list(models or MODELS)
        start = time.monotonic()
        status = subprocess.run(command(models, home / "local"), cwd=home, stdout=subprocess.DEVNULL).returncode
        local = {"status": status, "seconds": time.monotonic() - start}
        there = disturbed(models, home)
        ours, our_text = page_of(home / "local", home / "local-page")
        theirs, their_text = page_of(home / "ray", home / "ray-page")
        rows = report.read_report(home / "ray").rows
        timed = [row.detail["node"] for row in rows if row.detail.get("node")]
        nodes = Counter("second, killed" if there["killed"] in node else "head" for node in timed)
        groups = Counter(row.case.group for row in rows if row.detail.get("node"))
        losses = [{path.name for path in (home / one / "nll").glob("*.npz")} for one in ("local", "ray")]
    return {
        "ray": ray.__version__,
        "models": models,
        "cpus": NODE_CPUS,
        "built": sorted(path.name for path in (cache_dir() / "checkpoints").glob("tiny-*") if path.is_dir()),
        "local": local,
        "cluster": there,
        "planned": len(ours),
        "groups": len(groups),
        "missing": [row.reason for row in theirs.values() if row.value is None],
        "differ": [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)],
        "same_losses": losses[0] == losses[1],
        "losses": len(losses[0]),
        "same_report": our_text == their_text,
        "lines": len(our_text.splitlines()),
        "nodes": dict(nodes),
    }


def render(results: Mapping[str, Any]) -> str:
    """What was compared, in a table."""
    there, differ = results["cluster"], results["differ"]
    same = results["planned"] - len(differ)
    rows = [
        [
            "cases planned, and with a measurement",
            f"{results['planned']}, {results['planned'] - len(results['missing'])}",
        ],
        ["rows on disk when the node died", str(there["rows_at_kill"])],
        ["processes of the node that got SIGKILL", str(there["processes_killed"])],
        ["groups that it was measuring then", str(there["groups_killed"])],
        ["rows equal to the local run's, times aside", f"{same} of {results['planned']}"],
        ["files of per-token losses, by content", f"{results['losses']}, {_same(results['same_losses'])}"],
        ["the report's text, times aside", f"{results['lines']} lines, {_same(results['same_report'])}"],
        ["checkpoints in the second node's cache at its end", ", ".join(map(markup.code, there["travelled"]))],
        ["exit status, local and cluster", f"{results['local']['status']}, {there['status']}"],
        ["wall clock, local and cluster", f"{results['local']['seconds']:.0f} s, {there['seconds']:.0f} s"],
    ]
    places = [[markup.escape(name), str(count)] for name, count in sorted(results["nodes"].items())]
    models = " and ".join(map(markup.code, results["models"]))
    return (
        f"{models} under the core list, once in a plain session and once with `--engine ray` (Ray {results['ray']}) on "
        f"two nodes of {results['cpus']} CPUs on one machine. The second node has a cache of its own, empty at the "
        "start. Half-way through the plan, with a group in its hands, the second node was killed. *Times aside*: "
        "`seconds` and the figures of timed cases are put to one value in both, and the node's name is left out; then "
        "all else is compared, verdicts and environment included, and both reports are rendered and compared as "
        f"text.\n\n{markup.table(['', ''], rows)}\n\n"
        + (f"Not equal: {', '.join(map(markup.code, differ))}.\n\n" if differ else "")
        + f"The two nodes share the machine's cores, so the wall clocks say nothing of speed.\n\n## Who timed\n\nEach "
        f"group has one timed case, whose row names its node.\n\n{markup.table(['node', 'groups'], places)}"
    )


def equal(results: Mapping[str, Any]) -> bool:
    """Whether nothing but times differs, and every case was measured."""
    return results["same_report"] and results["same_losses"] and not results["differ"] and not results["missing"]


def _same(answer: bool) -> str:
    return "the same" if answer else "**not the same**"


FOUND: dict[str, Any] = {}


def kept(models: Sequence[str]) -> Mapping[str, Any]:
    """`measure`, its results held for the exit status."""
    FOUND.update(measure(models))
    return FOUND


DOCUMENT = pages.Document("ray", "A Ray cluster that loses a node", kept, render, script="scale.ray_cluster")

if __name__ == "__main__":
    status = pages.run(DOCUMENT)
    raise SystemExit(status or int(bool(FOUND) and not equal(FOUND)))
