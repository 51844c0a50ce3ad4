"""docs/studies/gate.md: what the verdicts claim, which faults they see, when they stay silent, what they save.

`--parts coverage,power` measures those alone and keeps the others as they lie in docs/studies/data/gate.json. Of
`silence` each harmless change is kept as it ends, in gate.partial.jsonl beside it; called again, the script measures
those that are not there, and with `--minutes M` it starts none later. `noise` and `bounds` read real texts:
`--texts lee,wikitext-2=text:FILE,ptb=ptb:FILE`; the losses that they measure lie in the harness's cache, and what lies
there is not measured again (with `--minutes 0` it is all there is). `kernels` judges them.
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
from studies.gate.noise import read_texts

PARTS = {  # module beside this file, and heading
    "coverage": ("simulation", "Coverage by simulation"),
    "sensitivity": ("sensitivity", "Sensitivity: seeded faults"),
    "power": ("power", "Power: the smallest scale error seen"),
    "silence": ("silence", "Silence: harmless changes"),
    "noise": ("noise", "Noise: what other kernels move"),
    "kernels": ("other_kernels", "Silence, power and coverage under other kernels"),
    "bounds": ("tolerable", "Bounds: what methods lose on real texts"),
    "latency": ("clocks", "Latency: what noise hides"),
    "saving": ("stopping", "What stopping early saves"),
}
BOUNDED = frozenset({"silence", "noise", "bounds"})  # can be stopped: `--minutes`
OF_TEXTS = frozenset({"noise", "bounds"})  # read real texts
DATA = Path(__file__).parents[2] / "docs" / "studies" / "data" / "gate.json"
INTRODUCTION = """\
A gate that cries wolf gets deleted, one that sleeps is worse. Here its error rates are simulated, faults are seeded,
and harmless changes are made; definitions stand in the docstrings of `harness/core/stats.py`,
`harness/metrics/measuring/sequential.py` and `harness/judge/rules.py`. Every part says when and where it was
measured."""


def part(name: str) -> Any:
    """A part's module: measure() -> results, render(results) -> markdown, and plots(results) where it has any."""
    return importlib.import_module(f"studies.gate.{PARTS[name][0]}")


def measure(
    names: Sequence[str], minutes: float | None = None, texts: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The parts named, with when and where; the others as they were kept."""
    found = dict(pages.read(DATA)["results"]) if names and DATA.is_file() else {}
    for name in names or PARTS:
        if name not in PARTS:
            raise UnknownName("part", name, PARTS)
        start = time.monotonic()
        timed = name in BOUNDED and minutes is not None
        given: dict[str, Any] = {"minutes": minutes} if timed else {}
        given |= {"texts": texts or {"lee": "lee"}} if name in OF_TEXTS else {}
        results = part(name).measure(**given)
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
            note = [results[name]["note"]] if results[name].get("note") else []
            sections += [f"## {heading}", when, *note, part(name).render(results[name]["found"])]
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
    """`--parts`, `--minutes` and `--texts` are this script's own; the rest is every page's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--parts")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--texts", type=read_texts)
    if "--parts" in words[-1:]:
        raise BadSpecification(f"--parts names nothing: write --parts {','.join(PARTS)}")
    own, rest = parser.parse_known_args(words)
    chosen = own.parts.split(",") if own.parts else ()
    status = pages.run(
        dataclasses.replace(DOCUMENT, measure=lambda names: measure(chosen, own.minutes, own.texts)), rest
    )
    kept = pages.read(DATA)["results"].get("silence", {}).get("found", {}) if DATA.is_file() else {}
    partial = part("silence").PARTIAL
    if partial.is_file() and kept.get("left") == 0 and "-o" in rest:
        partial.unlink()  # its changes are in the page's data now
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
