"""Whole pytest runs in a scratch project, against the trained tiny model and a package of misbehaving methods."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.core.files import cache_dir

CACHE = cache_dir()  # of the real home: pytester moves HOME

BASE = "-p no:cacheprovider --models tiny-gpt2 --datasets synthetic --max-tokens 1024 --repetitions 3".split()
FAULTS = '''
"""Methods that go wrong, each in its own way."""
import dataclasses, os, signal
from harness.methods.references import METHODS

FP32 = METHODS[0]


def faulty(name, act):
    def load(checkpoint, arguments, device):
        return act(FP32.load(checkpoint, dataclasses.replace(arguments, dtype="fp32"), device))
    return dataclasses.replace(FP32, name=name, load=load, core=False)


def kill(number):
    return lambda model: os.kill(os.getpid(), number)


def exhaust(model):
    raise MemoryError("asked for 99 TiB")


def poison(model):
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    return model


def stumble(model):
    raise KeyError("a bug")


SEGFAULT = faulty("segfault", kill(signal.SIGSEGV))
KILLED = faulty("killed", kill(signal.SIGKILL))
OOM = faulty("oom", exhaust)
POISON = faulty("poison", poison)
BUG = faulty("bug", stumble)
WANTED = ["transformer.h.0.attn.c_attn"]
LAZY = dataclasses.replace(FP32, name="lazy", core=False, targets=lambda model, arguments: WANTED)
'''
POINTS = "[harness.methods]\n" + "".join(
    f"{name} = faults:{name.upper()}\n" for name in ("segfault", "killed", "oom", "poison", "bug", "lazy")
)


class Project:
    """A scratch project in which the harness is active."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        self.path = pytester.path
        self.write("pyproject.toml", "[tool.harness]\n")
        self.write("test_cases.py", "from harness.cases.test_measured import test_measured\n")

    def write(self, name: str, text: str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def run(self, *arguments: str) -> pytest.RunResult:
        return self.pytester.runpytest_subprocess(*BASE, *arguments)

    def look(self, *arguments: str) -> pytest.RunResult:
        """`run` in this process, where nothing is measured: a second less each."""
        return self.pytester.runpytest_inprocess(*BASE, *arguments)

    def rows(self, folder: str = "harness-report") -> list[dict[str, Any]]:
        lines = (self.path / folder / "measurements.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def identities(self, folder: str = "harness-report") -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = json.loads((self.path / folder / "identities.json").read_text())
        return found

    def report(self, folder: str = "harness-report") -> str:
        return (self.path / folder / "report.md").read_text()


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("HARNESS_CACHE", str(CACHE))
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):  # of a workflow that runs these tests
        monkeypatch.delenv(name, raising=False)
    site = pytester.path / "site"
    info = site / "faults-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "faults.py").write_text(FAULTS)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faults\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(site), os.environ.get("PYTHONPATH", ""))))
    return Project(pytester)


@pytest.fixture
def by_metric() -> Callable[[list[dict[str, Any]], str], dict[str, dict[str, Any]]]:
    def of(rows: list[dict[str, Any]], method: str) -> dict[str, dict[str, Any]]:
        return {row["metric"]: row for row in rows if row["method"] == method}

    return of
