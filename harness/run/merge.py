"""Joins the report directories of shards (or of any sessions on one plan) into one report. No torch.

A shard leaves `shard.json` beside its report: which part it was, and the whole selected plan, so that cases of a shard
that never came are shown as missing. Two measurements of one case must agree in everything but time.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import report
from harness.core.errors import BadFile
from harness.core.files import replace_bytes
from harness.core.options import Options, Shard
from harness.core.records import Case, Row
from harness.core.schema import read_json
from harness.core.values import sealed
from harness.judge import exact, rules
from harness.results.directory import (
    LOSSES,
    MEASUREMENTS,
    SHARD,
    ReportDirectory,
    SavedSession,
    cases_of,
    latest,
    read_report,
)
from harness.results.losses import SHA
from harness.run.local import missing
from harness.run.shards import partition, plan_digest

# of one case two runs may differ in these: they are times, or pages of a process
FREE = frozenset({"detail", "seconds", "key", "environment", "samples", "spread", "interval", "baseline"})
UNSTEADY = frozenset({"memory.load_peak", "memory.run_peak"})
DROPPED = frozenset({"--shard", "--harness-shard", "--resume"})  # options that the merged whole no longer has
ALLOWANCES = ("allow_missing", "allow_changed_input")  # options that keep an exit status at 0


@dataclass(frozen=True)
class Part:
    """One directory: its session, and which shard it was (None where it was no shard)."""

    folder: Path
    session: SavedSession
    shard: Shard | None = None
    whole: tuple[Case, ...] = ()  # the plan before it was cut
    tests: int = 0  # statistical tests of the whole plan (`rules.tests`)
    allowed: frozenset[str] = frozenset()  # of ALLOWANCES, those that it ran with


@dataclass(frozen=True)
class Merged:
    """What came of a merge."""

    report: Path
    rows: tuple[Row, ...]
    absent: tuple[int, ...]  # shards that never came, counted from 1
    allowed: frozenset[str] = frozenset()  # of ALLOWANCES, those that every part ran with


@dataclass(frozen=True)
class ShardFile:
    """What shard.json holds: which part of how many it is, the whole plan, its digest and tests, what it allowed."""

    index: int
    count: int
    plan: str
    tests: int
    cases: tuple[dict[str, str], ...]
    allowed: tuple[str, ...] = ()


def allowances(options: Options) -> list[str]:
    """The options that keep a session at exit status 0, those that are on."""
    return [name for name in ALLOWANCES if getattr(options, name)]


def write_shard(folder: Path, shard: Shard, whole: Sequence[Case], tests: int, allowed: Sequence[str] = ()) -> None:
    """Say beside a report which part of which plan it is, how many statistical tests the whole plan makes, and what
    was allowed.
    """
    told = {"cases": [case.told() for case in whole], "allowed": list(allowed)}
    facts = {"index": shard.index, "count": shard.count, "plan": plan_digest(whole), "tests": tests, **told}
    ReportDirectory(folder).put({SHARD: json.dumps(sealed(facts)) + "\n"})


def read_part(folder: Path) -> Part:
    """A directory with its shard.json, where it has one; BadFile names what is wrong with it."""
    session, path = read_report(folder), folder / SHARD
    allowed = {name for name in ALLOWANCES if _given(session.command, name.replace("_", "-"))}
    if not path.is_file():
        return Part(folder, session, allowed=frozenset(allowed))
    written = read_json(path, ShardFile, "measure that shard again")
    shard, whole = Shard(written.index, written.count), cases_of(path, written.cases)
    if plan_digest(whole) != written.plan or not 1 <= shard.index <= shard.count:
        raise BadFile(f"{path} does not hold the plan that it names: measure that shard again")
    return Part(folder, session, shard, whole, written.tests, frozenset({*allowed, *written.allowed}))


def _given(command: str, flag: str) -> bool:
    """Whether a command line holds a flag."""
    return bool({f"--{flag}", f"--harness-{flag}"} & set(command.split()))


def merge(folders: Sequence[Path], out: Path) -> Merged:
    """Join report directories into `out`, which must hold no measurements yet.

    Raises:
        BadFile: shards of different plans, two rows of a case that disagree, or a file that cannot be used.
        HarnessError: `out` is a folder of the user's own.
    """
    if (out / MEASUREMENTS).exists():
        raise BadFile(f"{out} holds measurements already: name a new directory with -o")
    parts = [read_part(folder) for folder in folders]
    command = merged_command([part.session.command for part in parts], out)
    whole, absent = plan_of(parts)
    rows = joined(parts, whole)
    if parts[0].tests:
        rows = rules.settle(rows, parts[0].tests)
    rows = exact.settle(rows)
    if absent and (shard := parts[0].shard):
        cut = partition(whole, shard.count)
        gone = {case: f"shard {index}/{shard.count} never came" for index in absent for case in cut[index - 1]}
        rows = [missing(row.case, gone[row.case]) if row.missing and row.case in gone else row for row in rows]
    ReportDirectory(out).claim("-o ")
    try:
        used = {row.environment for row in rows}
        worlds = {name: world for part in parts for name, world in part.session.environments.items() if name in used}
        worlds = dict(sorted(worlds.items()))
        identities = {name: facts for part in parts for name, facts in part.session.identities.items()}
        (out / LOSSES).mkdir(exist_ok=True)
        for sha in {sha for row in rows for sha in (row.nll, row.detail.get("reference_nll")) if sha}:
            homes = (part.folder / LOSSES for part in parts if isinstance(sha, str) and SHA.fullmatch(sha))
            source = next((path for home in homes if (path := home / f"{sha}.npz").is_file()), None)
            target = out / LOSSES / f"{sha}.npz"
            if source and not target.exists():  # equal names are equal files
                try:
                    os.link(source, target)
                except OSError:  # another file system
                    replace_bytes(target, source.read_bytes())
        ReportDirectory(out).keep_plan(whole)
        ReportDirectory(out).keep(rows, worlds, identities)
    except OSError as error:
        raise BadFile(f"{out} cannot be written: {error.strerror or error}") from error
    notes = tuple(dict.fromkeys(note for part in parts for note in part.session.notes))
    path = report.write(out, rows, whole, worlds, notes=notes, command=command)
    return Merged(path, tuple(rows), absent, frozenset.intersection(*(part.allowed for part in parts)))


def plan_of(parts: Sequence[Part]) -> tuple[tuple[Case, ...], tuple[int, ...]]:
    """The whole plan, and the shards that never came."""
    shards = [part for part in parts if part.shard]
    if not shards:
        return tuple(dict.fromkeys(case for part in parts for case in part.session.planned)), ()
    first = shards[0]
    assert first.shard
    for part in parts:
        if part.shard is None:
            raise BadFile(f"{part.folder} is no shard, {first.folder} is shard {first.shard}: merge shards of one plan")
        if (part.whole, part.shard.count) != (first.whole, first.shard.count):
            raise BadFile(
                f"{part.folder} (shard {part.shard}) and {first.folder} (shard {first.shard}) cut different plans: "
                "give every shard the same options, tests and harness version"
            )
    came = {part.shard.index for part in shards if part.shard}
    return first.whole, tuple(index for index in range(1, first.shard.count + 1) if index not in came)


def joined(parts: Sequence[Part], whole: Sequence[Case]) -> list[Row]:
    """One row a case of the whole plan, a measurement before a reason why there is none."""
    kept: dict[Case, tuple[Row, Path]] = {}
    for part in parts:
        for row in latest(part.session.rows):
            known = kept.get(row.case)
            if known and known[0].value is not None and row.value is not None:
                agree(known, (row, part.folder))
            elif known is None or known[0].value is None:
                kept[row.case] = row, part.folder
    planned = dict.fromkeys(whole)
    if extra := next((case for case in kept if case not in planned), None):
        raise BadFile(f"{kept[extra][1]} holds {extra.id}, which is not in the plan: measure into a fresh directory")
    never = "not reached: its session stopped before it"
    return [kept[case][0] if case in kept else missing(case, never) for case in planned]


def agree(first: tuple[Row, Path], second: tuple[Row, Path]) -> None:
    """BadFile with the field where two measurements of one case, each with its directory, differ in more than time."""
    one, two = first[0], second[0]
    if one.case.family == "latency" or one.metric in UNSTEADY:
        return
    ours, theirs = one.told(), two.told()
    for name in ours:
        same = ours[name] == theirs[name] or repr(ours[name]) == repr(theirs[name])  # NaN equals itself
        same |= name == "identity" and not (ours[name] and theirs[name])  # one is of before it was noted
        if not same and name not in FREE:
            raise BadFile(
                f"{first[1]} and {second[1]} disagree on {one.case.id}, {name}: {_short(ours[name])} and "
                f"{_short(theirs[name])}; leave one of the directories out or measure that case again"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def merged_command(commands: Sequence[str], out: Path) -> str:
    """The first shard's command as one run would have been: no --shard, its --report-dir the merged one."""
    kept: list[str] = []
    command = next(filter(None, commands), "")
    try:
        words = iter(shlex.split(command))
    except ValueError as error:  # not as any session wrote it
        raise BadFile(f"the command in a session.json is none ({error}): {command[:80]!r}; take it out") from error
    for word in words:
        option, equals, _ = word.partition("=")
        if option in DROPPED:
            if not equals and option != "--resume":
                next(words, None)
        elif re.fullmatch(r"--(harness-)?report-dir", option):
            if not equals:
                next(words, None)
            kept += [option, str(out)]
        else:
            kept.append(word)
    return shlex.join(kept)
