"""What a session costs beside the work: overhead, resume, the start of commands, and growth with tokens and cases."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.report import markup
from harness.report.plots import style
from studies import pages
from studies.performance.engine import kept
from studies.performance.peers import ROOT, middle

METHODS = ("fp32", "absmax-int8", "nf4")
TOKENS = (512, 1024, 2048)
STARTS = 5  # repetitions of a command's start
CURVE = "performance-session.svg"
OVERHEAD = 0.05  # of the main job, at most


def world() -> dict[str, str]:
    """The environment of a user's shell, in which Python keeps its bytecode and does not compile all anew."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def session(folder: Path, methods: Sequence[str], tokens: int, *more: str) -> dict[str, float]:
    """One session of perplexity and memory under some methods."""
    chosen = ["--methods", ",".join(methods), "--metrics", "perplexity,memory", "--max-tokens", str(tokens)]
    return timed(folder, *chosen, *more)


def timed(folder: Path, *options: str) -> dict[str, float]:
    """One session's wall time, the seconds of its rows, and how many there are."""
    command = [
        sys.executable, "-m", "pytest", "tests/cases/test_measured.py", "-q", "-p", "no:cacheprovider",
        "--report-dir", str(folder), *options,
    ]  # fmt: skip
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, capture_output=True, env=world())
    wall = time.perf_counter() - start
    lines = [json.loads(line) for line in (folder / "measurements.jsonl").read_text().splitlines()]
    measured = [line for line in lines if line.get("value") is not None]
    return {"wall": wall, "inside": sum(line["seconds"] for line in measured), "rows": len(measured)}


def starts(folder: Path) -> dict[str, float]:
    """Median seconds of whole commands on a small report."""
    commands = {
        "python -c pass": ["-c", "pass"],
        "python -c 'import numpy'": ["-c", "import numpy"],
        "python -m harness report --help": ["-m", "harness", "report", "--help"],
        "python -m harness compare A A": ["-m", "harness", "compare", str(folder), str(folder)],
        "python -m harness report A": ["-m", "harness", "report", str(folder)],
    }
    found = {}
    for name, words in commands.items():
        seconds = []
        for turn in range(-1, STARTS):  # the first one only warms the caches
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, env=world())
            seconds += [time.perf_counter() - start] * (turn >= 0)
        found[name] = middle(seconds)
    return found


def measure(models: Sequence[str]) -> dict[str, Any]:
    """Sessions over tokens, over methods, one resumed, and the commands on the last one's report."""
    with tempfile.TemporaryDirectory() as home:
        tokens = {str(count): session(Path(home) / f"t{count}", METHODS[:2], count) for count in TOKENS}
        cases = {
            str(count): session(Path(home) / f"m{count}", METHODS[:count], TOKENS[0])
            for count in range(1, len(METHODS) + 1)
        }
        report = Path(home) / f"m{len(METHODS)}"
        resumed = session(report, METHODS, TOKENS[0], "--resume")
        return {"session": {"tokens": tokens, "cases": cases, "resumed": resumed, "starts": starts(report)}}


def measure_main(models: Sequence[str]) -> dict[str, Any]:
    """The main job, as `tox run -e report` runs it."""
    folder = ROOT / "harness-report"  # kept: the tables of README and docs/explanation/main-job.md are its report's
    shutil.rmtree(folder, ignore_errors=True)
    return {"main": timed(folder)}


def render_main(results: Mapping[str, Any]) -> str:
    """What lies beside the work."""
    one = results["main"]
    beside = one["wall"] - one["inside"]
    return (
        f"## The main job\n\nThe session of `tox run -e report`: {one['rows']} rows in {one['wall']:.0f} s, of which "
        f"{one['inside']:.0f} s inside load, quantize, forward and timing loops; {beside:.1f} s beside, "
        f"{100 * beside / one['wall']:.1f}% (at most {100 * OVERHEAD:.0f}%: {kept(beside <= OVERHEAD * one['wall'])})."
    )


def curve(results: Mapping[str, Any]) -> dict[str, str]:
    """Wall time against tokens and against methods, each with the straight line through its ends."""
    from matplotlib.figure import Figure

    if "session" not in results:
        return {}
    with style():
        canvas = Figure(figsize=(7.6, 2.8), layout="constrained")
        for panel, (name, label) in zip(
            canvas.subplots(1, 2), (("tokens", "tokens, two methods"), ("cases", "methods")), strict=True
        ):
            counts = [int(count) for count in results["session"][name]]
            walls = [one["wall"] for one in results["session"][name].values()]
            panel.plot(counts, walls, "o", color="#1F5FA8", label="session")
            panel.plot([counts[0], counts[-1]], [walls[0], walls[-1]], color="#888888", lw=1, label="straight line")
            limits = {"xlim": (0, 1.08 * counts[-1]), "ylim": (0, 1.1 * max(walls))}  # no point is cut
            panel.set(xlabel=label, ylabel="wall time, s", xticks=counts, **limits)
        canvas.axes[0].legend(frameon=False)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Title": "Growth of a session"})
    return {CURVE: buffer.getvalue()}


def straightness(points: Mapping[str, Mapping[str, float]]) -> float:
    """Largest distance of a wall time from the line through the first and the last, as a share of it."""
    counts, walls = [int(count) for count in points], [one["wall"] for one in points.values()]
    slope = (walls[-1] - walls[0]) / (counts[-1] - counts[0])
    lines = [walls[0] + slope * (count - counts[0]) for count in counts]
    return max(abs(wall / line - 1) for wall, line in zip(walls, lines, strict=True))


def render(results: Mapping[str, Any]) -> str:
    """The tables."""
    found = results["session"]
    rows = [
        [
            what,
            count,
            f"{one['rows']}",
            f"{one['wall']:.1f}",
            f"{one['inside']:.1f}",
            f"{one['wall'] - one['inside']:.1f}",
        ]
        for what, name in (("tokens", "tokens"), ("methods", "cases"))
        for count, one in found[name].items()
    ]
    resumed = found["resumed"]
    rows.append(["the last again with --resume", "", f"{resumed['rows']}", f"{resumed['wall']:.1f}", "", ""])
    commands = [[f"`{name}`", f"{seconds:.2f}"] for name, seconds in found["starts"].items()]
    return (
        f"## The session\n\nPerplexity and memory of {', '.join(f'`{name}`' for name in METHODS)} on the embedded "
        f"model; over tokens the first two, over methods at {TOKENS[0]:,} tokens. `inside` is the sum of the rows' "
        "`seconds`: load, quantize, forward, timing loops.\n\n"
        f"{markup.table(['growing', 'count', 'rows', 'wall s', 'inside s', 'beside s'], rows)}\n\n"
        f"![Wall time against tokens and methods]({CURVE})\n\n"
        f"From the straight line through the ends of a curve, no session is further than "
        f"{100 * straightness(found['tokens']):.1f}% (tokens) and "
        f"{100 * straightness(found['cases']):.1f}% (methods).\n\n"
        f"{markup.table(['command, whole (at most 0.5 s)', 'seconds'], commands)}"
    )


if __name__ == "__main__":
    raise SystemExit(
        pages.run(pages.Document("session", "What a session costs", measure, render, script="performance.session"))
    )
