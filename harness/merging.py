"""Joins the report directories of shards (or of any sessions on one plan) into one report. No torch.

A shard leaves `shard.json` beside its report: which part it was, and the whole selected plan, so that cases of a shard
that never came are shown as missing. Two measurements of one case must agree in everything but time.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from harness import family, gathering, report
from harness.errors import BadFile
from harness.files import replace_bytes, replace_text, replacement
from harness.jsonvalues import parse_line
from harness.records import Case, Row, Verdict
from harness.report.reading import SHA, Session, measurements_of, plan_text
from harness.sharding import Shard, partition, plan_digest

SHARD_FILE = "shard.json"
CASES = '"cases": '  # in shard.json, before the plan
# of one case two runs may differ in these: they are times, or pages of a process
FREE = frozenset({"seconds", "key", "environment", "samples", "spread", "interval", "baseline"})
UNSTEADY = frozenset({"memory.load_peak", "memory.run_peak"})
DROPPED = frozenset({"--shard", "--harness-shard", "--resume"})  # options that the merged whole no longer has


@dataclass(frozen=True)
class Part:
    """One directory: its session, its measurements, and which shard it was (None where it was no shard)."""

    folder: Path
    session: Session
    file: BinaryIO | None = None  # its measurements, open: what is copied is what was read, whatever takes their place
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


class Found(NamedTuple):
    """The row that stands for a case, and where it came from: of a row that stays as it was the line is copied."""

    row: Row
    folder: Path | None = None
    file: BinaryIO | None = None
    span: tuple[int, int] = (0, 0)

    def written(self, row: Row) -> bytes:
        """What stands in the merged measurements.jsonl for `row`, which is this one or what was made of it."""
        if self.file is None or row is not self.row:
            return row.to_json().encode() + b"\n"
        start, end = self.span
        self.file.seek(start)  # lines are not kept: they are half of what a large merge would hold
        return self.file.read(end - start) + b"\n"


def write_shard(folder: Path, shard: Shard, whole: Sequence[Case], tests: int) -> None:
    """Say beside a report which part of which plan it is, and how many statistical tests the whole plan makes."""
    cases = [case.told() for case in whole]
    told = {"index": shard.index, "count": shard.count, "plan": plan_digest(whole), "tests": tests, "cases": cases}
    replace_text(folder / SHARD_FILE, json.dumps(told) + "\n")


def opened(folder: Path, files: contextlib.ExitStack) -> BinaryIO | None:
    """A directory's measurements, which `files` closes."""
    with contextlib.suppress(OSError):  # `read_report` says what is wrong
        return files.enter_context(measurements_of(folder).open("rb", 2**16))
    return None


def read_part(
    folder: Path, read: Callable[[], Session], file: BinaryIO | None, plans: dict[str, tuple[Case, ...] | None]
) -> Part:
    """A directory with its shard.json, where it has one; BadFile names what is wrong with it.

    `plans` keeps what was read: every shard holds the whole plan, and it is read and checked once.
    """
    session = read()
    path = folder / SHARD_FILE
    if not path.is_file():
        return Part(folder, session, file)
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
    return Part(folder, session, file, shard, digest, planned, tests)


def merge(folders: Sequence[Path], out: Path) -> Merged:
    """Join report directories into `out`, which must hold no measurements yet.

    Raises:
        BadFile: shards of different plans, two rows of a case that disagree, or a file that cannot be used.
    """
    if (out / "measurements.jsonl").exists():
        raise BadFile(f"{out} holds measurements already: name a new directory with -o")
    with uncollected(), contextlib.ExitStack() as files:
        plans: dict[str, tuple[Case, ...] | None] = {}
        lines = {folder: opened(folder, files) for folder in folders}
        with gathering.readers(list(lines)) as readers:
            read = readers.sessions.items()
            parts = {folder: read_part(folder, session, lines[folder], plans) for folder, session in read}
            return _merge([parts[folder] for folder in folders], out, readers)


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No cyclic garbage collection meanwhile: rows hold no cycle, and walking a million of their objects takes time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            if not gc.get_freeze_count():
                gc.freeze()  # as old as they get, else the first collection walks all of them after all
                gc.unfreeze()
            gc.enable()


def _merge(parts: Sequence[Part], out: Path, readers: gathering.Readers) -> Merged:
    whole, absent = plan_of(parts)
    found = joined(parts, whole)
    rows = [one.row for one in found]
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
        linked = readers.beside(link, losses(parts, rows, out / "nll"), out / "nll")
        replace_text(out / "plan.json", plan_text(whole))
        replace_text(out / "environments.json", json.dumps(environments, indent=1, sort_keys=True) + "\n")
        with replacement(out / "measurements.jsonl") as file, ThreadPoolExecutor(1) as pool:
            file.writelines(one.written(row) for one, row in zip(found, rows, strict=True))
            file.flush()
            synced = pool.submit(os.fsync, file.fileno())  # meanwhile the report is made
            command = merged_command([part.session.command for part in parts], out)
            notes = tuple(dict.fromkeys(note for part in parts for note in part.session.notes))
            report.remember(out, notes, command)
            files = report.files(out, rows, whole, environments, notes, command)
            synced.result()
            linked()
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


def joined(parts: Sequence[Part], whole: Sequence[Case]) -> list[Found]:
    """One row a case of the whole plan, a measurement before a reason why there is none."""
    found: dict[Case, Found] = {}
    for part in parts:
        read = zip(part.session.rows, part.session.spans, strict=True)
        last = {row.case: Found(row, part.folder, part.file, span) for row, span in read}
        for case, one in last.items():
            known = found.get(case)
            if known and known.row.value is not None and one.row.value is not None:
                agree(known, one)
            elif known is None or known.row.value is None:
                found[case] = one
    planned = dict.fromkeys(whole)
    if extra := next((case for case in found if case not in planned), None):
        raise BadFile(
            f"{found[extra].folder} holds {extra.id}, which is not in the plan: measure into a fresh directory"
        )
    never = "not reached: its session stopped before it"
    return [found.get(case) or Found(Row.of(case, verdict=Verdict.MISSING, reason=never)) for case in planned]


def agree(first: Found, second: Found) -> None:
    """BadFile with the field where two measurements of one case differ in more than time."""
    one, two = first.row, second.row
    if one.case.family == "latency" or one.metric in UNSTEADY:
        return
    ours, theirs = one.told(), two.told()
    for name in ours:
        if name not in FREE and name != "detail" and not same(ours[name], theirs[name]):
            raise BadFile(
                f"{first.folder} and {second.folder} disagree on {one.case.id}, {name}: {_short(ours[name])} and "
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
