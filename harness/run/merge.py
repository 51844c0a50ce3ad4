"""Joins the report directories of shards (or of any sessions on one plan) into one report. No torch.

A shard leaves `shard.json` beside its report: which part it was, and the whole selected plan, so that cases of a shard
that never came are shown as missing. Two measurements of one case must agree in everything but time.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import report
from harness.core.errors import BadFile
from harness.core.files import replace_bytes, replace_text
from harness.core.options import Shard
from harness.core.records import Case, Row, Verdict
from harness.core.values import parse_line
from harness.judge import error_rate
from harness.results.reading import SHA, Session, latest, plan_text, read_report
from harness.run.shards import partition, plan_digest

SHARD_FILE = "shard.json"
CASES = '"cases": '  # in shard.json, before the plan
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
    tests: int = 0  # statistical tests of the whole plan (`error_rate`)


@dataclass(frozen=True)
class Merged:
    """What came of a merge."""

    report: Path
    rows: tuple[Row, ...]
    absent: tuple[int, ...]  # shards that never came, counted from 1


def write_shard(folder: Path, shard: Shard, whole: Sequence[Case], tests: int) -> None:
    """Say beside a report which part of which plan it is, and how many statistical tests the whole plan makes."""
    cases = [case.told() for case in whole]
    told = {"index": shard.index, "count": shard.count, "plan": plan_digest(whole), "tests": tests, "cases": cases}
    replace_text(folder / SHARD_FILE, json.dumps(told) + "\n")


def read_part(folder: Path, plans: dict[str, tuple[Case, ...] | None]) -> Part:
    """A directory with its shard.json, where it has one; BadFile names what is wrong with it.

    `plans` keeps what was read: every shard holds the whole plan, and it is read and checked once.
    """
    session = read_report(folder)
    path = folder / SHARD_FILE
    if not path.is_file():
        return Part(folder, session)
    try:
        head, mark, written = path.read_text(encoding="utf-8").partition(CASES)  # they are last: `write_shard`
        told = parse_line(f"{head}{mark}null}}".encode() if mark else head.encode())
        shard, digest, tests = Shard(int(told["index"]), int(told["count"])), str(told["plan"]), int(told["tests"])
        if (known := f"{digest} {written}") not in plans:
            whole = tuple(Case.from_dict(item) for item in parse_line(f"{{{CASES}{written}".encode())["cases"])
            plans[known] = whole if plan_digest(whole) == digest else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadFile(f"{path} cannot be read ({error}): measure that shard again") from error
    if (planned := plans[known]) is None or not 1 <= shard.index <= shard.count:
        raise BadFile(f"{path} does not hold the plan that it names: measure that shard again")
    return Part(folder, session, shard, digest, planned, tests)


def merge(folders: Sequence[Path], out: Path) -> Merged:
    """Join report directories into `out`, which must hold no measurements yet.

    Raises:
        BadFile: shards of different plans, two rows of a case that disagree, or a file that cannot be used.
    """
    if (out / "measurements.jsonl").exists():
        raise BadFile(f"{out} holds measurements already: name a new directory with -o")
    plans: dict[str, tuple[Case, ...] | None] = {}
    return _merge([read_part(folder, plans) for folder in folders], out)


def _merge(parts: Sequence[Part], out: Path) -> Merged:
    whole, absent = plan_of(parts)
    rows = joined(parts, whole)
    if parts[0].tests:
        rows = error_rate.settle(rows, parts[0].tests)
    if absent:
        reasons = missing_reasons(whole, parts[0].shard, absent)
        rows = [row if row.value is not None else _told(row, reasons) for row in rows]
    try:
        out.mkdir(parents=True, exist_ok=True)
        environments = {name: world for part in parts for name, world in part.session.environments.items()}
        used = {row.environment for row in rows}
        environments = {name: world for name, world in sorted(environments.items()) if name in used}
        link(losses(parts, rows, out / "nll"), out / "nll")
        replace_text(out / "plan.json", plan_text(whole))
        replace_text(out / "environments.json", json.dumps(environments, indent=1, sort_keys=True) + "\n")
        replace_text(out / "measurements.jsonl", "".join(row.to_json() + "\n" for row in rows))
        command = merged_command([part.session.command for part in parts], out)
        notes = tuple(dict.fromkeys(note for part in parts for note in part.session.notes))
        report.remember(out, notes, command)
        files = report.files(out, rows, whole, environments, notes, command)
    except OSError as error:
        raise BadFile(f"{out} cannot be written: {error.strerror or error}") from error
    return Merged(report.put(out, files), tuple(rows), absent)


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
    """BadFile with the field where two measurements of one case, each with its directory, differ in more than time."""
    one, two = first[0], second[0]
    if one.case.family == "latency" or one.metric in UNSTEADY:
        return
    ours, theirs = one.told(), two.told()
    for name in ours:
        if name not in FREE and name != "detail" and not same(ours[name], theirs[name]):
            raise BadFile(
                f"{first[1]} and {second[1]} disagree on {one.case.id}, {name}: {_short(ours[name])} and "
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


def losses(parts: Sequence[Part], rows: Iterable[Row], folder: Path) -> dict[Path, list[str]]:
    """Files of per-token losses that the rows name and `folder`, made here, lacks, by the directory that has them."""
    wanted = {sha for row in rows for sha in (row.nll, row.detail.get("reference_nll")) if sha}
    wanted = {f"{sha}.npz" for sha in wanted if isinstance(sha, str) and SHA.fullmatch(sha)}
    folder.mkdir(exist_ok=True)
    wanted.difference_update(path.name for path in folder.iterdir())
    found = {}
    for kept in (part.folder / "nll" for part in parts):
        if kept.is_dir():
            found[kept] = sorted(wanted.intersection(path.name for path in kept.iterdir()))
            wanted.difference_update(found[kept])
    return found


def link(found: Mapping[Path, Sequence[str]], folder: Path) -> None:
    """Link (or copy) the files into `folder`; content-addressed, so equal names are equal files."""
    for source, name in ((kept / name, name) for kept, names in found.items() for name in names):
        try:
            os.link(source, folder / name)
        except FileExistsError:
            continue
        except OSError:  # another file system
            replace_bytes(folder / name, source.read_bytes())


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
