"""Each figure over runs: what it was, when it changed and what had moved by then; as markdown and as one HTML file.

A run is compared with the one at which the present level of a figure began, by the rules of `judge.two_reports`, so
that what creeps is found too: token by token where both reports are at hand, else by value. Where it got better or
worse a new level begins. Times are ratios to the reference that was timed in turn with them; milliseconds of two
moments do not compare, so that the reference's own are left out.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.core.environment import Environment, difference
from harness.core.records import Case, Row, Verdict
from harness.core.text import NOTHING, exp, mib, number, perplexity, plural, ratio
from harness.judge import bounds, two_reports
from harness.judge.two_reports import INVARIANT, Entry, seen
from harness.report.account import LEFT, MISSING, SHOWN, grouped, measure, place
from harness.report.charts import EDGE, WIDTH, Axis
from harness.report.markup import bullets, code, escape, table
from harness.report.page import HERE, sha256, template
from harness.report.tables import interval, time_ratio
from harness.results.directory import SavedSession, nll_reader

HASH = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{4,}\b")  # a commit or a digest; its first digits tell it from another
LAST = 5  # runs that a table of markdown shows; the HTML has all of them
DRAWN = 300  # figures of a page with plots; of more only those that changed
NEW = (Verdict.WORSE, Verdict.BETTER, Verdict.NOT_COMPARABLE, Verdict.INPUT_CHANGED)  # a new level begins
QUIET = (Verdict.SAME, Verdict.WITHIN_NOISE, Verdict.WITHIN_BOUND, None)
HEIGHT, FOOT = 120.0, 24.0  # of a plot, and of the numbers of runs below it
TONES = {Verdict.WORSE: "bad", Verdict.INPUT_CHANGED: "bad", Verdict.MISSING: "bad", Verdict.BETTER: "good"}
SIGNS = {"bad": "✕", "good": "✓", "open": "?"}
Drawn = tuple[float, float | None, float | None]  # a value with its interval
# what rows say of a model, a method and a text, whatever the environment
ROW_FACTS = {
    "revision": "weights",
    "identity": "identity of the model",
    "method_id": "method",
    "protocol_id": "protocol",
    "token_hash": "token ids",
}


@dataclass(frozen=True)
class Moment:
    """A figure in one run; what it is compared with is the run `since`, and `moved` is what differs from that."""

    run: int  # place among the runs
    row: Row
    since: int | None = None
    verdict: Verdict | None = None
    reason: str = ""
    moved: tuple[str, ...] = ()

    @property
    def tone(self) -> str:
        """'' where nothing changed; else 'bad', 'good', or 'open' where it could not be decided."""
        return "" if self.verdict in QUIET else TONES.get(self.verdict, "open")

    @property
    def mark(self) -> str:
        """What stands behind the figure: nothing where it did not change."""
        return f"{SIGNS[self.tone]} {self.verdict}" if self.tone else ""


@dataclass(frozen=True)
class Series:
    """One case over the runs that planned it."""

    case: Case
    moments: tuple[Moment, ...]

    @property
    def changes(self) -> list[Moment]:
        """Where it got better or worse, was not comparable, or went missing."""
        return [moment for moment in self.moments if moment.tone]


@dataclass(frozen=True)
class History:
    """Runs, the oldest first, and every figure of them."""

    runs: tuple[SavedSession, ...]
    series: tuple[Series, ...]

    @property
    def worse(self) -> list[tuple[Series, Moment]]:
        """What the last run made worse, changed under it, or lost."""
        last = len(self.runs) - 1
        pairs = ((one, moment) for one in self.series for moment in one.changes)
        return [(one, moment) for one, moment in pairs if (moment.run, moment.tone) == (last, "bad")]


def history(runs: Sequence[SavedSession], baselines: Path = Path("baselines")) -> History:
    """Every figure of the runs, the oldest first; `baselines` is the folder whose bounds.toml says what is noise."""
    worlds = {name: world for run in runs for name, world in run.environments.items()}
    facts = {name: known for run in runs for name, known in run.identities.items()}
    nll, rules = nll_reader(*(run.folder for run in runs)), bounds.load(baselines)
    found: dict[Case, list[Moment]] = {}
    level: dict[Case, Moment] = {}  # where the present one began
    for count, run in enumerate(runs):
        rows = {case: Row.of(case, verdict=Verdict.MISSING, reason="never reached") for case in run.planned}
        rows = {case: row for case, row in (rows | {row.case: row for row in run.rows}).items() if followed(case)}
        before = [level[case].row for case in rows if case in level]
        entries: dict[Case, Entry] = {}
        if before:
            comparison = two_reports.compare(
                before, list(rows.values()), nll, nll, environments_a=worlds, environments_b=worlds, bounds=rules,
                identities=facts.get,
            )  # fmt: skip
            entries = {entry.case: entry for entry in comparison.entries}
        for case, row in rows.items():
            moment = at(count, row, entries.get(case), level.get(case), worlds)
            found.setdefault(case, []).append(moment)
            if row.value is not None and (case not in level or moment.verdict in NEW):
                level[case] = moment
    return History(tuple(runs), tuple(Series(case, tuple(moments)) for case, moments in found.items()))


def followed(case: Case) -> bool:
    """Whether a figure has a history: all but the reference's own milliseconds."""
    return case.family != "latency" or case.method != case.reference


def at(
    run: int, row: Row, entry: Entry | None, level: Moment | None, worlds: Mapping[str, Mapping[str, Any]]
) -> Moment:
    """A figure in a run, with what differs from the level's beginning where it changed."""
    if level is None:
        return Moment(run, row)
    if entry is None or row.value is None:
        return Moment(run, row, level.run, Verdict.MISSING, row.reason or "no reason was given")
    moment = Moment(run, row, level.run, entry.verdict, entry.reason)
    if not moment.tone:
        return moment
    before, now = (Environment.from_dict(worlds.get(one.environment, {})) for one in (level.row, row))
    pairs = ((said, getattr(level.row, name), getattr(row, name)) for name, said in ROW_FACTS.items())
    moved = [f"{said}: {old} -> {new}" for said, old, new in pairs if old and new and old != new]
    return Moment(
        run, row, level.run, entry.verdict, entry.reason, tuple(map(short, (*difference(before, now), *moved)))
    )


def short(line: str) -> str:
    """With hashes as their first digits."""
    return HASH.sub(r"\1", line)


# a figure in words and as a number


def drawn_value(row: Row) -> Drawn | None:
    """What a plot shows of a row, with its interval: a time and a loss as ratios to the reference."""
    if row.value is None or not math.isfinite(row.value) or row.case.family == INVARIANT:
        return None
    if row.case.family == "latency":
        found = time_ratio(row)
        logs: Drawn | None = (found.value, found.low, found.high) if found else None
    elif row.metric == "perplexity.delta":
        logs = row.value, *interval(row)
    else:
        low, high = interval(row)
        scale = 1 / 2**20 if row.unit == "B" else 1.0
        return row.value * scale, None if low is None else low * scale, None if high is None else high * scale
    if logs is None:
        return None
    value, low, high = (exp(end) if end is not None and math.isfinite(end) else None for end in logs)
    return None if value is None or not math.isfinite(value) else (value, low, high)


def words(row: Row) -> str:
    """The figure as tables write it, without its unit."""
    if row.value is None:
        return LEFT if row.left_out else MISSING
    if row.case.family == INVARIANT:
        return seen(row)
    shown = drawn_value(row)
    if row.case.family == "latency" or row.metric == "perplexity.delta":
        return NOTHING if shown is None else ratio(shown[0])
    if row.unit == "B":
        return mib(row.value)
    return perplexity(row.value) if row.metric == "perplexity" else number(row.value)


def unit(series: Series) -> str:
    """What its words are in."""
    case = series.case
    if case.family == "latency" or case.metric == "perplexity.delta":
        return f"over {case.reference}'s"
    units = (moment.row.unit for moment in series.moments)
    return {"B": "MiB", "ppl": ""}.get(own := next(filter(None, units), ""), own)


def title(series: Series) -> str:
    """What a series is of, in plain words."""
    named = f"{series.case.method}: {series.case.metric}"
    return named + (f" ({unit(series)})" if unit(series) else "")


# markdown


def opening(found: History) -> str:
    """The outcome in one sentence."""
    changed = [one for one in found.series if one.changes]
    if len(found.runs) < 2:
        return f"{plural(len(found.runs), 'run')}: nothing to compare with yet."
    counted = f"{plural(len(changed), 'figure')} of {len(found.series):,} changed in {plural(len(found.runs), 'run')}"
    last = f"the last run made {len(found.worse):,} worse" if found.worse else "the last run made none worse"
    return f"{counted}; {last}."


def told(series: Series, moment: Moment, runs: Sequence[SavedSession]) -> str:
    """A change in plain words: when, from what to what, and what had moved."""
    assert moment.since is not None, "a change has something that it is one from"
    when = f"run {moment.run + 1}, {runs[moment.run].finished[:10]}"
    before = next(one.row for one in series.moments if one.run == moment.since)
    text = f"{when}, against run {moment.since + 1}: {words(before)} -> {words(moment.row)}; {moment.reason}"
    if moment.row.value is None:
        return text
    return f"{text}; moved: {', '.join(moment.moved) or 'nothing that is recorded'}"


def changes(found: History) -> list[tuple[Series, Moment]]:
    """Every change, the latest first, within a run the worst."""
    pairs = [(one, moment) for one in found.series for moment in one.changes]
    return sorted(pairs, key=lambda pair: (-pair[1].run, pair[1].verdict.severity if pair[1].verdict else 0))


def moves(runs: Sequence[SavedSession]) -> list[list[str]]:
    """Of each run what its environments say otherwise than those of the run before."""
    sides = [[Environment.from_dict(world) for _, world in sorted(run.environments.items())] for run in runs]
    found: list[list[str]] = [[]]
    for before, now in itertools.pairwise(sides):
        by_device = {world.device: world for world in before}
        pairs = [(by_device[world.device], world) for world in now if world.device in by_device]
        found.append(list(dict.fromkeys(short(line) for pair in pairs for line in difference(*pair))))
    return found[: len(runs)]


def render(found: History) -> str:
    """Markdown that also reads in a terminal: the answer, every change, the runs, each figure in the last of them."""
    parts = ["# History", f"**{opening(found)}**"]
    listed = [
        f"**{moment.verdict}**: {place(one.case)}: {escape(told(one, moment, found.runs))}"
        for one, moment in changes(found)
    ]
    more = f"\n- … and {len(listed) - SHOWN:,} more, in the tables." if len(listed) > SHOWN else ""
    parts += [bullets("Changes, the latest first:", listed[:SHOWN]) + more] if listed else []
    lines = [
        [str(number), escape(run.finished), f"{len(run.rows):,}", escape(", ".join(moved)) or NOTHING]
        for number, (run, moved) in enumerate(zip(found.runs, moves(found.runs), strict=True), 1)
    ]
    parts += ["## Runs", table(["run", "finished", "rows", "what moved"], lines, words=(1, 3))]
    shown = range(max(0, len(found.runs) - LAST), len(found.runs))
    for (model, device), own in grouped(found.series, lambda one: (one.case.model, one.case.device)).items():
        cells = []
        for one in own:
            at_run = {moment.run: moment for moment in one.moments}
            here = [at_run.get(run) for run in shown]
            figures = [escape(in_cell(then)) if then else NOTHING for then in here]
            changed = ", ".join(str(moment.run + 1) for moment in one.changes)
            cells.append([code(one.case.method), measure(one.case), escape(unit(one)), *figures, changed or NOTHING])
        headers = ["method", "metric", "in", *(f"run {run + 1}" for run in shown), "changed in run"]
        parts += [f"## {code(model)} on {escape(device)}", table(headers, cells, words=(0, 1, 2, -1))]
    parts.append(
        "A run is compared with the one at which the present level of a figure began; it changed where `compare` says "
        "so at 95%, each figure by itself: of twenty that did not move, one may be marked. Lower is better in all but "
        "agreement. Times are over the reference's of the same run. MiB is 2^20 bytes."
    )
    return "\n\n".join(parts) + "\n"


def in_cell(moment: Moment) -> str:
    """A figure and its mark."""
    return moment.mark if moment.row.value is None and moment.mark else f"{words(moment.row)} {moment.mark}".rstrip()


# HTML


@dataclass(frozen=True)
class Spot:
    """A moment in its plot."""

    x: float
    y: float
    ends: tuple[float, float] | None
    tone: str
    told: str


def plot(series: Series, runs: Sequence[SavedSession]) -> dict[str, Any] | None:
    """Where each moment of a series goes, in units of a drawing as wide as a phone; None of nothing to draw."""
    shown = [(moment, value) for moment in series.moments if (value := drawn_value(moment.row))]
    if not shown:
        return None
    ends = [end for _, (value, low, high) in shown for end in (value, low, high) if end is not None]
    up = Axis(ends, HEIGHT - FOOT, EDGE, log=min(ends) > 0 and series.case.family in ("perplexity", "latency"))
    left, step = 48.0, (WIDTH - EDGE - 60.0) / max(1, len(runs) - 1)
    at_run = [round(left + 6 + step * run, 1) for run in range(len(runs))]
    spots = [
        Spot(
            at_run[moment.run],
            up.at(value),
            None if low is None or high is None else (up.at(low), up.at(high)),
            moment.tone,
            f"run {moment.run + 1}, {runs[moment.run].finished}: {in_cell(moment)}",
        )
        for moment, (value, low, high) in shown
    ]
    every = math.ceil(len(runs) / 12)  # numbers that fit below
    return {
        "spots": spots,
        "line": "M" + "L".join(f"{spot.x} {spot.y}" for spot in spots),
        "ticks": up.ticks(),
        "runs": [(x, run + 1) for run, x in enumerate(at_run) if run % every == 0],
        "height": HEIGHT,
    }


def page(found: History) -> str:
    """The history as one HTML file without script: nothing is fetched, and names in it are harmless."""
    every = found.series if len(found.series) <= DRAWN else [one for one in found.series if one.changes][:DRAWN]
    anchors = {one.case: f"figure-{number}" for number, one in enumerate(every)}
    groups = grouped(every, lambda one: f"{one.case.model} on {one.case.device}")
    style = HERE.joinpath("page.css").read_text(encoding="utf-8")
    return template("page.history.jinja").render(
        opening=opening(found),
        tone="open" if len(found.runs) < 2 else "bad" if found.worse else "good",
        signs=SIGNS,
        changes=[
            (moment, f"{one.case.model}, {title(one)}", anchors.get(one.case, ""), told(one, moment, found.runs))
            for one, moment in changes(found)[: 10 * SHOWN]
        ],
        more=max(0, len(changes(found)) - 10 * SHOWN),
        runs=[
            (number, run.finished, len(run.rows), ", ".join(moved), run.command)
            for number, (run, moved) in enumerate(zip(found.runs, moves(found.runs), strict=True), 1)
        ],
        groups={name: [drawn(one, anchors[one.case], found.runs) for one in own] for name, own in groups.items()},
        left=len(found.series) - len(every),
        style=style,
        style_hash=sha256(style),
    )


def drawn(one: Series, anchor: str, runs: Sequence[SavedSession]) -> dict[str, Any]:
    """What the template shows of a series: its plot, and a line a run."""
    moments = [
        {
            "run": moment.run + 1,
            "finished": runs[moment.run].finished,
            "words": words_with_interval(moment.row),
            "moment": moment,
            "told": told(one, moment, runs) if moment.tone else "",
        }
        for moment in one.moments
    ]
    text = ", ".join(filter(None, (one.case.dataset, one.case.protocol)))
    return {"anchor": anchor, "title": title(one), "text": text, "plot": plot(one, runs), "moments": moments}


def words_with_interval(row: Row) -> str:
    """A figure with its interval, where it has one."""
    shown = drawn_value(row)
    if row.case.family == "latency" or row.metric == "perplexity.delta":
        return NOTHING if shown is None else ratio(*shown)
    if shown is None or shown[1] is None:
        return words(row)
    return f"{words(row)} [{number(shown[1])}, {number(shown[2])}]"
