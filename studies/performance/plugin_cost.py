"""What the installed plugin costs a project that does not use it: `pytest --co -q` with and without it, in pairs.

python -m studies.performance.plugin_cost prints the figures that docs/pytest.md names. A scratch project with one
trivial test; both sides load every other installed plugin; who goes first alternates from pair to pair.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

PAIRS = 15
WITHOUT = ("-p", "no:harness.plugin")


def run(folder: Path, arguments: Sequence[str]) -> tuple[float, float]:
    """Milliseconds of one session: by the clock, and of the processor (user and system), which other work moves less.

    Raises:
        RuntimeError: pytest did not end with 0.
    """
    command = [sys.executable, "-m", "pytest", "--co", "-q", "-p", "no:cacheprovider", *arguments]
    world = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=world, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds * 1000, busy * 1000


def measure(pairs: int) -> dict[str, list[tuple[float, float]]]:
    """(clock, processor) milliseconds of every session by side, in order; one pair before them fills the caches."""
    sides: dict[str, Sequence[str]] = {"with": (), "without": WITHOUT}
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    with tempfile.TemporaryDirectory(prefix="plugin-cost-") as name:
        folder = Path(name)
        (folder / "test_one.py").write_text("def test_one():\n    pass\n")
        for number in range(pairs + 1):
            for side in sides if number % 2 else reversed(sides):
                seen[side].append(run(folder, sides[side]))
    return {side: figures[1:] for side, figures in seen.items()}


def render(seen: dict[str, list[tuple[float, float]]]) -> str:
    """Medians of both sides, and of the difference within a pair."""
    lines = []
    for place, clock in enumerate(("by the clock", "of the processor")):
        with_it, without = ([figure[place] for figure in seen[side]] for side in ("with", "without"))
        more = [one - other for one, other in zip(with_it, without, strict=True)]
        low, _, high = statistics.quantiles(more, n=4)
        lines.append(
            f"{clock}: {statistics.median(with_it):.0f} ms with the plugin, {statistics.median(without):.0f} ms "
            f"without it; {statistics.median(more):+.0f} ms in a pair (quartiles {low:+.0f} to {high:+.0f})"
        )
    return "\n".join([f"{len(seen['with'])} pairs of `pytest --co -q`", *lines])


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    print(render(measure(parser.parse_args().pairs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
