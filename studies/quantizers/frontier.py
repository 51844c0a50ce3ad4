"""docs/studies/frontier.md: every installed method on the embedded model in one session, and who is worth having.

The session is `pytest --methods all-installed`, resumed where it was broken off; `tox run -e methods` installs the
optional libraries first.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from harness import report
from harness.core.errors import HarnessError
from harness.report import frontier
from harness.report.account import complete, sections
from harness.results.directory import nll_reader
from studies import pages

SESSION = Path("harness-report-methods")
MODEL = "smollm2-135m"
LIBRARIES = ("torchao", "optimum-quanto", "hqq", "llmcompressor", "compressed-tensors", "bitsandbytes", "gguf")
COMMAND = (
    *("pytest", "tests/cases/test_measured.py", "--methods", "all-installed"),
    *("--metrics", "perplexity,memory,latency", "--report-dir", str(SESSION), "--resume"),
)


def measure(models: Sequence[str]) -> dict[str, Any]:
    """Every model's places, and what could not be measured."""
    done = subprocess.run([sys.executable, "-m", *COMMAND, "--models", ",".join(models or (MODEL,))], check=False)
    if done.returncode > 1:  # 1: verdicts that fail a session; its measurements are there
        raise HarnessError(f"the session ended with status {done.returncode}: see above")
    found = report.read_report(SESSION)
    tables = []
    for section in sections(complete(found.rows, [])):
        for text in section.texts:
            places = frontier.standings(frontier.points(section, text), nll_reader(SESSION))
            tables.append(kept(frontier.heading(section, text), places))
    missing = [[row.case.id, row.reason] for row in found.rows if row.value is None and row.reason]
    return {"libraries": installed(), "tables": tables, "missing": missing}


def installed() -> dict[str, str]:
    """Versions of the libraries behind methods."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def kept(head: frontier.Heading, places: Sequence[frontier.Standing]) -> dict[str, Any]:
    """One table as JSON values."""
    rows = []
    for place in places:
        point = {name: value for name, value in vars(place.point).items() if name != "row"}
        rows.append({**vars(place), "point": point})
    return {"head": {**vars(head), "aligned": sorted(head.aligned)}, "places": rows}


def restored(found: Mapping[str, Any]) -> tuple[frontier.Heading, list[frontier.Standing]]:
    """The table behind JSON values."""
    head = {**found["head"], "text": tuple(found["head"]["text"]), "aligned": frozenset(found["head"]["aligned"])}
    places = []
    for row in found["places"]:
        spans = {name: row["point"][name] and tuple(row["point"][name]) for name in ("interval", "slowdown")}
        point = frontier.Point(**{**row["point"], **spans, "row": None})
        places.append(frontier.Standing(**{**row, "point": point, "ranks": tuple(row["ranks"])}))
    return frontier.Heading(**head), places


def plot_name(head: frontier.Heading) -> str:
    """A table's plot."""
    return f"frontier-{head.model}.svg"


def render(results: Mapping[str, Any]) -> str:
    """The page."""
    versions = ", ".join(f"{name} {number}" for name, number in results["libraries"].items())
    parts = [
        f"One session, `{' '.join(COMMAND)}`, measured every method whose packages are installed ({versions}); "
        "`tox run -e methods` installs them all and runs it. llm-compressor declares an older transformers than the "
        "one it runs on here, and is installed without its dependencies. `python -m harness frontier DIR` prints such "
        "a table for any session.",
        frontier.MEANING,
    ]
    for found in results["tables"]:
        head, places = restored(found)
        parts.append(f"{frontier.render(head, places)}\n\n![{head.title}]({plot_name(head)})")
    if results["missing"]:
        parts.append("## Not measured\n\n" + "\n".join(f"- `{case}`: {why}" for case, why in results["missing"]))
    return "\n\n".join(parts)


def plots(results: Mapping[str, Any]) -> dict[str, str]:
    """One a model."""
    tables = [restored(found) for found in results["tables"]]
    return {plot_name(head): frontier.svg(head.title, places) for head, places in tables}


DOCUMENT = pages.Document(
    "frontier", "Which methods are worth having", measure, render, plots, script="quantizers.frontier"
)

if __name__ == "__main__":
    sys.exit(pages.run(DOCUMENT))
