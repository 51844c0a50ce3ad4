"""Runs kept in a folder, one file a run, so that branches of a repository merge: what a history is made of. No torch.

A kept run is JSON lines: a head (when, by which command, environments, what models are made of), then its rows without
samples and census. Its name is its time and a digest of its rows; the same run is kept once.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.core.errors import BadFile, HarnessError
from harness.core.files import read_plain, replace_text
from harness.core.records import Row
from harness.core.schema import SCHEMA, check
from harness.core.values import parse_json, sha256_text
from harness.results.directory import MEASUREMENTS, SavedSession, latest, read_report, writing

SUFFIX = ".run.jsonl"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")  # UTC
BRIEF = 8  # hex digits of a digest in a file's name


@dataclass(frozen=True)
class _Head:
    """The first line of a kept run."""

    schema: int
    finished: str
    command: str = ""
    environments: dict[str, dict[str, Any]] = field(default_factory=dict)
    identities: dict[str, dict[str, str]] = field(default_factory=dict)


def keep(run: SavedSession, folder: Path) -> Path:
    """Put a run into a folder, which is made if need be; returns its file. HarnessError for what the disk says."""
    if not TIME.fullmatch(run.finished):
        raise BadFile(f"{run.folder}: '{run.finished}' is no time of a run: measure again to write it anew")
    lines = [row.to_json() for row in brief(run.rows)]
    digest = _digest(lines)
    used = {row.environment for row in run.rows}, {row.identity for row in run.rows}
    worlds, facts = (
        {name: known[name] for name in sorted(names & known.keys())}
        for names, known in zip(used, (run.environments, run.identities), strict=True)
    )
    head = {"schema": SCHEMA, "finished": run.finished, "command": run.command}
    head |= {"environments": worlds, "identities": facts}
    with writing(folder, "--keep "):
        folder.mkdir(parents=True, exist_ok=True)
        if kept := next(iter(folder.glob(f"*-{digest}{SUFFIX}")), None):
            return kept
        time = run.finished.replace("-", "").replace(":", "")
        path = folder / f"{time}-{digest}{SUFFIX}"
        replace_text(path, "".join(line + "\n" for line in (json.dumps(head, sort_keys=True), *lines)))
    return path


def brief(rows: Sequence[Row]) -> list[Row]:
    """One row a case, without what only its own report shows."""
    return [replace(row, samples=(), census={}) for row in latest(rows)]


def read_runs(places: Iterable[Path]) -> list[SavedSession]:
    """The runs of report directories and of folders that keep runs, the oldest first, each once.

    Raises:
        HarnessError: a folder that holds neither, or a file that is damaged.
    """
    found: dict[str, SavedSession] = {}
    for place in places:
        for run in _runs_at(place):
            found.setdefault(_digest([row.to_json() for row in brief(run.rows)]), run)
    return sorted(found.values(), key=lambda run: run.finished)


def _runs_at(place: Path) -> list[SavedSession]:
    if place.is_dir() and not (place / MEASUREMENTS).is_file():
        files = sorted(place.glob(f"*{SUFFIX}"))
        if not files:
            raise HarnessError(f"{place} holds neither a report ({MEASUREMENTS}) nor kept runs (*{SUFFIX})")
        return [_read(path) for path in files]
    if place.name.endswith(SUFFIX):
        return [_read(place)]
    run = read_report(place)
    return [run if run.finished else replace(run, finished=_written(place))]


def _written(place: Path) -> str:
    """When a report of an older harness was written, as the disk says."""
    lines = place / MEASUREMENTS if place.is_dir() else place
    time = datetime.datetime.fromtimestamp(lines.stat().st_mtime, datetime.UTC)
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def _read(path: Path) -> SavedSession:
    """A kept run; BadFile names a line that is none."""
    try:
        first, *lines = read_plain(path).splitlines() or [b""]
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror or error}") from error
    rows: list[Row] = []
    number = 1
    try:
        head = check(parse_json(first), _Head)
        for line in lines:
            number = len(rows) + 2
            rows.append(Row.from_json(line))
    except ValueError as error:
        raise BadFile(f"{path}:{number} is no line of a kept run ({error}): restore the file, or remove it") from error
    planned = tuple(row.case for row in rows)
    told = head.environments, (), head.command, None, head.identities, head.finished
    return SavedSession(tuple(rows), planned, *told)


def _digest(lines: Sequence[str]) -> str:
    return sha256_text("\n".join(sorted(lines)))[:BRIEF]
