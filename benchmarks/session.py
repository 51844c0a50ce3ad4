"""What a session costs beside the work: overhead, resume, the start of commands, and growth with tokens and cases."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peers import ROOT, middle

from harness import documents
from harness.report import writing

METHODS = ("fp32", "absmax-int8", "linear-int4", "nf4")
TOKENS = (1024, 2048, 4096)
STARTS = 5  # repetitions of a command's start


def session(folder: Path, methods: Sequence[str], tokens: int, *more: str) -> dict[str, float]:
    """One session's wall time, the seconds of its rows, and how many there are."""
    command = [
        sys.executable, "-m", "pytest", "tests/cases/test_measured.py", "-q", "-p", "no:cacheprovider",
        "--methods", ",".join(methods), "--metrics", "perplexity,memory", "--max-tokens", str(tokens),
        "--report-dir", str(folder), *more,
    ]  # fmt: skip
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, capture_output=True)
    wall = time.perf_counter() - start
    lines = [json.loads(line) for line in (folder / "measurements.jsonl").read_text().splitlines()]
    measured = [line for line in lines if line.get("value") is not None]
    return {"wall": wall, "inside": sum(line["seconds"] for line in measured), "rows": len(measured)}


def starts(folder: Path) -> dict[str, float]:
    """Median seconds of whole commands on a small report."""
    commands = {
        "python -c pass": ["-c", "pass"],
        "python -m harness report --help": ["-m", "harness", "report", "--help"],
        "python -m harness compare A A": ["-m", "harness", "compare", str(folder), str(folder)],
        "python -m harness report A": ["-m", "harness", "report", str(folder)],
    }
    found = {}
    for name, words in commands.items():
        seconds = []
        for _ in range(STARTS):
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True)
            seconds.append(time.perf_counter() - start)
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
        f"{writing.table(['growing', 'count', 'rows', 'wall s', 'inside s', 'beside s'], rows)}\n\n"
        f"{writing.table(['command, whole', 'seconds'], commands)}"
    )


if __name__ == "__main__":
    raise SystemExit(documents.run(documents.Document("session", "What a session costs", measure, render)))
