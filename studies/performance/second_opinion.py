"""The harness's times and peaks beside those of a plain script (`plain.py`), in turns, on the embedded model."""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
from harness.report import markup
from studies import pages
from studies.performance.peers import ROOT, embedded

METHODS = ("fp32", "bf16", "fp16", "bnb-int8", "bnb-nf4")
ROUNDS, REPETITIONS = 3, 5
TIMES, PEAKS = ("prefill", "decode", "generate"), ("load_peak", "run_peak")
GENERATED = ("fp32", "bnb-nf4")  # 64 tokens by the others take minutes, and are prefill and decode again
NEAR = {**dict.fromkeys((*TIMES, "load"), 0.10), **dict.fromkeys(PEAKS, 0.05)}  # how far apart they may lie
HERE = Path(__file__).parent
KEPT = ROOT / "docs" / "studies" / "data" / "second_opinion.json"
# what made the harness's times nobody's, and where it weighs: many quick operations; a head that a frozen model copies
SEEDED = {
    "asleep": ("threads that sleep between operations", "fp32", "decode", ("--wait-policy", "passive")),
    "frozen": ("a model without gradients", "frozen-fp32", "prefill", ()),
}
FROZEN = """
import dataclasses
from harness import reference_method
right = reference_method(name="fp32", summary="the fp32 model, frozen", bits=32)
def load(*given):
    return right.load(*given).requires_grad_(False)
METHOD = dataclasses.replace(right, name="frozen-fp32", load=load)
"""


LOAD = """
import pathlib, sys, time
from harness.core import catalog
from harness.core.contracts import Checkpoint
from harness.core.specification import parse
from harness.methods.quantizing import arguments
folder, method = sys.argv[1:]
known = catalog.methods()[method]
for turn in range(2):
    start = time.perf_counter()
    given = arguments.resolve(parse(method), known, "cpu")
    model = known.load(Checkpoint(method, pathlib.Path(folder), ""), given, "cpu")
    seconds = time.perf_counter() - start
print(seconds)
"""


def members(method: str) -> list[str]:
    """What is timed of a method."""
    return [name for name in TIMES if name != "generate" or method in GENERATED]


def plain(folder: Path, method: str, only: str = "") -> dict[str, float]:
    """One run of the script, in the environment that this process was given; medians of its repetitions."""
    generate = [only] if only else ["generate"] if "generate" in members(method) else []
    command = [sys.executable, "-W", "ignore", str(HERE / "plain.py"), str(folder), method, str(REPETITIONS), *generate]
    world = {**os.environ, "HF_HUB_OFFLINE": "1", "BITSANDBYTES_NOWELCOME": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=world)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    return {name: statistics.median(value) if isinstance(value, list) else value for name, value in found.items()}


def measured(folder: Path, method: str) -> dict[str, float]:
    """One session of the harness, and one load of its own in a process of its own."""
    wanted = [*(f"latency.{name}" for name in members(method)), *(f"memory.{name}" for name in PEAKS)]
    return {**session(folder, method, wanted), "load": loaded(folder, method)}


def loaded(folder: Path, method: str) -> float:
    """Seconds of the harness's second load in a process, behind every import, as the script times its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, str(folder), method], capture_output=True, text=True, check=True
    )
    return float(done.stdout.strip().splitlines()[-1])


def seeded(folder: Path, cause: str) -> dict[str, float]:
    """One of two causes of earlier releases, which made their times those of nobody's script."""
    _, method, what, more = SEEDED[cause]
    return session(folder, method, [f"latency.{what}"], *more)


def session(folder: Path, method: str, wanted: Sequence[str], *more: str) -> dict[str, float]:
    """Figures of one session of the harness, by name."""
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "-m", "harness", "run", "--models", f"path:{folder}", "--methods", method]
        command += ["--metrics", ",".join(wanted), "--device", "cpu", "--report-dir", "report"]
        command += ["--repetitions", str(REPETITIONS), *more]
        (Path(home) / "frozen.py").write_text(FROZEN)
        (Path(home) / "pyproject.toml").write_text('[tool.harness]\nmethods = ["frozen.py"]\n')
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False, cwd=home)
        rows = harness.read_report(Path(home) / "report").rows
    found = {row.metric.partition(".")[2]: row.value or math.nan for row in rows if row.method == method}
    crowded = any(row.detail.get("crowded") for row in rows)
    return {**found, "crowded": crowded}


def measure(models: Sequence[str]) -> dict[str, Any]:
    """All methods, script and harness in turns whose order alternates; of `load` alone, where it is named."""
    folder, found = embedded(), dict[str, dict[str, list[Mapping[str, float]]]]()
    if list(models) == ["load"]:
        kept: dict[str, Any] = pages.read(KEPT)["results"]
        for turn, method in itertools.product(range(ROUNDS), METHODS):
            kept["second"][method]["plain"][turn]["load"] = plain(folder, method, "load")["load"]
            kept["second"][method]["harness"][turn]["load"] = loaded(folder, method)
        return kept
    for turn in range(ROUNDS):
        for method in METHODS:
            sides = {"plain": plain, "harness": measured}
            for side in list(sides)[:: 1 if turn % 2 else -1]:
                print(f"second_opinion: round {turn + 1} of {ROUNDS}, {method}, {side}", file=sys.stderr, flush=True)
                found.setdefault(method, {}).setdefault(side, []).append(sides[side](folder, method))
        for cause in SEEDED:
            found.setdefault(cause, {}).setdefault("harness", []).append(seeded(folder, cause))
    return {"second": found}


def middle(runs: Sequence[Mapping[str, float]], name: str) -> float:
    """The median over rounds."""
    return statistics.median(run[name] for run in runs)


def figure(runs: Sequence[Mapping[str, float]], name: str, scale: float) -> str:
    """'402 (371 to 441)': the median over rounds, with the least and the most."""
    values = [run[name] / scale for run in runs]
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def ratios(results: Mapping[str, Any], method: str, side: str, name: str) -> tuple[float, float, float]:
    """A method's time over fp32's of the same side: median, least and most over rounds."""
    pairs = zip(results[method][side], results["fp32"][side], strict=True)
    found = [ours[name] / theirs[name] for ours, theirs in pairs]
    return statistics.median(found), min(found), max(found)


def render(results: Mapping[str, Any]) -> str:
    """Each figure by both, and each time's ratio to fp32 by both."""
    second, rows, sides, causes = results["second"], [], [], []
    for method in METHODS:
        runs = second[method]
        for name in (*TIMES, "load", *PEAKS):
            if name not in runs["plain"][0]:
                continue
            scale, unit = (2**20, "MiB") if name in PEAKS else (1e-3, "ms")
            script, ours = middle(runs["plain"], name), middle(runs["harness"], name)
            apart = ours / script - 1
            near = "yes" if abs(apart) <= NEAR[name] else "**no**"
            figures = [f"{figure(runs[side], name, scale)} {unit}" for side in ("plain", "harness")]
            rows.append([f"`{method}`", name.replace("_", " "), *figures, f"{100 * apart:+.0f}%", near])
            if method != "fp32" and name in TIMES and name in second["fp32"]["plain"][0]:
                script_ratio, own = (ratios(second, method, side, name) for side in ("plain", "harness"))
                alike = (script_ratio[0] - 1) * (own[0] - 1) > 0 or abs(script_ratio[0] - own[0]) < NEAR[name]
                overlap = script_ratio[1] <= own[2] and own[1] <= script_ratio[2]
                texts = (f"{ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f})" for ratio in (script_ratio, own))
                sides.append([f"`{method}`", name, *texts, *("yes" if kept else "**no**" for kept in (alike, overlap))])
    for cause, (words, name, what, _) in SEEDED.items():
        method = name.removeprefix("frozen-")
        script, right = (middle(second[method][side], what) for side in ("plain", "harness"))
        apart = middle(second[cause]["harness"], what) / script - 1
        seen = "yes" if abs(apart) > NEAR[what] else "**no**"
        shown = [f"{100 * (right / script - 1):+.0f}%", f"{100 * apart:+.0f}%", seen]
        causes.append([words, f"`{method}`'s {what}", *shown])
    crowded = sum(bool(run["crowded"]) for runs in second.values() for run in runs["harness"])
    return (
        f"A plain script (`studies/performance/plain.py`) and `python -m harness run` in turns, {ROUNDS} rounds, each "
        f"in a process of its own, on the embedded model; medians over rounds of medians of {REPETITIONS} "
        "repetitions (of `generate` fewer), with the least and the most of the rounds. The script runs in the "
        "environment that a user's shell has. `load` is the second one of a process, from the page cache (`--models "
        f"load` measures it alone). In {crowded} of the harness's "
        f"{sum(len(runs['harness']) for runs in second.values())} sessions other work was found beside a time.\n\n"
        + markup.table(["method", "what", "script", "harness", "apart", "near (10%, peaks 5%)"], rows)
        + "\n\nThe ratio to fp32 of the same side, with the least and the most of the rounds:\n\n"
        + markup.table(["method", "what", "script", "harness", "same side of 1", "overlap"], sides)
        + "\n\nTwo causes that made the harness's times nobody else's, seeded (distance to the script's):\n\n"
        + markup.table(["cause", "on", "without", "with", "noticed, beyond 10%"], causes)
    )


DOCUMENT = pages.Document(
    "second_opinion", "A second opinion on times", measure, render, script="performance.second_opinion"
)

if __name__ == "__main__":
    raise SystemExit(pages.run(DOCUMENT))
