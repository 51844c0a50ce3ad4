"""docs/studies/gate.md: what the verdicts claim, which faults they see, when they stay silent, what they save.

`--parts coverage,power` measures those alone and keeps the others as they lie in docs/studies/data/gate.json. Of
`silence` each harmless change is kept as it ends, in gate.partial.jsonl beside it; called again, the script measures
those that are not there, and with `--minutes M` it starts none later.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.core.errors import BadSpecification, UnknownName
from studies import pages

PARTS = {  # module beside this file, and heading
    "coverage": ("simulation", "Coverage by simulation"),
    "sensitivity": ("sensitivity", "Sensitivity: seeded faults"),
    "power": ("power", "Power: the smallest scale error seen"),
    "silence": ("silence", "Silence: harmless changes"),
    "latency": ("clocks", "Latency: what noise hides"),
    "saving": ("stopping", "What stopping early saves"),
}
DATA = Path(__file__).parents[2] / "docs" / "studies" / "data" / "gate.json"
INTRODUCTION = """\
A gate that cries wolf gets deleted, one that sleeps is worse. Here its error rates are simulated, faults are seeded,
and harmless changes are made; definitions stand in the docstrings of `harness/core/stats.py`,
`harness/metrics/measuring/sequential.py` and `harness/judge/rules.py`. Every part says when and where it was
measured."""


def part(name: str) -> Any:
    """A part's module: measure() -> results, render(results) -> markdown, and plots(results) where it has any."""
    return importlib.import_module(f"studies.gate.{PARTS[name][0]}")


def measure(names: Sequence[str], minutes: float | None = None) -> dict[str, Any]:
    """The parts named, with when and where; the others as they were kept."""
    found = dict(pages.read(DATA)["results"]) if names and DATA.is_file() else {}
    for name in names or PARTS:
        if name not in PARTS:
            raise UnknownName("part", name, PARTS)
        start = time.monotonic()
        bounded = {"minutes": minutes} if name == "silence" and minutes is not None else {}
        results = part(name).measure(**bounded)
        found[name] = {"world": pages.world(time.monotonic() - start), "found": results}
    return {name: found[name] for name in PARTS if name in found}


def render(results: Mapping[str, Any]) -> str:
    """The page."""
    sections = [INTRODUCTION]
    for name, (_, heading) in PARTS.items():
        if name in results:
            made = results[name]["world"]
            when = (
                f"Measured on {made['date']} in {made['minutes']} minutes on {pages.machine(made)}; "
                f"`--parts {name}` measures it alone."
            )
            sections += [f"## {heading}", when, part(name).render(results[name]["found"])]
    return "\n\n".join(sections)


def plots(results: Mapping[str, Any]) -> dict[str, str]:
    """Every part's plots."""
    found: dict[str, str] = {}
    for name in results:
        draw = getattr(part(name), "plots", None)
        found |= draw(results[name]["found"]) if draw else {}
    return found


DOCUMENT = pages.Document(
    "gate", "Verdicts that can be trusted: the gate's own bench", measure, render, plots, script="gate.run"
)


def main(words: Sequence[str]) -> int:
    """`--parts` and `--minutes` are this script's own; the rest is every page's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--parts")
    parser.add_argument("--minutes", type=float)
    if "--parts" in words[-1:]:
        raise BadSpecification(f"--parts names nothing: write --parts {','.join(PARTS)}")
    own, rest = parser.parse_known_args(words)
    chosen = own.parts.split(",") if own.parts else ()
    status = pages.run(dataclasses.replace(DOCUMENT, measure=lambda names: measure(chosen, own.minutes)), rest)
    kept = pages.read(DATA)["results"].get("silence", {}).get("found", {}) if DATA.is_file() else {}
    partial = part("silence").PARTIAL
    if partial.is_file() and kept.get("left") == 0 and "-o" in rest:
        partial.unlink()  # its changes are in the page's data now
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
