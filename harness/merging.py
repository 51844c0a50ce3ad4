"""Joins the report directories of shards (or of any sessions on one plan) into one report. No torch.

A shard leaves `shard.json` beside its report: which part it was, and the whole selected plan, so that cases of a shard
that never came are shown as missing. Two measurements of one case must agree in everything but time.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import family, report
from harness.errors import BadFile
from harness.files import replace_text
from harness.records import Case, Row, Verdict
from harness.report.reading import SHA, Session, latest, read_report
from harness.sharding import Shard, partition, plan_digest

SHARD_FILE = "shard.json"
# of one case two runs may differ in these: they are times, or pages of a process
FREE = frozenset({"seconds", "key", "environment", "samples", "spread", "interval", "baseline"})
UNSTEADY = frozenset({"memory.load_peak", "memory.run_peak"})
DROPPED = frozenset({"--shard", "--harness-shard", "--resume"})  # options that the merged whole no longer has


@dataclass(frozen=True)
class Part:
    """One directory: its session, and which shard it was (None where it was no shard)."""

    folder: Path
    session: Session
    shard: Shard | None = None
    digest: str = ""
    whole: tuple[Case, ...] = ()  # the plan before it was cut
    tests: int = 0  # statistical tests of the whole plan (`harness.family`)


@dataclass(frozen=True)
class Merged:
    """What came of a merge."""

    report: Path
    rows: tuple[Row, ...]
    absent: tuple[int, ...]  # shards that never came, counted from 1


def write_shard(folder: Path, shard: Shard, whole: Sequence[Case], tests: int) -> None:
    """Say beside a report which part of which plan it is, and how many statistical tests the whole plan makes."""
    cases = [vars(case) for case in whole]
    told = {"index": shard.index, "count": shard.count, "plan": plan_digest(whole), "tests": tests, "cases": cases}
    replace_text(folder / SHARD_FILE, json.dumps(told) + "\n")


def read_part(folder: Path) -> Part:
    """A directory with its shard.json, where it has one; BadFile names what is wrong with it."""
    session = read_report(folder)
    path = folder / SHARD_FILE
    if not path.is_file():
        return Part(folder, session)
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        whole = tuple(Case(**item) for item in told["cases"])
        shard, digest = Shard(int(told["index"]), int(told["count"])), str(told["plan"])
        tests = int(told["tests"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadFile(f"{path} cannot be read ({error}): measure that shard again") from error
    if plan_digest(whole) != digest or not 1 <= shard.index <= shard.count:
        raise BadFile(f"{path} does not hold the plan that it names: measure that shard again")
    return Part(folder, session, shard, digest, whole, tests)


def merge(folders: Sequence[Path], out: Path) -> Merged:
    """Join report directories into `out`, which must hold no measurements yet.

    Raises:
        BadFile: shards of different plans, two rows of a case that disagree, or a file that cannot be used.
    """
    if (out / "measurements.jsonl").exists():
        raise BadFile(f"{out} holds measurements already: name a new directory with -o")
    parts = [read_part(folder) for folder in folders]
    whole, absent = plan_of(parts)
    rows = joined(parts, whole)
    if parts[0].tests:
        rows = family.settle(rows, parts[0].tests)
    if absent:
        reasons = missing_reasons(whole, parts[0].shard, absent)
        rows = [row if row.value is not None else _told(row, reasons) for row in rows]
    try:
        out.mkdir(parents=True, exist_ok=True)
        environments = {name: world for part in parts for name, world in part.session.environments.items()}
        used = {row.environment for row in rows}
        environments = {name: world for name, world in sorted(environments.items()) if name in used}
        carry_losses(parts, rows, out / "nll")
        _write(out, rows, whole, environments)
    except OSError as error:
        raise BadFile(f"{out} cannot be written: {error.strerror or error}") from error
    command = merged_command([part.session.command for part in parts], out)
    notes = tuple(dict.fromkeys(note for part in parts for note in part.session.notes))
    return Merged(report.write(out, rows, whole, environments, notes=notes, command=command), tuple(rows), absent)


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
        if (part.digest, part.shard.count) != (first.digest, first.shard.count):
            raise BadFile(
                f"{part.folder} (shard {part.shard}) and {first.folder} (shard {first.shard}) cut different plans: "
                "give every shard the same options, tests and harness version"
            )
    came = {part.shard.index for part in shards if part.shard}
    return first.whole, tuple(index for index in range(1, first.shard.count + 1) if index not in came)


def joined(parts: Sequence[Part], whole: Sequence[Case]) -> list[Row]:
    """One row a case of the whole plan, a measurement before a reason why there is none."""
    found: dict[Case, tuple[Row, Path]] = {}
    for part in parts:
        for row in latest(part.session.rows):
            known = found.get(row.case)
            if known and known[0].value is not None and row.value is not None:
                agree(known, (row, part.folder))
            elif known is None or known[0].value is None:
                found[row.case] = row, part.folder
    planned = dict.fromkeys(whole)
    if extra := next((case for case in found if case not in planned), None):
        raise BadFile(f"{found[extra][1]} holds {extra.id}, which is not in the plan: measure into a fresh directory")
    never = "not reached: its session stopped before it"
    return [
        found[case][0] if case in found else Row.of(case, verdict=Verdict.MISSING, reason=never) for case in planned
    ]


def agree(first: tuple[Row, Path], second: tuple[Row, Path]) -> None:
    """BadFile with the field where two measurements of one case differ in more than time."""
    (one, here), (two, there) = first, second
    if one.case.family == "latency" or one.metric in UNSTEADY:
        return
    ours, theirs = vars(one), vars(two)
    for name in ours:
        if name not in FREE and name != "detail" and not same(ours[name], theirs[name]):
            raise BadFile(
                f"{here} and {there} disagree on {one.case.id}, {name}: {_short(ours[name])} and "
                f"{_short(theirs[name])}; leave one of the directories out or measure that case again"
            )


def same(one: Any, two: Any) -> bool:
    """Equality in which NaN equals itself."""
    both = isinstance(one, float) and isinstance(two, float)
    return bool(one == two or (both and math.isnan(one) and math.isnan(two)))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def missing_reasons(whole: Sequence[Case], shard: Shard | None, absent: Iterable[int]) -> dict[Case, str]:
    """Why cases of absent shards have no row."""
    assert shard
    parts = partition(whole, shard.count)
    return {case: f"shard {index}/{shard.count} never came" for index in absent for case in parts[index - 1]}


def _told(row: Row, reasons: Mapping[Case, str]) -> Row:
    reason = reasons.get(row.case)
    return Row.of(row.case, verdict=Verdict.MISSING, reason=reason) if reason else row


def carry_losses(parts: Sequence[Part], rows: Iterable[Row], folder: Path) -> None:
    """Link (or copy) the per-token losses that the rows name; content-addressed, so equal names are equal files."""
    wanted = {sha for row in rows for sha in (row.nll, row.detail.get("reference_nll")) if sha}
    wanted = {sha for sha in wanted if isinstance(sha, str) and SHA.fullmatch(sha)}
    folder.mkdir(exist_ok=True)
    for part in parts:
        for sha in sorted(wanted):
            source, target = part.folder / "nll" / f"{sha}.npz", folder / f"{sha}.npz"
            if not target.exists() and source.is_file():
                _link(source, target)


def _link(source: Path, target: Path) -> None:
    with contextlib.suppress(OSError):  # another file system: copied instead
        os.link(source, target)
        return
    target.write_bytes(source.read_bytes())


def _write(out: Path, rows: Sequence[Row], whole: Sequence[Case], environments: Mapping[str, Any]) -> None:
    replace_text(out / "plan.json", json.dumps([vars(case) for case in whole], indent=0))
    replace_text(out / "environments.json", json.dumps(environments, indent=1, sort_keys=True) + "\n")
    replace_text(out / "measurements.jsonl", "".join(row.to_json() + "\n" for row in rows))


def merged_command(commands: Sequence[str], out: Path) -> str:
    """The first shard's command as one run would have been: no --shard, its --report-dir the merged one."""
    told = next((command for command in commands if command), "")
    kept: list[str] = []
    words = iter(shlex.split(told))
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
