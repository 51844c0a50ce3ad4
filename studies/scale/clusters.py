"""How a matrix is spread over workers, an array of jobs or a CI matrix, each example tried -> docs/clusters.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from studies import pages

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
SHARDS = 3
OPTIONS = (
    "--pyargs harness.cases --models tiny-gpt2 --methods absmax-int8,nf4 --metrics perplexity,memory.storage "
    "--datasets synthetic --protocols chunk:128 --max-tokens 1024 -q"
)
ONE = f"pytest {OPTIONS} -n 2 --report-dir one"
PROJECT = "[tool.harness]\n"  # so that the short options exist
FREE = ("seconds", "check")  # of a row, between two runs on one machine

ABOUT = """\
Whatever spreads the work, the options are the same everywhere, every case is measured once, and the report is that of
one run. The commands below were run as they stand, with the tiny model; beneath each is what it printed at its end."""

CARDS = """\
With several CUDA devices visible, each of `-n N` workers gets one where a selected case needs a card; more workers than
cards are refused. Timed cases run with nothing of the same machine beside them. No card was at hand here: this command
was not tried.

    pytest -m gpu --models gpt2,olmo-1b -n 4"""

SLURM = """\
Each job of the array measures one shard: [measure.sbatch](examples/measure.sbatch), and one job joins them when all
have ended, whether well or not: [merge.sbatch](examples/merge.sbatch).

    job=$(sbatch --parsable measure.sbatch)
    sbatch --dependency=afterany:$job merge.sbatch"""

CI = """\
[matrix.yml](examples/matrix.yml) is a workflow for GitHub Actions: a matrix of shards, and a job that merges what came.
Its merge runs though a shard failed, and its status tells: 0 complete and fine, 1 harm, 3 cases are missing."""

RAY = """\
Where Ray runs, it hands out the groups, tries again what a lost node had in its hands, and rows come back to the one
pytest that writes the report. What a two-node cluster did that lost a node half-way: [ray.md](studies/ray.md).

    pytest --engine ray --ray-address auto -m gpu --models gpt2,olmo-1b
    python -m harness run --engine ray --models gpt2"""


def tried(command: str, home: Path, **variables: str) -> dict[str, Any]:
    """What a shell line printed at its end, and its exit status."""
    world = {**os.environ, **variables}
    world["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{world['PATH']}"
    done = subprocess.run(["bash", "-c", command], cwd=home, env=world, capture_output=True, text=True, check=False)
    text = done.stdout.replace(f"{home}{os.sep}", "")  # a scratch folder's name says nothing
    lines = [line for line in text.splitlines() if re.search(r"planned|shards|^missing|^report:", line)]
    return {"status": done.returncode, "said": lines or (done.stdout + done.stderr).splitlines()[-3:]}


def differing(one: Path, other: Path) -> list[str]:
    """Measurements and lines of two report directories that differ, times and the command line aside."""
    rows = [
        [
            {name: value for name, value in json.loads(line).items() if name not in FREE}
            for line in (folder / "measurements.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for folder in (one, other)
    ]
    ours, theirs = (sorted(found, key=lambda row: json.dumps(row, sort_keys=True)) for found in rows)
    texts = [
        [line for line in (folder / "report.md").read_text(encoding="utf-8").splitlines() if "    pytest" not in line]
        for folder in (one, other)
    ]
    unequal = [f"{a['metric']} of {a['method']}" for a, b in zip(ours, theirs, strict=True) if a != b]
    return unequal + [f"{a} / {b}" for a, b in zip(*texts, strict=True) if a != b]


def steps(workflow: Mapping[str, Any], job: str) -> list[str]:
    """The shell lines of a workflow's job, without its installation."""
    return [step["run"] for step in workflow["jobs"][job]["steps"] if step.get("name") == job]


def measure(models: Sequence[str]) -> dict[str, Any]:
    """Run every example; `models` says nothing here."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
        results: dict[str, Any] = {"one": tried(ONE, home)}
        for name in ("slurm", "ci"):
            (home / name).mkdir()
            (home / name / "pyproject.toml").write_text(PROJECT, encoding="utf-8")
        script = f"bash {EXAMPLES / 'measure.sbatch'}"
        number = {"SLURM_ARRAY_TASK_COUNT": str(SHARDS)}
        results["slurm"] = [
            tried(script, home / "slurm", SLURM_ARRAY_TASK_ID=str(index), **number) for index in range(1, SHARDS + 1)
        ]
        few = "python -m harness merge shards/1 shards/3 -o few"
        results["few"] = tried(few, home / "slurm")
        results["slurm_merge"] = tried(f"bash {EXAMPLES / 'merge.sbatch'}", home / "slurm")
        workflow = yaml.safe_load((EXAMPLES / "matrix.yml").read_text(encoding="utf-8"))
        results["ci"] = [
            tried(line.replace("${{ matrix.shard }}", str(index)), home / "ci")
            for index in workflow["jobs"]["measure"]["strategy"]["matrix"]["shard"]
            for line in steps(workflow, "measure")
        ]
        (results["ci_merge"],) = (tried(line, home / "ci") for line in steps(workflow, "merge"))
        wholes = {name: home / name / "whole" for name in ("slurm", "ci")}
        results["differing"] = {name: differing(home / "one", whole) for name, whole in wholes.items()}
        return results


def block(text: str) -> str:
    """Indented, as code."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def told(*found: Mapping[str, Any]) -> str:
    """What commands printed at their ends, with their exit statuses."""
    lines = []
    for one in found:
        lines += [*one["said"], f"(exit status {one['status']})"]
    return block("\n".join(lines))


def equal(differences: Sequence[str]) -> str:
    """How a merged report compares with that of one run."""
    if differences:
        return f"It differs from one run's in: {'; '.join(differences)}."
    return "Its measurements and its report are those of the one run above, seconds and the command line aside."


def file(name: str) -> str:
    """An example's text as a code block."""
    return block((EXAMPLES / name).read_text(encoding="utf-8"))


def render(results: Mapping[str, Any]) -> str:
    """The page."""
    few = "A shard that never came is named, and the cases that it would have measured are `missing`:"
    return "\n\n".join(
        [
            ABOUT,
            "## One machine",
            "`-n N` hands the groups (a model under a method) to N workers, dearest first by predicted cost.",
            block(ONE),
            told(results["one"]),
            "## Many cards",
            CARDS,
            "## A Slurm array",
            SLURM,
            file("measure.sbatch"),
            f"Tried without Slurm, its two variables set by hand, as jobs 1 to {SHARDS}:",
            told(*results["slurm"]),
            few,
            block("python -m harness merge shards/1 shards/3 -o few"),
            told(results["few"]),
            "All of them, by merge.sbatch:",
            told(results["slurm_merge"]),
            equal(results["differing"]["slurm"]),
            "## A CI matrix",
            CI,
            file("matrix.yml"),
            "Tried without the service: the lines of its steps *measure* and *merge*, one after another.",
            told(*results["ci"], results["ci_merge"]),
            equal(results["differing"]["ci"]),
            "## A cluster with Ray",
            RAY,
        ]
    )


DOCUMENT = pages.Document(
    "clusters",
    "One machine, many cards, a cluster, a CI matrix",
    measure,
    render,
    script="scale.clusters",
    folder="docs",
)

if __name__ == "__main__":
    sys.exit(pages.run(DOCUMENT))
