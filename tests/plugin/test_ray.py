"""Sessions with `--engine ray`, on a Ray of this machine's own: the same report, and an end for every case."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.plugin.test_session import steady
from tests.rehearsal import cuda_build, driver

if TYPE_CHECKING:
    from tests.plugin.conftest import Project

pytest.importorskip("ray", reason="Ray is not installed: pip install ray, or tox run -e ray")

# kills the Ray worker above the group's process and its fork server, on its first try or on each
RUTHLESS = '''
"""Methods that take their Ray worker with them."""
import os, pathlib, signal
import psutil
from faults import faulty


def worker():
    return next(one for one in psutil.Process().parents() if "ray::" in " ".join(one.cmdline()))


def always(model):
    os.kill(worker().pid, signal.SIGKILL)


def once(model):
    mark = pathlib.Path(os.environ["RUTHLESS_MARK"])
    if not mark.exists():
        mark.touch()
        always(model)
    return model


ALWAYS, ONCE = faulty("always", always), faulty("once", once)
'''


@pytest.fixture
def ruthless(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    project.write("site/ruthless.py", RUTHLESS)
    points = project.path / "site" / "faults-1.0.dist-info" / "entry_points.txt"
    points.write_text(points.read_text() + "always = ruthless:ALWAYS\nonce = ruthless:ONCE\n")
    monkeypatch.setenv("RUTHLESS_MARK", str(project.path / "mark"))
    return project


def table(project: Project, folder: str) -> list[str]:
    """The report without its lines of times and its command."""
    lines = project.report(folder).splitlines()
    return [line for line in lines if not line.startswith("    pytest")]


def test_the_report_is_that_of_a_plain_run_and_resume_repeats_nothing(project: Project) -> None:
    wanted = ("--methods", "absmax-int8,nf4", "--metrics", "perplexity,memory,divergence.kl")
    assert project.run(*wanted, "--report-dir", "plain").ret == 0
    result = project.run(*wanted, "--engine", "ray", "--report-dir", "ray")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["Ray: 1 node, * CPUs"])
    assert steady(project.rows("ray")) == steady(project.rows("plain"))
    assert table(project, "ray") == table(project, "plain")
    for name in ("plan.json", "environments.json"):
        assert (project.path / "ray" / name).read_text() == (project.path / "plain" / name).read_text()
    losses = [{path.name for path in (project.path / name / "nll").glob("*.npz")} for name in ("plain", "ray")]
    assert losses[0] == losses[1]
    before = project.rows("ray")
    assert project.run(*wanted, "--engine", "ray", "--report-dir", "ray", "--resume").ret == 0
    assert project.rows("ray") == before  # seconds too: nothing was measured again
    assert project.run(*wanted, "--report-dir", "ray", "--resume").ret == 0
    assert project.rows("ray") == before


def test_timed_rows_name_their_node_and_a_shard_is_a_shard(project: Project) -> None:
    wanted = ("--methods", "nf4", "--metrics", "memory.storage,latency.decode", "--engine", "ray")
    assert project.run(*wanted, "--shard", "2/2").ret == 0
    rows = project.rows()
    assert [(row["method"], row["metric"]) for row in rows] == [("nf4", "memory.storage"), ("nf4", "latency.decode")]
    assert ["node" in row["detail"] for row in rows] == [False, True]
    assert json.loads((project.path / "harness-report" / "shard.json").read_text())["index"] == 2
    assert re.search(rf"\| +node +\|.*\n.*\n.*\| +{re.escape(rows[1]['detail']['node'])} +\|", project.report())


def test_faults_of_a_group_read_as_in_a_plain_run(project: Project) -> None:
    wanted = ("--methods", "segfault,killed,oom,bug,lazy,nf4", "--metrics", "memory.storage")
    assert project.run(*wanted, "--report-dir", "plain").ret == 1
    result = project.run(*wanted, "--engine", "ray", "--report-dir", "ray")
    assert result.ret == 1
    assert steady(project.rows("ray")) == steady(project.rows("plain"))
    result.stdout.fnmatch_lines(["*KeyError: 'a bug'*", "7 planned, 2 ran, 5 missing"])


def test_a_worker_that_dies_is_tried_again_and_at_last_given_up(ruthless: Project) -> None:
    result = ruthless.run("--methods", "always,once,nf4", "--metrics", "memory.storage", "--engine", "ray")
    assert result.ret == 1
    rows = {row["method"]: row for row in ruthless.rows()}
    assert set(rows) == {"fp32", "always", "once", "nf4"}
    assert [name for name, row in rows.items() if row["value"] is None] == ["always"]
    assert rows["always"]["verdict"] == "missing"
    assert rows["always"]["reason"].startswith("the Ray task was given up (WorkerCrashedError: The worker died")
    assert "MiB by prediction" in rows["always"]["reason"]
    assert rows["once"]["value"] == rows["fp32"]["value"]
    assert (ruthless.path / "mark").exists()
    assert "WorkerCrashedError" in ruthless.report()


def test_a_task_that_is_killed_for_memory_is_given_up_too(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.001")  # every node is short of memory at once
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    result = project.run("--methods", "nf4", "--metrics", "memory.storage", "--engine", "ray")
    assert result.ret == 1
    reasons = [row["reason"] for row in project.rows() if row["value"] is None]
    assert len(reasons) == 2
    assert all("OutOfMemoryError" in reason and "by prediction" in reason for reason in reasons)


def test_an_interruption_keeps_what_came_ahead(project: Project) -> None:
    command = [sys.executable, "-m", "pytest", "-v", "--models", "tiny-gpt2", "--datasets", "synthetic"]
    command += ["--methods", "nf4,fp4,linear-int4,absmax-int8", "--metrics", "memory", "--engine", "ray"]
    session = subprocess.Popen(command, cwd=project.path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    path = project.path / "harness-report" / "measurements.jsonl"
    deadline = time.monotonic() + 180
    while not (path.is_file() and path.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    session.send_signal(signal.SIGINT)
    output, _ = session.communicate(timeout=60)
    assert session.returncode == 2, output
    rows = project.rows()
    assert len(rows) == len(json.loads((project.path / "harness-report" / "plan.json").read_text()))
    assert sum(row["value"] is not None for row in rows) >= 2
    assert {row["reason"] for row in rows if row["value"] is None} <= {"not reached: the session stopped before it"}


@pytest.fixture
def with_a_card() -> Iterator[str]:
    """A cluster whose second node says that it has a card, which it has not."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        made.add_node(num_cpus=2, num_gpus=1)
        yield made.address
    finally:
        made.shutdown()


def test_cuda_cases_go_where_ray_has_cards(project: Project, with_a_card: str) -> None:
    cluster = ("--engine", "ray", "--ray-address", with_a_card)
    result = project.run("--methods", "nf4", "--metrics", "memory.storage", *cluster)
    assert result.ret == 1
    rows: list[dict[str, Any]] = project.rows()
    assert {row["device"] for row in rows} == {"cuda"}  # planned by the cluster's cards, not by this machine's
    assert all(row["reason"].startswith("no CUDA device") for row in rows)
    assert all("install a driver" in row["reason"] for row in rows)  # said by the node, not by the plan
    result.stdout.fnmatch_lines(["Ray: 2 nodes, 3 CPUs"])
    assert "RAY_ADDRESS" not in os.environ


# groups on whole cards and on shares of one: Ray keeps a worker, and with it a fork server, from task to task
SHARES = """
import json, os, time
from pathlib import Path
import ray
from harness.run.ray.ray_runner import VARIABLES
from harness.metrics.measuring.checks import LAYER
from harness.core.options import Declared, Options
from harness.core.records import Case
from harness.run.local import Runner


def group(number):
    runner = Runner(Options(Declared(Path())), threads=1, lock=Path("lock"))
    case = Case(LAYER, "nf4", "", "", "invariant.any", "cuda")
    kind = runner.ask(case, "key", (case, None)).kind
    pid = runner._process.process.pid
    runner.close()
    time.sleep(0.4 + number * 7 % 5 / 4)
    return pid, os.environ["CUDA_VISIBLE_DEVICES"], os.getpid(), kind


if __name__ == "__main__":
    os.environ.update(VARIABLES)
    own = {"include_dashboard": False, "object_store_memory": 1 << 27, "log_to_driver": False}
    ray.init(num_cpus=2, num_gpus=2, logging_level="ERROR", **own)
    shares = (1.0, 1.0, 0.31, 0.22, 1.0, 0.47, 0.18, 1.0, 0.33, 1.0, 0.25, 1.0)
    tasks = [
        ray.remote(group).options(num_cpus=1, memory=(1 << 20) + number, num_gpus=share).remote(number)
        for number, share in enumerate(shares)
    ]
    for task in tasks:
        print(json.dumps(ray.get(task)), flush=True)
    ray.shutdown()
"""


def test_a_groups_process_sees_the_card_that_ray_gave_its_task(tmp_path: Path) -> None:
    (tmp_path / "shares.py").write_text(SHARES)
    (tmp_path / "sitecustomize.py").write_text(cuda_build.SITE)
    log = tmp_path / "driver.log"
    world = driver.world(driver.variables(2, log=log), PYTHONPATH=f"{Path(__file__).parents[2]}:{tmp_path}")
    command = [sys.executable, "shares.py"]
    done = subprocess.run(command, cwd=tmp_path, env=world, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tasks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(tasks) == 12
    assert {kind for _, _, _, kind in tasks} == {"key"}
    cards = {worker: {given for _, given, mine, _ in tasks if mine == worker} for _, _, worker, _ in tasks}
    assert any(len(given) > 1 for given in cards.values())  # else no worker went from one card to another
    started = driver.started(log)
    assert [started.get(pid) for pid, _, _, _ in tasks] == [{given} for _, given, _, _ in tasks]
