"""Does planning, cutting and merging stay cheap for a large matrix, and how good are the shards? -> docs/scale.md."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import documents, merging, planning, sharding
from harness.files import replace_text
from harness.options import Declared, Options
from harness.records import Case, Row, Verdict
from harness.report.writing import table
from harness.specifications import parse, parse_list

CASES = (1_000, 10_000, 100_000)
PROTOCOLS = "chunk:512,stride:512:256,gptq:512,rolling:512,half:512,sentence"
DATASETS = "lee,synthetic,wikitext-2,text:notes.txt"
SIZES = (0.135, 0.36, 0.5, 1, 1.7, 3, 3.8, 7, 8, 13)  # billions of parameters of the simulated models, in turn
DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MIB = 2**20

ABOUT = """\
A large matrix is planned by every process of a session, cut into shards by each machine for itself, and merged at the
end. Nothing below loads a model: the rows that are merged are made up, so only the bookkeeping is timed."""


def options(models: int) -> Options:
    """The whole matrix (every core method, metric and protocol, four texts) over so many models."""
    names = [f"hub:org/model-{number}-{SIZES[number % len(SIZES)]}B" for number in range(models)]
    return Options(
        declared=Declared(Path()),
        models=tuple(parse(name) for name in names),
        metrics=("all",),
        datasets=parse_list(DATASETS),
        protocols=parse_list(PROTOCOLS),
        device="cpu",
    )


def plan(cases: int) -> list[Case]:
    """The first so many cases of such a matrix."""
    one = len(planning.plan(options(1), False))
    return list(planning.plan(options(-(-cases // one)), False))[:cases]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and what it gave."""
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def measure_plan(cases: int, home: Path) -> dict[str, float]:
    """Seconds of making, filtering, cutting and writing a plan."""
    made, found = timed(lambda: plan(cases))
    filtered, kept = timed(lambda: [case for case in found if case.family == "perplexity" and case.device == "cpu"])
    cut, parts = timed(lambda: sharding.partition(found, 16))
    assert kept
    assert sum(map(len, parts)) == len(found)
    written, _ = timed(lambda: merging.write_shard(home, sharding.Shard(1, 16), found, 1))
    return {"make": made, "filter": filtered, "cut": cut, "write": written}


def measure_merge(cases: int, home: Path) -> dict[str, float]:
    """Seconds of merging four shards of so many made-up rows, without the report's tables and plots."""
    found = plan(cases)
    folders = []
    for index, part in enumerate(sharding.partition(found, 4), 1):
        folder = home / str(index)
        folder.mkdir()
        rows = [Row.of(case, value=1.0, unit="nat", verdict=Verdict.SAME, environment="e") for case in part]
        replace_text(folder / "measurements.jsonl", "".join(row.to_json() + "\n" for row in rows))
        replace_text(folder / "environments.json", '{"e": {}}')
        merging.write_shard(folder, sharding.Shard(index, 4), found, 1)
        replace_text(folder / "plan.json", "[]")
        folders.append(folder)
    read, parts = timed(lambda: [merging.read_part(folder) for folder in folders])
    join, rows = timed(lambda: merging.joined(parts, merging.plan_of(parts)[0]))
    assert len(rows) == len(found)
    whole, _ = timed(lambda: merging.merge(folders, home / "out"))
    return {"read": read, "join": join, "whole": whole}


def in_process(name: str, cases: int, connection: Any) -> None:
    """One measurement in a process of its own, with its peak resident set."""
    with tempfile.TemporaryDirectory() as home:
        seconds = {"plan": measure_plan, "merge": measure_merge}[name](cases, Path(home))
    connection.send({**seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024})


def apart(name: str, cases: int) -> dict[str, float]:
    """`in_process`, from here."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=in_process, args=(name, cases, there))
    process.start()
    there.close()  # so that a child that dies is the end of the pipe
    found: dict[str, float] = here.recv()
    process.join()
    return found


def simulate() -> dict[str, dict[str, float]]:
    """Makespan of the shards on so many devices against the lower bound, on predicted costs of 30 x 15 groups."""
    found = [case for case in planning.plan(options(30), False) if case.dataset in ("", "lee")]
    price = dict(zip(found, sharding.costs(found), strict=True))
    total, dearest = sum(price.values()), max(price.values())
    results = {}
    for count in DEVICES:
        loads = [sum(price[case] for case in part) for part in sharding.partition(found, count)]
        bound = max(total / count, dearest)
        results[str(count)] = {"makespan": max(loads), "bound": bound}
    return results


def measure(models: Sequence[str]) -> dict[str, Any]:
    """Everything on the page; `models` says nothing here."""
    return {
        "plan": {str(cases): apart("plan", cases) for cases in CASES},
        "merge": {str(cases): apart("merge", cases) for cases in CASES},
        "makespan": simulate(),
    }


def ratio(one: Mapping[str, float]) -> str:
    """Makespan over the lower bound."""
    return f"{one['makespan'] / one['bound']:.3f}"


def line(cases: str, one: Mapping[str, float], names: Sequence[str]) -> list[str]:
    """One line of a table: seconds, microseconds a case, peak resident MiB."""
    each = 1e6 * (one.get("whole") or sum(one[name] for name in names)) / int(cases)
    return [f"{int(cases):,}", *(f"{one[name]:.2f}" for name in names), f"{each:.0f}", f"{one['peak'] / MIB:.0f}"]


def render(results: Mapping[str, Any]) -> str:
    """The page."""
    planned = [line(cases, one, ("make", "filter", "cut", "write")) for cases, one in results["plan"].items()]
    merged = [line(cases, one, ("read", "join", "whole")) for cases, one in results["merge"].items()]
    spans = [
        [count, *(f"{seconds / 3600:,.2f}" for seconds in (one["makespan"], one["bound"])), ratio(one)]
        for count, one in results["makespan"].items()
    ]
    heads = ["cases", "make s", "filter s", "cut in 16 s", "write s", "µs a case, all", "peak MiB"]
    return "\n\n".join(
        [
            ABOUT,
            "## A plan\n\nMade, filtered (one family, one method), cut into 16 shards and written:",
            table(heads, planned),
            "## Merging four shards\n\n*read* and *join* apart, *whole* with tables, plots and files:",
            table(["cases", "read s", "join s", "whole s", "µs a case, whole", "peak MiB"], merged),
            "## How even the shards are\n\n"
            "Simulated: the makespan of `--shard I/N` on N equal devices, with the predicted costs of 30 models of "
            "0.135 to 13 billion parameters under every core method, one text, every protocol and metric, against the "
            "lower bound (the larger of an even share and the dearest case):",
            table(["devices", "makespan h", "lower bound h", "ratio"], spans),
        ]
    )


DOCUMENT = documents.Document("scale", "Large matrices: planning, shards, merging", measure, render)

if __name__ == "__main__":
    sys.exit(documents.run(DOCUMENT))
