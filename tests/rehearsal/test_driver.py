"""What happens in pytest's own processes where a card is, by the stub of the driver: looking, pinning, refusing."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness.core import gpus
from tests.rehearsal import driver

ROOT = Path(__file__).parents[2]
FIRST, SECOND = (f"GPU-00000000-0000-0000-0000-{number:012}" for number in (1, 2))
LIMIT_SECONDS = 300  # of a session, which takes a few: one that hangs fails
NAME = "Stub H100 80GB (sm_90)"
SLICE = "MIG-01000000-0000-0000-0000-000000000001"
# a session that makes nothing ready and measures nothing: each case notes which worker it ran in and what that saw
CONFTEST = """
from harness.run.session import Session
Session.prepare = lambda self, cases, say: {}
"""
CASES = """
import json, os, time
from pathlib import Path
from harness.core import gpus

def test_case(harness_case):
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker == os.environ.get("DYING_WORKER"):
        os._exit(9)
    time.sleep(0.2)  # or the first worker takes them all
    seen = [worker, harness_case.device, os.environ.get("CUDA_VISIBLE_DEVICES"), gpus.cuda_devices()[0].uuid]
    with Path("seen.jsonl").open("a") as file:
        file.write(json.dumps(seen) + "\\n")
"""
PLAIN = """
import os
import pytest

@pytest.mark.gpu
@pytest.mark.parametrize("number", range(4))
def test_theirs(number):
    assert os.environ.get("CUDA_VISIBLE_DEVICES") is None
"""
ACTIVE = "[tool.harness]\n"
OTHERS = '[tool.pytest.ini_options]\nmarkers = ["gpu: theirs"]\n'
PLAN = ("--models", "tiny-gpt2", "--methods", "nf4,fp4", "--metrics", "memory.storage")


@dataclass
class Done:
    """A session: exit status, both outputs, and (worker, device, CUDA_VISIBLE_DEVICES, card) of each case that ran."""

    ret: int
    out: str
    err: str
    seen: list[tuple[Any, ...]]

    @property
    def by_worker(self) -> dict[str, set[tuple[str | None, str]]]:
        """What each worker saw in all of its cases."""
        found: dict[str, set[tuple[str | None, str]]] = {}
        for worker, _, visible, card in self.seen:
            found.setdefault(worker, set()).add((visible, card))
        return found


@dataclass
class Machine:
    """A folder with a project in it, on a machine with some cards."""

    path: Path
    log: Path  # of the processes that started the driver

    def run(self, *arguments: str, cards: int, table: str = ACTIVE, cases: str = CASES, **more: Any) -> Done:
        """A pytest session; what is not the driver's goes into the environment."""
        of_driver = {name: more.pop(name) for name in ("fails", "mig", "visible") if name in more}
        found = driver.variables(cards, log=self.log, **of_driver)
        for name, text in (("pyproject.toml", table), ("conftest.py", CONFTEST), ("test_all.py", cases)):
            (self.path / name).write_text(text)
        # loaded as an installed plugin is, by no word of the command line's; others that are installed take their time
        loaded = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "xdist.plugin,harness.plugin"}
        world = driver.world(found, PYTHONPATH=str(ROOT), **loaded, **more)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        given: dict[str, Any] = {"capture_output": True, "text": True, "timeout": LIMIT_SECONDS}
        done = subprocess.run(command, cwd=self.path, env=world, check=False, **given)
        noted = self.path / "seen.jsonl"
        lines = noted.read_text().splitlines() if noted.exists() else []
        return Done(done.returncode, done.stdout, done.stderr, [tuple(json.loads(line)) for line in lines])

    def python(self, *arguments: str, cards: int, **of_driver: Any) -> subprocess.CompletedProcess[str]:
        """A Python process on it."""
        world = driver.world(driver.variables(cards, log=self.log, **of_driver), PYTHONPATH=str(ROOT))
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=self.path, env=world, capture_output=True, text=True, check=False)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    (tmp_path / "project").mkdir()
    return Machine(tmp_path / "project", tmp_path / "driver.log")


# looking

LOOK = """
import ctypes, os, sys
from harness.core import gpus

def mine():
    return ctypes.CDLL("libcuda.so.1").cuInit(0)

def forked():
    child = os.fork()
    if not child:
        os._exit(mine())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

seen = []
for visible in ("1", "0", "1,0", ""):
    os.environ["CUDA_VISIBLE_DEVICES"] = visible
    seen.append([gpu.uuid[-1] for gpu in gpus.cuda_devices()])
assert seen == [["2"], ["1"], ["2", "1"], []], seen
assert gpus.smallest_card() == 40 << 30 and gpus.beside_card()
del os.environ["CUDA_VISIBLE_DEVICES"]
assert forked() == 0  # who looked has started nothing: a child can
assert mine() == 0
assert forked() == 3  # and this is what it is for
assert mine() == 0
assert len(gpus.cuda_devices()) == 2
"""


def test_a_look_is_of_the_moment_and_leaves_no_trace_in_the_process(machine: Machine) -> None:
    done = machine.python("-c", LOOK, cards=2)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("cards", "more", "lines"),
    [
        (0, {}, ["the CUDA driver finds no card (cuInit answers 100)"]),
        (1, {}, ["1", f"  0: {NAME}, 80 GiB, {FIRST}"]),
        (
            2,
            {},
            ["2", f"  0: {NAME}, 80 GiB, {FIRST}", f"  1: Stub H100 80GB (sm_90), 40 GiB, {SECOND}"],
        ),
        (2, {"visible": "7"}, ["the CUDA driver finds no card under CUDA_VISIBLE_DEVICES=7 (cuInit answers 100)"]),
        (2, {"fails": "cuInit:999"}, ["the CUDA driver does not start (cuInit answers 999): see nvidia-smi"]),
        (2, {"fails": "cuInit:804"}, ["the CUDA driver does not start (cuInit answers 804): see nvidia-smi"]),
        (1, {"fails": "cuDeviceGetName:46"}, ["the CUDA driver answers cuDeviceGetName with error 46: see nvidia-smi"]),
        (
            2,
            {"mig": True, "visible": f"{SLICE},{SLICE[:-1]}2"},
            ["1", f"  0: Stub H100 80GB MIG 1g.10gb (sm_90), 80 GiB, {SLICE}", f"  {gpus.ONE_PARTITION}"],
        ),
    ],
)
def test_doctor_says_what_the_driver_says(machine: Machine, cards: int, more: dict[str, Any], lines: list[str]) -> None:
    done = machine.python("-m", "harness", "doctor", cards=cards, **more)
    assert done.returncode == 0, done.stderr
    told = done.stdout.splitlines()
    begin = told.index(f"gpus: {lines[0]}")
    assert told[begin + 1 : begin + 1 + len(lines)][:-1] == lines[1:]
    assert told[begin + len(lines)].startswith("cache: ")
    assert f"device: {'cuda' if lines[1:] else 'cpu'}" in told


# workers


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, {("0", FIRST), ("1", SECOND)}), (f"{SECOND}, 0", {(SECOND, SECOND), ("0", FIRST)})],
)
def test_each_worker_has_a_card_and_asks_about_that_one(
    machine: Machine, visible: str | None, expected: set[tuple[str, str]]
) -> None:
    done = machine.run("-n", "2", "-m", "gpu", *PLAN, cards=2, visible=visible)
    assert done.ret == 1, done.out  # the stand-ins for cases leave no row
    assert {len(pairs) for pairs in done.by_worker.values()} == {1}
    pairs = {pair for found in done.by_worker.values() for pair in found}
    assert pairs == expected


def test_one_worker_takes_one_card_and_no_worker_leaves_the_list_alone(machine: Machine) -> None:
    assert machine.run("-n", "1", "-m", "gpu", *PLAN, cards=1).by_worker == {"gw0": {("0", FIRST)}}
    (machine.path / "seen.jsonl").unlink()
    assert machine.run("-m", "gpu", *PLAN, cards=2).by_worker == {"": {(None, FIRST)}}


def test_a_worker_that_replaces_a_dead_one_takes_its_card(machine: Machine) -> None:
    done = machine.run("-n", "2", "-m", "gpu", *PLAN, cards=2, DYING_WORKER="gw1")
    assert "replacing crashed worker gw1" in done.out
    assert done.by_worker == {"gw0": {("0", FIRST)}, "gw2": {("1", SECOND)}}


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({}, "2 workers but 1 GPU visible: use -n 1, each worker takes one GPU"),
        ({"mig": True}, "2 workers but 1 GPU visible: of a partitioned card (MIG) CUDA shows a process one instance"),
    ],
    ids=str,
)
def test_more_workers_than_cards_are_refused(machine: Machine, more: dict[str, Any], line: str) -> None:
    one_line(machine, machine.run("-n", "2", *PLAN, cards=1, **more), line)


@pytest.mark.parametrize(
    "arguments", [("--device", "cpu"), ("-m", "perplexity and not gpu", "--metrics", "perplexity")]
)
def test_cases_on_the_processor_pin_nothing(machine: Machine, arguments: tuple[str, ...]) -> None:
    done = machine.run("-n", "2", *PLAN, *arguments, cards=1)
    assert {(device, visible) for _, device, visible, _ in done.seen} == {("cpu", None)}
    assert len(done.by_worker) == 2


@pytest.mark.parametrize(
    ("table", "arguments", "cards"),
    [
        (OTHERS, "-n 2", 1),
        (OTHERS, "-n 2", 2),
        (OTHERS, "-n 2 -m gpu", 0),
        (ACTIVE, "-n 2", 1),
        (ACTIVE, "-n 2 -m gpu", 0),
    ],
    ids=lambda value: {OTHERS: "unrelated", ACTIVE: "own tests"}.get(value),
)
def test_sessions_without_a_case_are_left_alone(machine: Machine, table: str, arguments: str, cards: int) -> None:
    done = machine.run(*arguments.split(), cards=cards, table=table, cases=PLAIN)
    assert done.ret == 0, done.out + done.err
    assert "4 passed" in done.out
    assert table == ACTIVE or not machine.log.exists()  # nobody asked the driver


# no card


def one_line(machine: Machine, done: Done, line: str) -> None:
    """The session ended in a usage error: one line, before anything ran or was written."""
    assert done.ret == 4, done.out + done.err
    (told,) = [text for text in (done.out + done.err).splitlines() if "ERROR: " in text]
    assert line in told
    assert not any(word in done.out + done.err for word in ("Traceback", "INTERNALERROR", "cases planned"))
    assert done.seen == []


@pytest.mark.parametrize(
    ("arguments", "more", "reason"),
    [
        (("-m", "gpu"), {}, "finds no card (cuInit answers 100)"),
        (("-m", "gpu", "-n", "2"), {}, "finds no card (cuInit answers 100)"),
        (("--device", "cuda"), {"fails": "cuInit:999"}, "does not start (cuInit answers 999): see nvidia-smi"),
        (("-m", "gpu and memory"), {"visible": ""}, "finds no card under CUDA_VISIBLE_DEVICES= (cuInit answers 100)"),
    ],
    ids=str,
)
def test_no_card_is_one_line_with_the_drivers_reason(
    machine: Machine, arguments: tuple[str, ...], more: dict[str, Any], reason: str
) -> None:
    report = machine.path / "harness-report"
    report.mkdir()
    for name in ("measurements.jsonl", "report.md", "plan.json"):
        (report / name).write_text("of an earlier session")
    done = machine.run(*arguments, *PLAN, cards=0, **more)
    one_line(machine, done, f"no CUDA device: the CUDA driver {reason}; use --device cpu, or --allow-missing")
    assert {path.name: path.read_text() for path in report.iterdir()} == dict.fromkeys(
        ("measurements.jsonl", "report.md", "plan.json"), "of an earlier session"
    )


def test_listing_needs_no_card(machine: Machine) -> None:
    done = machine.run("-m", "gpu", "--co", "-q", *PLAN, cards=0)
    assert done.ret == 0, done.out + done.err
    assert done.out.count("/cuda]") == 3


@pytest.mark.parametrize("expression", ["gpu or cpu", "not gpu", "memory and not gpu"])
def test_where_the_processor_is_meant_too_its_cases_run(machine: Machine, expression: str) -> None:
    cases = CASES.replace("gpus.cuda_devices()[0].uuid", '""')
    done = machine.run("-m", expression, *PLAN, cards=0, cases=cases)
    assert done.ret == 1  # the stand-ins for cases leave no row
    assert "cases planned" in done.out
    assert [device for _, device, _, _ in done.seen].count("cpu") == 3
