"""The fuzzers at length: how many examples each module of tests/fuzz was tried on, and what failed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[2]
EXAMPLES = re.compile(r"(\d+) passing(?: examples?)?, (\d+) failing")  # newer Hypotheses leave out 'examples'
NAMED = re.compile(r"^(tests/fuzz/\w+\.py)::")
ABOUT = {
    "test_baselines": "baselines, bounds, known faults",
    "test_models": "model folders, safetensors, GGUF, tokenizers",
    "test_names": "specifications, `[tool.harness]` tables",
    "test_reports": "measurements and tables of a report",
    "test_texts": "dataset files",
}


def measure(scale: int) -> dict[str, Any]:
    """Run tests/fuzz with `scale` times the short profile's examples."""
    with tempfile.TemporaryDirectory(prefix="harness-fuzz-") as name:
        kept = Path(name) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "tests/fuzz", "-p", "no:cacheprovider", "-q"]
        done = subprocess.run(
            [*command, "--hypothesis-show-statistics", f"--junitxml={kept}"],
            cwd=ROOT,
            env={**os.environ, "HARNESS_FUZZ": str(scale)},
            capture_output=True,
            text=True,
            check=False,
        )
        if not kept.is_file():
            raise RuntimeError(f"the fuzzers did not run:\n{done.stdout}{done.stderr}")
        return {"scale": scale, "modules": counted(done.stdout, ElementTree.parse(kept).getroot())}


def counted(output: str, tests: ElementTree.Element) -> dict[str, Any]:
    """By module: tests, examples, failures, seconds."""
    found: dict[str, dict[str, Any]] = {}
    for case in tests.iter("testcase"):
        module = case.get("classname", "").rpartition(".")[2]
        mine = found.setdefault(module, {"tests": 0, "examples": 0, "failed": 0, "seconds": 0.0})
        mine["tests"] += 1
        mine["failed"] += any(child.tag in ("failure", "error") for child in case)
        mine["seconds"] = round(mine["seconds"] + float(case.get("time", 0)), 1)
    module = ""
    for line in output.splitlines():
        if named := NAMED.match(line):
            module = Path(named[1]).stem
        elif module in found and (counts := EXAMPLES.search(line)):
            found[module]["examples"] += int(counts[1]) + int(counts[2])
    if not any(one["examples"] for one in found.values()):
        raise RuntimeError("Hypothesis told no number of examples that is understood here")
    return found


def rows(results: Mapping[str, Any]) -> list[list[str]]:
    """The page's table."""
    return [
        [
            ABOUT.get(module, module),
            *(f"{one[key]:,}" for key in ("tests", "examples")),
            f"{one['seconds']:.0f}",
            str(one["failed"]),
        ]
        for module, one in sorted(results["modules"].items())
    ]
