"""Reads a report directory, or a bare measurements.jsonl, back into what a report is made of."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.errors import BadFile, MissingAsset
from harness.core.files import replace_text
from harness.core.records import Case, Censuses, Row
from harness.core.values import encode, parse_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PUBLISHED = "published.json"  # the published figures that a session computed again, in a report directory
SHA = re.compile(r"[0-9a-f]{64}")  # a row is a file's word: no other path than this may come of it
Nll = Callable[[str], "NDArray[np.float32] | None"]  # per-token NLL in nats by its sha; None where nobody has it


@dataclass(frozen=True)
class Session:
    """A finished (or interrupted) session as its files tell it."""

    rows: tuple[Row, ...]
    planned: tuple[Case, ...]
    environments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what a reader must know of the files themselves
    command: str = ""  # that made it, from session.json where there is one
    folder: Path | None = None  # None for a bare measurements.jsonl: no per-token NLL at hand


def read_report(path: Path) -> Session:
    """Read a report directory, or a bare `.jsonl` file.

    A torn last line (a crash while writing) becomes a note; any other unreadable line is a BadFile, and so are
    plan.json, environments.json and session.json where they are there and unreadable. Without plan.json the rows
    themselves are taken for the plan, with a note, since what never ran is then unknown.
    """
    lines = measurements_of(path)
    if not lines.is_file():
        if published_of(path):  # a session of published figures alone
            told = _json(path / "session.json", dict) or {}
            return Session((), (), command=str(told.get("command", "")), folder=path)
        raise MissingAsset(f"{path} holds no measurements: name a report directory or a measurements.jsonl file")
    rows, notes = read_rows(lines)
    if not path.is_dir():
        return Session(rows, tuple(row.case for row in latest(rows)), notes=notes)
    planned = read_plan(path / "plan.json")
    if planned is None:
        planned = tuple(row.case for row in latest(rows))
        notes += ("plan.json is not there: cases that never ran are unknown, only rows are counted",)
    environments = _json(path / "environments.json", dict) or {}
    if not all(isinstance(world, dict) for world in environments.values()):
        raise BadFile(f"{path / 'environments.json'} holds no environments: measure again to write it anew")
    told = _json(path / "session.json", dict) or {}
    kept = told.get("notes", ())
    notes += tuple(map(str, kept if isinstance(kept, list) else ()))
    return Session(rows, planned, environments, notes, str(told.get("command", "")), path)


def measurements_of(path: Path) -> Path:
    """The file that holds a report directory's measurements, or the bare file itself."""
    return path / "measurements.jsonl" if path.is_dir() else path


def read_rows(path: Path) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    """Every row of a measurements.jsonl, and notes on what was wrong with its end."""
    rows: list[Row] = []
    censuses = Censuses()
    try:
        with path.open("rb") as file:
            for place, line in enumerate(file, 1):
                if line.isspace():
                    continue
                try:
                    rows.append(Row.from_json(line, censuses))
                except (ValueError, KeyError, TypeError) as error:
                    torn = not line.endswith(b"\n") and isinstance(error, (json.JSONDecodeError, UnicodeDecodeError))
                    if not torn:  # a line that ends in a newline was written whole
                        told = f"{path}:{place} is no measurement ({error}): repair or remove that line"
                        raise BadFile(told) from error
                    return tuple(rows), (f"the last line of {path.name} is torn (a crash while writing): not counted",)
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror or error}") from error
    return tuple(rows), ()


def plan_text(cases: Iterable[Case]) -> str:
    """A plan as plan.json holds it, one field a line."""
    # json's own `indent` leaves its C encoder: ten times slower; names are few and are written many times
    quoted = functools.cache(json.dumps)
    pattern = "{\n" + ",\n".join(f'"{name}": %s' for name in Case._fields) + "\n}"
    text = ",\n".join(pattern % tuple(map(quoted, case)) for case in cases)
    return f"[\n{text}\n]" if text else "[]"


def sound_rows(path: Path) -> tuple[tuple[Row, ...], int]:
    """The lines of a measurements.jsonl that can be read, and how many cannot: what a session may build on."""
    rows, damaged = [], 0
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror or error}") from error
    for line in filter(bytes.strip, lines):
        try:
            rows.append(Row.from_json(line))
        except (ValueError, KeyError, TypeError):
            damaged += 1
    return tuple(rows), damaged


def read_plan(path: Path) -> tuple[Case, ...] | None:
    """The planned cases, None where no plan was written."""
    data = _json(path, list)
    if data is None:
        return None
    try:
        return tuple(map(Case.from_dict, data))
    except TypeError as error:
        raise BadFile(f"{path} is no plan ({error}): measure again to write it anew") from error


def _json(path: Path, kind: type) -> Any:
    if not path.is_file():
        return None
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadFile(f"{path} cannot be read ({error}): measure again to write it anew") from error
    if not isinstance(data, kind):
        raise BadFile(f"{path} should hold a JSON {kind.__name__}: measure again to write it anew")
    return data


def latest(rows: Sequence[Row]) -> tuple[Row, ...]:
    """One row a case, the last written standing for those before it (a resumed session appends)."""
    return tuple({row.case: row for row in rows}.values())


def nll_reader(folder: Path | None) -> Nll:
    """Per-token NLL from `folder`/nll, checked against the sha that names it; BadFile where the bytes differ."""

    def read(sha: str) -> NDArray[np.float32] | None:
        from harness.results import losses  # local: `report` renders without numpy

        return losses.load(folder / "nll", sha) if folder and SHA.fullmatch(sha) else None

    return read


def published_json(entries: Sequence[Mapping[str, Any]]) -> str:
    """`{"claims": [...]}`, strict JSON."""
    return json.dumps({"claims": encode(list(entries))}, indent=1, allow_nan=False)


def keep_published(folder: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Put entries into a report directory."""
    try:
        replace_text(folder / PUBLISHED, published_json(entries) + "\n")
    except OSError as error:
        raise BadFile(f"{folder / PUBLISHED} cannot be written: {error.strerror or error}") from error


def published_of(folder: Path) -> tuple[Mapping[str, Any], ...]:
    """The entries of a report directory, none where it has no such file; BadFile where it is no such file."""
    path = folder / PUBLISHED
    if not path.is_file():
        return ()
    try:
        found = parse_json(path.read_bytes())["claims"]
        needed = (
            "report",
            "model",
            "text",
            "protocol",
            "part",
            "method",
            "metric",
            "printed",
            "unit",
            "verdict",
            "note",
        )
        for one in found:
            for name in needed:
                if not isinstance(one[name], str):
                    raise TypeError(f"{name} is no text")
        return tuple(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        told = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise BadFile(f"{path} holds no published figures ({told}): run `pytest -m published` again") from error
