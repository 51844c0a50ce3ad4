"""docs/studies/reliability.md: sessions that are killed, starved and lied to, and files and names from strangers.

This script's own options: `--parts campaign,later,signals,fuzz,guided` (the parts not named stay as they lie in the
page's data), `--trials N` (of the campaign, every kind equally often), `--signals N` (so many a phase and engine),
`--minutes M` (no trial starts later), `--kinds WORDS` (only kinds whose name holds one of the words, comma-separated),
`--seed S`, `--jobs N` (trials at once), `--scale N` and `--seconds N` (of the fuzzers), `--keep DIR` (scratch files and
the logs of trials that did not hold). Each trial is appended to docs/studies/data/reliability.partial.jsonl as it ends;
called again, the script runs those that are not there or in the page's data yet.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from harness.core.errors import BadSpecification, UnknownName
from harness.core.files import append_line
from studies import pages
from studies.reliability import campaign, fuzz, guided, page
from studies.reliability.disturbances import FAULTS, LATER, SIGNALLED, Fault
from studies.reliability.scene import template

DATA = Path(__file__).parents[2] / "docs" / "studies" / "data"
PARTIAL = DATA / "reliability.partial.jsonl"
EACH, SIGNALS, MINUTES = 10, 50, 240.0  # trials of each kind, signals a phase and engine
TRIALS = EACH * len(FAULTS)
SCALE, SECONDS = 50, 300  # times the tests' examples, and of each reader's guided fuzzing


def before(part: str, kinds: Sequence[Fault], planned: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The trials of an interrupted run, and those of a page that does not have all of them yet."""
    path, found = DATA / "reliability.json", dict[int, dict[str, Any]]()
    kept = pages.read(path)["results"].get(part, {}).get("found", {}) if path.is_file() else {}
    if kept.get("seed") == options.seed and len(kept["trials"]) < kept["planned"] == planned:
        found |= {trial["number"]: trial for trial in kept["trials"]}
    lines = PARTIAL.read_text().splitlines() if PARTIAL.is_file() else ()
    names = {fault.name for fault in kinds}
    found |= {trial["number"]: trial for trial in map(json.loads, lines) if trial["fault"] in names}
    return [found[number] for number in sorted(found)]


def series(part: str, kinds: Sequence[Fault], planned: int, options: argparse.Namespace) -> dict[str, Any]:
    """So many trials of these kinds, those of an interrupted run included."""
    wanted = [fault for fault in kinds if any(word in fault.name for word in options.kinds.split(","))]
    if not wanted:
        raise BadSpecification(f"--kinds {options.kinds} names none of: {'; '.join(fault.name for fault in kinds)}")
    done, deadline = before(part, kinds, planned, options), time.monotonic() + 60 * options.minutes
    known = {trial["number"] for trial in done}
    drawn = enumerate(campaign.order(planned, options.seed, kinds))
    left = [(number, fault) for number, fault in drawn if number not in known and fault in wanted]
    with tempfile.TemporaryDirectory(prefix="harness-faults-", ignore_cleanup_errors=True) as name:
        home = Path(options.keep or name)
        first = template(home / "cached", "cached")
        templates = {"cached": first}
        if any(fault.variant == "own" for fault in wanted):
            templates["own"] = template(home / "own", "own", first)

        def one(item: tuple[int, Fault]) -> campaign.Trial | None:
            if time.monotonic() > deadline:
                return None
            return campaign.run(item[0], options.seed, item[1], templates[item[1].variant], home)

        with ThreadPoolExecutor(options.jobs) as pool:
            for future in as_completed([pool.submit(one, item) for item in left]):
                if (made := future.result()) is None:
                    continue
                trial = campaign.as_dict(made)
                done.append(trial)
                append_line(PARTIAL, json.dumps(trial))
                print(f"{made.number} {made.fault}: {made.note}, {made.moment}: {made.wrong or 'held'}", flush=True)
    done.sort(key=lambda trial: int(trial["number"]))
    return {"seed": options.seed, "planned": planned, "undisturbed": first.seconds, "trials": done}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "campaign": lambda options: series("campaign", FAULTS, options.trials, options),
    "later": lambda options: series("later", LATER, EACH * len(LATER), options),
    "signals": lambda options: series("signals", SIGNALLED, options.signals * len(SIGNALLED), options),
    "fuzz": lambda options: fuzz.measure(options.scale),
    "guided": lambda options: guided.measure(options.seconds),
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The parts named; the others as they were kept."""
    named = options.parts.split(",")
    for name in named:
        if name not in PARTS:
            raise UnknownName("part", name, PARTS)
    path = DATA / "reliability.json"
    found = dict(pages.read(path)["results"]) if path.is_file() and set(named) != set(PARTS) else {}
    for name in named:
        start = time.monotonic()
        results = PARTS[name](options)
        found[name] = {"world": pages.world(time.monotonic() - start), "found": results}
    return {name: found[name] for name in PARTS if name in found}


def options_of(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This script's options, and the words left for every page's."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--trials", type=int, default=TRIALS)
    parser.add_argument("--signals", type=int, default=SIGNALS)
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--kinds", default="")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--scale", type=int, default=SCALE)
    parser.add_argument("--seconds", type=int, default=SECONDS)
    parser.add_argument("--keep", default="")
    return parser.parse_known_args(words)


DOCUMENT = pages.Document(
    "reliability",
    "Through every fault",
    lambda names: measure(options_of(())[0]),
    page.render,
    script="reliability.run",
)


def main(words: Sequence[str]) -> int:
    """The page's command line."""
    options, rest = options_of(words)
    status = pages.run(dataclasses.replace(DOCUMENT, measure=lambda names: measure(options)), rest)
    kept = pages.read(DATA / "reliability.json")["results"] if (DATA / "reliability.json").is_file() else {}
    lines = PARTIAL.read_text().splitlines() if PARTIAL.is_file() else []
    held = [trial for part in kept.values() for trial in part["found"].get("trials", ())]
    if lines and all(json.loads(line) in held for line in lines):
        PARTIAL.unlink()  # they are in the page's data now
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
