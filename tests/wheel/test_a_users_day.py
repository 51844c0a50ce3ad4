"""A user's whole day with the built wheel, in a folder of their own: `tox run -e wheel`; elsewhere it skips.

Own model, text and quantizer; record, measure again, break the quantizer and fail; compare,
export, upgrade; invariants.
Every step is a process of its own in a folder that knows nothing of the clone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

QUANTIZER = '''\
"""my-int6: symmetric 6-bit codes, a scale a row."""

from harness import weight_method


def quantize(weight):
    scale = (weight.abs().amax(dim=1, keepdim=True) / 31).clamp_min(1e-12)
    return {"codes": (weight / scale).round_().char(), "scale": scale}


def dequantize(stored, shape):
    return stored["codes"].float() * stored["scale"]


METHOD = weight_method(
    name="my-int6", summary="6-bit codes", bits=6, quantize=quantize, dequantize=dequantize, parameters={}, core=False
)
'''
BROKEN = QUANTIZER.replace("/ 31)", "/ 31 * 4)")  # a scale four times too coarse
PROJECT = """\
[tool.harness]
methods = ["quantizer.py"]
[tool.harness.models]
mine = "path:model"
[tool.harness.datasets]
notes = "text:notes.txt"
"""
PACKAGE = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "my-quantizer"
version = "{version}"
[project.entry-points."harness.methods"]
my-int6 = "my_quantizer:METHOD"
[tool.setuptools]
py-modules = ["my_quantizer"]
"""
MEASURE = (
    *("--models", "mine", "--methods", "my-int6,absmax-int8,bnb-nf4", "--datasets", "notes", "--protocols"),
    *("chunk:128", "--max-tokens", "2048", "--metrics", "perplexity,memory", "-q"),
)
CASES = ("--pyargs", "harness.cases.test_measured", "-p", "no:cacheprovider")


class Day:
    """A folder, and commands that run in it as a user's would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kept = ("PYTHONPATH", "PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST", "COV", "TOX_")
        self.world = {name: value for name, value in os.environ.items() if not name.startswith(kept)}

    def run(self, *words: str, status: int = 0) -> str:
        """What `python -m ...` prints, both streams; its exit status must be the one named."""
        command = [sys.executable, "-m", *words]
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.world,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == status, f"{' '.join(words)}: {done.returncode}\n{done.stdout}"
        return done.stdout

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def rows(self, report: str) -> list[dict[str, object]]:
        lines = (self.folder / report / "measurements.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> Day:
    made = Day(tmp_path_factory.mktemp("day"))
    made.write("where.py", "import harness; print(harness.__file__)")
    home = Path(made.run("where").strip())
    if "site-packages" not in home.parts:
        pytest.skip("this environment holds no wheel: tox run -e wheel")
    shutil.copytree(home.parent / "inputs" / "models" / "tiny" / "gpt2", made.folder / "model")
    lines = (f"Line {number}: the {number * 7 % 13}th of {number % 5} apples fell." for number in range(2000))
    made.write("notes.txt", "\n".join(lines))
    made.write("quantizer.py", QUANTIZER)
    made.write("pyproject.toml", PROJECT)
    return made


def test_the_commands_know_themselves(day: Day) -> None:
    version = day.run("harness", "--version").split()[1]
    script = Path(sys.executable).with_name("harness-quant")
    told = subprocess.run(
        [script, "--version"], cwd=day.folder, env=day.world, capture_output=True, check=True, text=True
    )
    assert told.stdout.split()[1] == version
    assert "known faults that apply here" in day.run("harness", "doctor")
    assert "published" in day.run("harness", "published", "--json")
    assert "MiB" in day.run("harness", "memory", "mine", "--method", "my-int6")
    assert "MiB" in day.run("harness", "cache")


def test_measure_record_and_measure_again(day: Day) -> None:
    first = day.run("pytest", *CASES, *MEASURE, "--report-dir", "first")
    assert {row["verdict_baseline"] for row in day.rows("first")} == {"unrecorded"}, first
    assert (day.folder / "first" / "report.html").is_file()
    day.run("pytest", *CASES, *MEASURE, "--report-dir", "recorded", "--regen-all")
    assert (day.folder / "baselines" / "mine").is_dir()
    day.run("pytest", *CASES, *MEASURE, "--report-dir", "again", "--require-baselines")
    assert {row["verdict_baseline"] for row in day.rows("again")} == {"same"}
    day.run("harness", "compare", "recorded", "again")


def test_a_broken_quantizer_fails_and_names_itself(day: Day) -> None:
    day.write("quantizer.py", BROKEN)
    try:
        failed = day.run("pytest", *CASES, *MEASURE, "--report-dir", "broken", status=1)
    finally:
        day.write("quantizer.py", QUANTIZER)
    harmed = {row["method"] for row in day.rows("broken") if row["verdict"] in ("worse", "out of bound")}
    assert harmed == {"my-int6"}, failed
    assert "worse: mine/my-int6" in failed
    assert "worse" in day.run("harness", "compare", "again", "broken", status=1)


def test_what_others_read(day: Day) -> None:
    day.run("harness", "report", "again")
    assert day.run("harness", "export", "again", "--to", "csv").count("\n") == len(day.rows("again")) + 1
    assert "Nothing to record" in day.run("harness", "rebaseline", "again")


def test_an_upgrade_of_their_own_package(day: Day) -> None:
    for version, code in (("1.0", QUANTIZER), ("1.1", BROKEN)):
        day.write(f"v{version}/my_quantizer.py", code)
        day.write(f"v{version}/pyproject.toml", PACKAGE.format(version=version))
    day.write("pyproject.toml", PROJECT.replace('methods = ["quantizer.py"]\n', ""))
    day.run("pip", "install", "--quiet", "--no-deps", "--target", "installed", "./v1.0")
    day.world["PYTHONPATH"] = "installed"  # an environment of the package's tests is not theirs to change
    told = day.run(
        *("harness", "upgrade", "v1.0", "v1.1", "--models", "mine", "--methods", "my-int6", "--datasets", "notes"),
        *("--protocols", "chunk:128", "--max-tokens", "2048", "--metrics", "perplexity,memory"),
        status=1,
    )
    day.world.pop("PYTHONPATH")
    day.write("pyproject.toml", PROJECT)
    assert "worse" in told


def test_invariants_are_green(day: Day) -> None:
    day.run(
        "pytest", "--pyargs", "harness.cases", "-m", "invariant", "-q", "-p", "no:cacheprovider", "-p", "harness.plugin"
    )
