"""What is asked of Ray, and what is made of its answers, without Ray: nodes and its module are stood in for."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.core.errors import HarnessError, MissingPackage
from harness.core.options import Declared, Options
from harness.core.records import Case, Row
from harness.inputs.models import folder
from harness.run import fingerprints, plan, session
from harness.run.messages import Asked
from harness.run.ray import ray_runner, tasks
from harness.run.ray.ray_runner import PROCESS_BYTES, Node, RayRunner, Request, Task, request
from harness.run.ray.tasks import Came, Depot, bring, own_folder

GIB = 1 << 30
SMALL, LARGE = Node(4, 16 * GIB), Node(64, 256 * GIB)
CARDS = Node(32, 128 * GIB, 4)


def asked(device: str = "cpu", predicted: int = 2 * GIB, **more: Any) -> Request:
    given = {"timed": False, "threads": 4, "nodes": [SMALL, LARGE], "card": 0, **more}
    return request(device, predicted, **given)


def test_an_untimed_group_asks_for_its_threads_and_its_predicted_bytes() -> None:
    assert asked() == Request(4, 2 * GIB + PROCESS_BYTES)
    assert asked(predicted=0).memory == PROCESS_BYTES


def test_a_timed_group_has_the_whole_node() -> None:
    assert asked(timed=True).cpus == LARGE.cpus
    assert asked(timed=True, nodes=[SMALL]).cpus == SMALL.cpus


def test_a_group_too_large_for_every_node_gets_the_roomiest_and_is_never_asked_in_vain() -> None:
    for timed in (False, True):
        wanted = asked(predicted=1000 * GIB, timed=timed)
        assert wanted.memory == LARGE.memory
        assert wanted.fits([SMALL, LARGE])
        assert asked(threads=96, timed=timed).fits([SMALL, LARGE])


def test_more_memory_moves_a_group_to_the_larger_node() -> None:
    wanted = asked(predicted=32 * GIB)
    assert not wanted.fits([SMALL])
    assert wanted.fits([LARGE])
    assert wanted.cpus == 4


def test_a_card_is_shared_by_predicted_bytes_and_timed_cases_have_it_whole() -> None:
    wanted = asked("cuda", 7 * GIB, nodes=[SMALL, CARDS], card=80 * GIB)
    assert wanted.gpus == pytest.approx(0.1)  # 7 and 1 of 80 GiB
    assert wanted.options() == {"num_cpus": 1, "memory": 8 * GIB, "num_gpus": 0.1}
    assert not wanted.fits([LARGE])
    assert asked("cuda", 7 * GIB, nodes=[CARDS], card=80 * GIB, timed=True).gpus == 1
    assert asked("cuda", 200 * GIB, nodes=[CARDS], card=80 * GIB).gpus == 1
    assert asked("cuda", 7 * GIB, nodes=[CARDS], card=0).gpus == 1  # how large the cards are is not known
    assert asked("cuda", 0, nodes=[CARDS], card=80 * GIB).gpus == 1  # nor how large the group is


def test_a_request_reads_as_what_no_node_has() -> None:
    assert str(Request(64, 24 * GIB, 1)) == "64 CPUs, 24.0 GiB of memory, 1 GPUs"


def test_ray_that_is_not_installed_is_one_line_with_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    options = Options(Declared(Path()), engine="ray")
    with pytest.raises(MissingPackage, match=r"--engine ray needs the package 'ray': pip install ray"):
        session.check_engine(options.engine, workers=0)
    with pytest.raises(HarnessError, match="-n starts workers"):
        session.check_engine(options.engine, workers=2)
    session.check_engine("local", workers=2)


def test_cards_that_nobody_has_are_one_line_that_names_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.core.gpus.LIBRARY", "libcuda-that-is-not-there.so.1")
    on_card = [Case("m", "nf4", "", "", "memory.storage", "cuda")]
    options = Options(Declared(Path()), engine="ray", ray_address="head:6379")
    line = (
        r"^no CUDA device: no NVIDIA driver \(.*, and no node of the Ray cluster at head:6379 has one; use --device cpu"
    )
    with pytest.raises(HarnessError, match=line):
        plan.check_cards(on_card, options, usable=False, workers=0)
    plan.check_cards(on_card, options, usable=True, workers=0)
    plan.check_cards([*on_card, *CASES], options, usable=False, workers=0)
    plan.check_cards(on_card, replace(options, allow_missing=True), usable=False, workers=2)
    plan.check_cards([], options, usable=False, workers=2)


def test_an_address_at_which_nothing_listens_is_one_line() -> None:
    with pytest.raises(HarnessError, match=r"no Ray cluster answers at 127.0.0.1:1 .*ray start --head"):
        ray_runner.reach("127.0.0.1:1")


class Sudden(Exception):
    """RayError's stand-in."""


class Buggy(Sudden):
    """RayTaskError's stand-in."""


def a_runner(tmp_path: Path, **ray: Any) -> RayRunner:
    options = Options(Declared(tmp_path), report_dir=tmp_path / "report")
    runner = RayRunner(options, threads=2, lock=tmp_path / "lock")
    told = types.SimpleNamespace(note=types.SimpleNamespace(remote=lambda case_id: None))
    runner.depot = told
    runner.ray = types.SimpleNamespace(exceptions=types.SimpleNamespace(RayError=Sudden, RayTaskError=Buggy), **ray)
    return runner


CASES = tuple(Case("m", "nf4", "", "", f"memory.{name}", "cpu") for name in ("one", "two", "three"))


def a_task(*answers: Any, **more: Any) -> Task:
    return Task(CASES, iter(answers), (Request(2, GIB),), predicted=3 * GIB, **more)


def answer(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    return value


def test_a_task_that_fails_for_good_leaves_every_other_case_missing_with_its_reason(tmp_path: Path) -> None:
    runner = a_runner(tmp_path, get=answer)
    task = a_task(Came(Row.of(CASES[0], value=1.0)), Sudden("the node is gone\nmore"))
    runner.tasks = [task]
    runner._next(task)
    runner._next(task)
    assert runner.tasks == []
    assert runner.came[CASES[0].id][0].value == 1.0
    for case in CASES[1:]:
        row, trouble = runner.came[case.id]
        assert row.value is None
        assert row.reason == ("the Ray task was given up (Sudden: the node is gone); it needs 3,072 MiB by prediction")
        assert not trouble


def test_a_bug_in_a_task_keeps_its_traceback_and_a_users_mistake_its_line(tmp_path: Path) -> None:
    runner = a_runner(tmp_path, get=answer)
    for error, reason, trouble in (
        (Buggy("Traceback\n  ...\nKeyError: 'x'"), "KeyError: 'x'", True),
        (HarnessError("install the same"), "install the same", False),
    ):
        runner.came.clear()
        runner.tasks = [task := a_task(error)]
        runner._next(task)
        row, told = runner.came[CASES[0].id]
        assert row.reason.startswith(reason)
        assert bool(told) is trouble


def test_a_row_that_comes_twice_counts_once_and_a_short_task_hangs_nobody(tmp_path: Path) -> None:
    runner = a_runner(tmp_path, get=answer)
    arrived: list[Row] = []
    runner.arrived = lambda row, world: arrived.append(row)
    first, again = Row.of(CASES[0], value=1.0), Row.of(CASES[0], value=2.0)
    task = a_task(Came(first, losses={"a.npz": b"1"}), None, Came(again))
    runner.tasks = [task]
    while runner.tasks:
        runner._next(task)
    assert arrived == [first]
    assert (tmp_path / "report" / "nll" / "a.npz").read_bytes() == b"1"
    assert "ended without a row" in runner.came[CASES[2].id][0].reason
    assert [row.case for row in runner.ahead()] == list(CASES)


def test_what_no_node_can_hold_is_given_up_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled: list[Any] = []
    nodes: list[dict[str, Any]] = [{"Alive": True, "Resources": {"CPU": 1.0, "memory": 64.0 * GIB}}]
    runner = a_runner(tmp_path, nodes=lambda: nodes, cancel=cancelled.append)
    now = [0.0]
    monkeypatch.setattr("harness.run.ray.ray_runner.time.monotonic", lambda: now[0])
    task = a_task()
    runner.tasks = [task]
    runner._give_up()
    now[0] = ray_runner.PATIENCE_SECONDS - 1
    runner._give_up()
    assert runner.tasks == [task]
    nodes[0]["Resources"]["CPU"] = 2.0  # a node came: the wait starts anew
    runner._give_up()
    nodes[0]["Alive"] = False
    runner._give_up()
    now[0] *= 2
    runner._give_up()
    assert runner.tasks == [task]
    now[0] += 2
    runner._give_up()
    assert cancelled == [task.rows]
    assert runner.came[CASES[0].id][0].reason.startswith("no node of the cluster has 2 CPUs, 1.0 GiB of memory")


def test_a_built_folder_is_brought_once_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(destination: Path) -> dict[str, str]:
        (destination / "model.safetensors").write_bytes(bytes(range(256)))
        (destination / "tokenizer.json").write_text("{}")
        return {"note": "of the tokenizer"}

    def again(destination: Path) -> dict[str, str]:
        raise AssertionError("it lies here whole")

    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "driver"))
    _, record = folder.built("tiny-x", build)
    puts: list[Any] = []

    def put(value: np.ndarray[Any, Any]) -> Any:
        puts.append(value)
        return value

    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(put=put, get=lambda value: value))
    home = Depot(tmp_path / "driver")
    asker = types.SimpleNamespace(folder=types.SimpleNamespace(remote=home.folder))
    for node in ("one", "two", "two"):
        monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / node))
        bring("tiny-x", asker)
        brought, found = folder.built("tiny-x", again)
        assert (brought / "model.safetensors").read_bytes() == bytes(range(256))
        assert (found["note"], found["revision"]) == (record["note"], record["revision"])
    assert len(puts) == 3  # its files, once
    assert not [path for path in (tmp_path / "two" / "checkpoints").iterdir() if path.name.startswith(".tiny-x.")]


def test_a_folder_that_a_killed_task_left_is_cleared_by_the_next(tmp_path: Path) -> None:
    with own_folder(tmp_path) as first, own_folder(tmp_path) as second:
        (first / "nll").mkdir()
        assert first.is_dir()
        assert second != first
    assert not first.exists()
    left = tmp_path / "left"
    left.mkdir()
    (left / "alive").touch()
    with own_folder(tmp_path) as third:
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [third.name]


def test_a_task_is_held_to_what_the_session_began_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tasks, "bring", lambda name, depot: None)
    monkeypatch.setattr(tasks, "same_code", lambda task, runner: None)
    driver = a_runner(tmp_path)
    driver.inputs = {"weights of m": "a", fingerprints.files("m"): "where they lie here"}
    task = driver._errand([Asked(CASES[0])])
    with tasks.runner_for(task, None, {}) as runner:
        assert runner.inputs == {"weights of m": "a"}


def test_a_task_brings_every_built_model_that_its_cases_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tasks, "same_code", lambda task, runner: None)
    brought: list[str] = []
    monkeypatch.setattr(tasks, "bring", lambda name, depot: brought.append(name))
    checkpoints = tmp_path / "cache" / "checkpoints"
    driver = a_runner(tmp_path)
    driver.needs = {"folders": {"m": str(checkpoints / "m-1"), "base": str(checkpoints / "base-2"), "own": "/own"}}
    for reference, folders in (("fp32", ("m-1",)), ("fp32=base", ("m-1", "base-2")), ("fp32=own", ("m-1",))):
        task = driver._errand([Asked(CASES[0]._replace(reference=reference))])
        assert task.folders == folders
    with tasks.runner_for(driver._errand([Asked(CASES[0]._replace(reference="fp32=base"))]), None, {}):
        assert brought == ["m-1", "base-2"]


def test_a_retried_task_is_told_what_the_driver_has() -> None:
    home = Depot(Path())
    home.note("a")
    home.note("a")
    assert home.known() == {"a"}


@pytest.fixture
def own_ray(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A module in Ray's place: what it is started with, and what stood in the environment then."""
    started: list[dict[str, Any]] = []
    names = (*ray_runner.VARIABLES, *ray_runner.OWN, ray_runner.OWN_TOKEN)

    def init(**given: Any) -> None:
        started.append({**given, **{name: os.environ.get(name) for name in names}})

    for name in names:  # set first: then it is gone at the end too
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(ray_runner, "_set", {})
    monkeypatch.setattr(ray_runner, "require", lambda: None)
    monkeypatch.setattr(ray_runner, "reach", lambda address: None)
    fake = types.SimpleNamespace(is_initialized=lambda: False, init=init)
    monkeypatch.setattr(importlib, "import_module", lambda name: fake)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    return started


def test_a_ray_of_our_own_keeps_to_this_machine_and_asks_for_a_token(own_ray: list[dict[str, Any]]) -> None:
    with_token = ray_runner.connect(None, 2)
    ray_runner.connect(None, 2)
    first, second = own_ray
    assert with_token.is_initialized() is False
    assert first["address"] == "local"
    assert first["_node_ip_address"] == "127.0.0.1"
    assert first["include_dashboard"] is False
    assert first["RAY_AUTH_MODE"] == "token"
    assert first["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert len(first["RAY_AUTH_TOKEN"]) == 64
    assert second["RAY_AUTH_TOKEN"] == first["RAY_AUTH_TOKEN"]  # Ray reads it once a process
    with pytest.raises(HarnessError, match="join a cluster from another"):
        ray_runner.connect("auto", 2)


def test_a_cluster_and_what_the_user_has_set_are_left_as_they_are(
    own_ray: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ray_runner.connect("auto", 2)
    assert [own_ray[0][name] for name in (*ray_runner.OWN, ray_runner.OWN_TOKEN)] == [None, None, None]
    assert "_node_ip_address" not in own_ray[0]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "theirs")
    ray_runner.connect(None, 2)
    assert (own_ray[1]["RAY_AUTH_MODE"], own_ray[1]["RAY_AUTH_TOKEN"]) == ("disabled", "theirs")
