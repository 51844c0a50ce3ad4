"""docs/studies/scale.md: do planning, cutting and merging stay cheap for a large matrix, how well is it handed out?

Costs and examples of rows are those of a real session: costs.json, kept by costs.py.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from harness.core.files import replace_bytes, replace_text
from harness.core.options import Shard
from harness.core.records import Case
from harness.core.values import digest
from harness.report import document
from harness.report.markup import table
from harness.report.plots import BLUE, DARK, GREY, canvas_of, style, svgs
from harness.run import merge as merging
from harness.run import plan as planning
from harness.run import shards
from studies import pages
from studies.scale import makespan

CASES = (1_000, 3_000, 10_000, 30_000, 100_000)
PARTS = 4  # shards that are merged
PLOT = "scale.svg"
HANDED = """\
`pytest -n` hands whole groups (a model under a method) to whoever is free, dearest first by predicted cost;
`--shard I/N` cuts the plan beforehand. Predicted costs rest on names alone."""
WITHIN = 1.1  # of the lower bound
LOWER = {"even": "even share", "longest": "longest group", "crowded": "groups a device"}
MIB = 2**20

ABOUT = """\
A large matrix is planned by every process of a session, cut into shards by each machine for itself, and merged at the
end. Nothing below loads a model. Rows that are merged are those of a real session with other names: a row has its
census, samples and reasons, one in a hundred is `worse`, and each perplexity has its file of losses."""
MERGING = """\
Read (from 32 MiB on by every processor; the peak is the merging process's and its largest helper's together), joined,
settled and written, losses linked, and the report made: up to 5,000 cases with every table and verdict,
beyond with one table a model and the verdicts that failed or moved. At most 60 plots are drawn; the time without them
is what grows with the cases. That shards 1/5 to 5/5 merged are one run's lines and report, seconds aside, is tested on
a tiny model: `test_shards_merged_equal_one_run` in `tests/plugin/test_session.py`. The report of one model of many is
`python -m harness report DIR --models NAME`."""
BOUNDS = """\
Nothing ends before an even share of all work, nor before the longest group, nor, of the k x devices + 1 longest groups,
before the shortest k + 1 (*groups a device*: some device takes so many): the lower bound is the largest of the three.
Handing groups to whoever is free ends before their sum, whatever the order (Graham 1966): *sure within*. So 10% is
certain while the longest group is at most a tenth of an even share; beyond, the order decides, and with hardly more
groups than devices none can help, since a group is divided by `--shard` alone (which is why static shards can end
before this bound). Ratios are over the bound. The weights of methods in the prediction come from this very session;
*elsewhere* is the worst of 20 machines on which each method takes half to twice as long as predicted."""


def plan(cases: int) -> list[Case]:
    """The first so many cases of such a matrix."""
    one = len(planning.plan(makespan.options(1), False))
    return list(planning.plan(makespan.options(-(-cases // one)), False))[:cases]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and what it gave."""
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def measure_plan(cases: int, home: Path) -> dict[str, float]:
    """Seconds of making, filtering, cutting and writing a plan."""
    made, found = timed(lambda: plan(cases))
    filtered, kept = timed(lambda: [case for case in found if case.family == "perplexity" and case.device == "cpu"])
    cut, parts = timed(lambda: shards.partition(found, 16))
    assert kept
    assert sum(map(len, parts)) == len(found)
    written, _ = timed(lambda: merging.write_shard(home, Shard(1, 16), found, 1))
    return {"make": made, "filter": filtered, "cut": cut, "write": written}


def lines_of(cases: Sequence[Case], losses: Path) -> list[bytes]:
    """A line a case: the example of its metric (or of perplexity), its loss in a file of its own."""
    examples = makespan.kept()["examples"]
    losses.mkdir(parents=True)
    lines = []
    for place, case in enumerate(cases):
        row = {**examples.get(case.metric, examples["perplexity"]), **case.told(), "environment": "e", "nll": ""}
        row["verdict"] = row["verdict_baseline"] = "within noise" if place % 100 else "worse"
        if case.metric == "perplexity":
            row["nll"] = digest(case.id)
            (losses / f"{row['nll']}.npz").write_bytes(b"")  # a merge does not look into it
        lines.append(json.dumps(row, sort_keys=True).encode() + b"\n")
    return lines


def write_parts(cases: Sequence[Case], home: Path) -> None:
    """The report directories of shards that measured these cases."""
    for index, part in enumerate(shards.partition(cases, PARTS), 1):
        folder = home / str(index)
        replace_bytes(folder / "measurements.jsonl", b"".join(lines_of(part, folder / "nll")))
        replace_text(folder / "environments.json", '{"e": {}}')
        replace_text(folder / "plan.json", "[]")
        merging.write_shard(folder, Shard(index, PARTS), cases, 1)


def measure_merge(cases: int, home: Path) -> dict[str, float]:
    """Seconds of merging shards of so many rows into one report, those of its plots, and the bytes read and shown."""
    folders = sorted(path for path in home.iterdir() if path.is_dir())
    size = sum((folder / "measurements.jsonl").stat().st_size for folder in folders)
    drawing: list[float] = []

    def drawn(*arguments: Any) -> dict[str, str]:
        seconds, pictures = timed(lambda: svgs(*arguments))
        drawing.append(seconds)
        return dict(pictures)

    with patch.object(document, "svgs", drawn):
        whole, merged = timed(lambda: merging.merge(folders, home / "out"))
    assert len(merged.rows) == cases
    facts = {"read_bytes": size, "report_bytes": merged.report.stat().st_size}
    return {"whole": whole, "text": whole - sum(drawing), "pictures": len(list((home / "out").glob("*.svg"))), **facts}


def in_process(name: str, cases: int, home: Path, connection: Any) -> None:
    """One measurement in a process of its own, with its peak resident set and that of its largest child."""
    found = {"plan": measure_plan, "merge": measure_merge}[name](cases, home)
    peaks = (resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    connection.send({**found, "peak": sum(peaks)})


def apart(name: str, cases: int) -> dict[str, float]:
    """`in_process`, from here; what it reads is made before it starts."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    with tempfile.TemporaryDirectory() as home:
        if name == "merge":
            write_parts(plan(cases), Path(home))
        process = context.Process(target=in_process, args=(name, cases, Path(home), there))
        process.start()
        there.close()  # so that a child that dies is the end of the pipe
        found: dict[str, float] = here.recv()
        process.join()
    return found


def measure(models: Sequence[str]) -> dict[str, Any]:
    """Everything on the page; `models` says nothing here."""
    session = makespan.kept()
    groups = {method: sum(seconds.values()) for method, seconds in session["seconds"].items()}
    return {
        "session": {"model": session["model"], "processor": session["processor"], "groups": groups},
        "plan": {str(cases): apart("plan", cases) for cases in CASES},
        "merge": {str(cases): apart("merge", cases) for cases in CASES},
        "makespan": {"many": makespan.simulate(makespan.SIZES), "one": makespan.simulate((1.0,))},
    }


def line(cases: str, one: Mapping[str, float], names: Sequence[str]) -> list[str]:
    """One line of a table: seconds of each step, microseconds a case over all, peak resident MiB."""
    each = 1e6 * sum(one[name] for name in names) / int(cases)
    return [f"{int(cases):,}", *(f"{one[name]:.2f}" for name in names), f"{each:.0f}", f"{one['peak'] / MIB:,.0f}"]


def merged_line(cases: str, one: Mapping[str, float]) -> list[str]:
    """The same of a merge, with the bytes that were read and the report's."""
    sizes = [f"{one['read_bytes'] / MIB:,.1f}", f"{one['report_bytes'] / MIB:.2f}"]
    number, text, each, peak = line(cases, one, ("text",))
    return [number, sizes[0], f"{one['whole']:.2f}", f"{one['pictures']:.0f}", text, each, peak, sizes[1]]


def lower(one: Mapping[str, float]) -> float:
    """What no order of whole groups ends before."""
    return max(one[name] for name in LOWER)


def spans(results: Mapping[str, Any]) -> str:
    """Makespans over the lower bound, one line a number of devices."""
    lines = []
    for count, one in results.items():
        bound = lower(one)
        which = next(words for name, words in LOWER.items() if one[name] == bound)
        ratios = [one["ordered"] / bound, one["elsewhere"], one["plan_order"] / bound, one["shards"] / bound]
        sure = (one["even"] + one["longest"]) / bound
        lines.append([count, f"{bound / 3600:,.2f}", which, *(f"{ratio:.3f}" for ratio in (*ratios, sure))])
    heads = "devices|lower bound h|which is the|longest first|elsewhere|plan order|static shards|sure within"
    return table(heads.split("|"), lines, words=(2,))


def within(results: Mapping[str, Any]) -> str:
    """The sentence on how near to the bound our order comes."""
    ratios = {int(count): one["ordered"] / lower(one) for count, one in results.items()}
    beyond = [count for count, ratio in ratios.items() if ratio > WITHIN]
    worst = max(ratios.values())
    told = f"Longest first ends within {100 * (worst - 1):.1f}% of the lower bound on every number of devices"
    if not beyond:
        return f"{told}."
    kept = max(ratio for ratio in ratios.values() if ratio <= WITHIN)
    rest = ", ".join(map(str, beyond))
    return (
        f"Longest first ends within {100 * (kept - 1):.1f}% of the lower bound, but for {rest} devices (up to "
        f"{100 * (worst - 1):.0f}%)."
    )


def render(results: Mapping[str, Any]) -> str:
    """The page."""
    planned = [line(cases, one, ("make", "filter", "cut", "write")) for cases, one in results["plan"].items()]
    merged = [merged_line(cases, one) for cases, one in results["merge"].items()]
    session, span = results["session"], results["makespan"]
    least, most = min(session["groups"].values()), max(session["groups"].values())
    return "\n\n".join(
        [
            ABOUT,
            f"![Cost of a case, and makespans]({PLOT})",
            "## A plan\n\nMade, filtered (one family), cut into 16 shards and written:",
            table(["cases", "make s", "filter s", "cut s", "write s", "µs a case, all", "peak MiB"], planned),
            f"## Merging {PARTS} shards\n\n" + MERGING,
            table("cases|read MiB|merge s|plots|without plots s|µs a case|peak MiB|report MiB".split("|"), merged),
            "## In which order work is handed out\n\n" + HANDED,
            f"Simulated for {makespan.MODELS} models under every core method: perplexity on four texts, memory and "
            f"latency. A case takes what it took in a session with `{session['model']}` on {session['processor']} "
            f"({len(session['groups'])} groups of {least:.0f} to {most:.0f} s), times the ratio of parameters.",
            BOUNDS,
            f"{makespan.MODELS} models of 0.135 to 13 billion parameters:",
            spans(span["many"]),
            within(span["many"]),
            f"{makespan.MODELS} models of one size, where groups of nearly equal length do not share out evenly:",
            spans(span["one"]),
            within(span["one"]),
        ]
    )


def plots(results: Mapping[str, Any]) -> dict[str, str]:
    """Microseconds a case against cases, and makespan over the lower bound against devices."""
    with style():
        canvas, (left, right) = canvas_of(3.6, "Cost of a case, and makespans", 2)
        for name, colour, steps in (("plan", DARK, ("make", "filter", "cut", "write")), ("merge", BLUE, ("text",))):
            counts = [int(cases) for cases in results[name]]
            each = [1e6 * sum(one[step] for step in steps) / int(cases) for cases, one in results[name].items()]
            left.plot(counts, each, "o-", color=colour, label=name)
        left.set(xscale="log", xlabel="cases", ylabel="µs a case", ylim=(0, None))
        for name, text, line_style in (("many", "0.135 to 13 billion parameters", "o-"), ("one", "one size", "s--")):
            found = results["makespan"][name]
            devices = [int(count) for count in found]
            for order, colour in (("ordered", BLUE), ("plan_order", GREY)):
                ratios = [one[order] / lower(one) for one in found.values()]
                label = f"{'longest first' if order == 'ordered' else 'plan order'}, {text}"
                right.plot(devices, ratios, line_style, color=colour, label=label)
        right.set(xscale="log", xlabel="devices", ylabel="makespan / lower bound", ylim=(0.95, None))
        for axes in (left, right):
            axes.legend(frameon=False, fontsize=8)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return {PLOT: buffer.getvalue()}


DOCUMENT = pages.Document(
    "scale", "Large matrices: planning, shards, merging", measure, render, plots, script="scale.scale"
)

if __name__ == "__main__":
    sys.exit(pages.run(DOCUMENT))
