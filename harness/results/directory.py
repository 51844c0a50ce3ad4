"""A report directory: its files' names, who may write it, how rows, plan and report get into it and out. No torch.

Nothing that was measured is lost: a row is on the disk before the next is measured, every file is replaced whole, and
one session at a time owns the directory. `read_report` reads one back, or a bare measurements.jsonl, as what a report
is made of.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import msgspec

from harness.core.environment import Environment
from harness.core.errors import BadFile, HarnessError, MissingAsset
from harness.core.files import append_line, owned, replace_text
from harness.core.records import Case, Row
from harness.core.schema import fit, read_json
from harness.core.values import encode, parse_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MEASUREMENTS = "measurements.jsonl"  # one row a line
ENVIRONMENTS = "environments.json"  # by the id that rows name
PLAN = "plan.json"  # every case that was meant
SESSION = "session.json"  # what only the session knows: its command, notes for the reader, what it measures on
SHARD = "shard.json"  # which part of which plan
PUBLISHED = "published.json"  # published figures that the session computed again
REPORT = "report.md"
SIDE, TROUBLE = "side.json", "trouble.log"  # of one side of an upgrade
LOSSES = "nll"  # the folder of per-token losses
TABLES = (MEASUREMENTS, ENVIRONMENTS, PLAN, SESSION, SHARD, PUBLISHED, REPORT, SIDE, TROUBLE)
LOCK = ".session.lock"  # held by the session that writes the directory
UNFINISHED = (*(f".{name}.*" for name in TABLES), ".*.svg.*", ".writable-*", "nll/.*.npz.*", "nll/.reference-*")


class ReportDirectory:
    """One report directory, for who writes it.

    Every method raises HarnessError, one line, for what the disk says: it is full, read-only or gone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses = folder / LOSSES
        self.environments: dict[str, Mapping[str, Any]] = {}  # of the rows that this object was given
        self._owner: IO[str] | None = None

    def path(self, name: str) -> Path:
        """Where the file of a name lies."""
        return self.folder / name

    # one session at a time

    def own(self) -> None:
        """Take the directory for this process until it is released; HarnessError where another session has it."""
        if self._owner is None:
            with writing(self.folder, "--report-dir "):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._owner = owned(self.path(LOCK))
        if self._owner is None:
            raise HarnessError(
                f"another session writes --report-dir {self.folder}: wait for its end, or name another directory"
            )

    def release(self) -> None:
        """Leave the directory to the next session."""
        if self._owner is not None:
            self._owner.close()
            self._owner = None

    def give_up(self) -> None:
        """Release a directory in which nothing could begin; where it holds nothing else, it goes."""
        if self._owner is None:
            return
        with contextlib.suppress(OSError):
            if [path.name for path in self.folder.iterdir()] == [LOCK]:
                self.path(LOCK).unlink()
                self.folder.rmdir()
        self.release()

    def open(self, *, keep: bool) -> None:
        """Make the directory ready, emptied of an earlier session's measurements unless they are kept.

        Only what sessions leave is removed, never what lies behind a link.
        """
        try:
            for path in (self.losses, *map(self.path, TABLES)):
                if path.is_symlink():  # what is written and removed here stays here
                    raise HarnessError(
                        f"--report-dir {self.folder}: its {path.name} is a link to another place: remove it"
                    )
            self.losses.mkdir(parents=True, exist_ok=True)
            probe = self.path(f".writable-{os.getpid()}")
            probe.touch()
            probe.unlink()
            for pattern in UNFINISHED:  # of a session that was killed
                for left in self.folder.glob(pattern):
                    left.unlink(missing_ok=True)
            earlier = (*map(self.path, TABLES), *self.folder.glob("*.svg"), *self.losses.iterdir())
            for old in () if keep else earlier:
                old.unlink(missing_ok=True)
        except OSError as error:
            raise HarnessError(f"--report-dir {self.folder} cannot be written: {error.strerror or error}") from error
        self.environments = self.known_environments() if keep else {}

    # into it

    def append(self, row: Row, world: Mapping[str, Any]) -> None:
        """Flush a row, behind the environment that it was measured in."""
        with writing(self.folder):
            known = self.environments.get(row.environment)
            if row.environment and (known is None or (world and world != known)):
                self.environments[row.environment] = world
                self._write_environments()
            append_line(self.path(MEASUREMENTS), row.to_json())

    def keep(self, rows: Iterable[Row], environments: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """These rows and no others, and the environments: those given, or those that came with `append`."""
        if environments is not None:
            self.environments = dict(environments)
        with writing(self.folder):
            self._write_environments()
            replace_text(self.path(MEASUREMENTS), "".join(row.to_json() + "\n" for row in rows))

    def _write_environments(self) -> None:
        text = json.dumps(self.environments, indent=1, sort_keys=True)
        replace_text(self.path(ENVIRONMENTS), text + "\n")

    def keep_plan(self, cases: Iterable[Case]) -> None:
        """Every case that is meant, in order."""
        self.put({PLAN: plan_text(cases)})

    def keep_session(self, **facts: Any) -> None:
        """What only the session knows, as JSON."""
        self.put({SESSION: json.dumps(facts, indent=1, sort_keys=True) + "\n"})

    def keep_inputs(self, inputs: Mapping[str, str]) -> None:
        """What weights and texts were when the session began, for pytest-xdist's workers.

        They were started before anybody knew which cases are selected, and what xdist sends them later is the order
        of tests alone: no message reaches them. At its end the session writes the file anew, without this.
        """
        try:
            known = parse_json(self.path(SESSION).read_bytes())  # of a session that is resumed: it may be killed again
        except (OSError, ValueError):
            known = {}
        self.keep_session(**{**(known if isinstance(known, dict) else {}), "inputs": dict(inputs)})

    def known_inputs(self) -> dict[str, str]:
        """What `keep_inputs` left; nothing where it cannot be read: then nothing is held."""
        try:
            inputs = parse_json(self.path(SESSION).read_bytes())["inputs"]
            return {str(name): str(value) for name, value in inputs.items()}
        except (OSError, ValueError, AttributeError, KeyError, TypeError):
            return {}

    def put(self, texts: Mapping[str, str]) -> None:
        """Write files by their names, each whole or not at all."""
        for name, text in texts.items():
            with writing(self.path(name)):
                replace_text(self.path(name), text)

    # out of it, for a session that goes on

    def known_environments(self) -> dict[str, Mapping[str, Any]]:
        """Environments by the digest that they still have; none where the file is gone or damaged."""
        try:
            data = parse_json(self.path(ENVIRONMENTS).read_bytes())
            return {name: world for name, world in data.items() if Environment.from_dict(world).id == name}
        except (OSError, ValueError, AttributeError, TypeError, BadFile):
            return {}

    def resumable(self, note: Callable[[str], None] = lambda line: None) -> dict[str, Row]:
        """Measured rows by case id on which a session may build, the last one winning.

        A damaged line, and a row whose losses or environment are gone or damaged, are left out: their cases are
        measured again. `note` gets a line on them.
        """
        from harness.results import losses  # local: it needs numpy, which a report does not

        path = self.path(MEASUREMENTS)
        rows, damaged = sound_rows(path) if path.is_file() else ((), 0)
        measured = {row.case.id: row for row in rows if row.value is not None}
        worlds = self.known_environments()
        whole = functools.cache(functools.partial(losses.holds, self.losses))  # many rows share a loss
        kept = {name: row for name, row in measured.items() if row.environment in worlds and losses_hold(row, whole)}
        if damaged or len(kept) < len(measured):
            lost = len(measured) - len(kept)
            note(
                f"harness: {damaged} damaged lines and {lost} rows without their losses or environment: measured again"
            )
        return kept


@contextlib.contextmanager
def writing(place: Path, option: str = "") -> Iterator[None]:
    """Turn what a disk says (full, read-only, gone) into one line, which names the option that chose the place."""
    try:
        yield
    except OSError as error:
        raise HarnessError(
            f"{option}{place} cannot be written ({error.strerror or error}): make room or name another"
        ) from error


def sound_rows(path: Path) -> tuple[Sequence[Row], int]:
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
    return rows, damaged


def losses_hold(row: Row, whole: Callable[[str], bool]) -> bool:
    """Whether the per-token losses that a row names are there and whole."""
    names = [name for name in (row.nll, row.detail.get("reference_nll")) if name]
    return all(isinstance(name, str) and whole(name) for name in names)


def plan_text(cases: Iterable[Case]) -> str:
    """A plan as plan.json holds it, one field a line."""
    # json's own `indent` leaves its C encoder: ten times slower; names are few and are written many times
    quoted = functools.cache(json.dumps)
    pattern = "{\n" + ",\n".join(f'"{name}": %s' for name in Case._fields) + "\n}"
    text = ",\n".join(pattern % tuple(map(quoted, case)) for case in cases)
    return f"[\n{text}\n]" if text else "[]"


AGAIN = "measure again to write it anew"
AGAIN_PUBLISHED = "run `pytest -m published` again"
T = TypeVar("T")
Nll = Callable[[str], "NDArray[np.float32] | None"]  # per-token NLL in nats by its sha; None where nobody has it


@dataclass(frozen=True)
class SavedSession:
    """A finished (or interrupted) session as its files tell it."""

    rows: tuple[Row, ...]
    planned: tuple[Case, ...]
    environments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what a reader must know of the files themselves
    command: str = ""  # that made it, from session.json where there is one
    folder: Path | None = None  # None for a bare measurements.jsonl: no per-token NLL at hand


def read_report(path: Path) -> SavedSession:
    """Read a report directory, or a bare `.jsonl` file.

    A torn last line (a crash while writing) becomes a note; any other unreadable line is a BadFile, and so are
    plan.json, environments.json and session.json where they are there and unreadable. Without plan.json the rows
    themselves are taken for the plan, with a note, since what never ran is then unknown.
    """
    lines = measurements_of(path)
    if not lines.is_file():
        if published_of(path):  # a session of published figures alone
            return SavedSession((), (), command=_remembered(path).command, folder=path)
        raise MissingAsset(f"{path} holds no measurements: name a report directory or a {MEASUREMENTS} file")
    rows, notes = read_rows(lines)
    if not path.is_dir():
        return SavedSession(rows, tuple(row.case for row in latest(rows)), notes=notes)
    planned = read_plan(path / PLAN)
    if planned is None:
        planned = tuple(row.case for row in latest(rows))
        notes += (f"{PLAN} is not there: cases that never ran are unknown, only rows are counted",)
    environments = _json(path / ENVIRONMENTS, dict[str, dict[str, Any]]) or {}
    remembered = _remembered(path)
    return SavedSession(rows, planned, environments, (*notes, *remembered.notes), remembered.command, path)


@dataclass(frozen=True)
class _Remembered:
    """What session.json holds."""

    command: str = ""
    notes: tuple[str, ...] = ()


def _remembered(folder: Path) -> _Remembered:
    return _json(folder / SESSION, _Remembered) or _Remembered()


def measurements_of(path: Path) -> Path:
    """The file that holds a report directory's measurements, or the bare file itself."""
    return path / MEASUREMENTS if path.is_dir() else path


def read_rows(path: Path) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    """Every row of a measurements.jsonl, and notes on what was wrong with its end."""
    rows: list[Row] = []
    censuses: dict[tuple[str, ...], dict[str, Any]] = {}
    try:
        with path.open("rb") as file:
            for place, line in enumerate(file, 1):
                if line.isspace():
                    continue
                try:
                    row = Row.from_json(line)
                except ValueError as error:
                    torn = not line.endswith(b"\n") and isinstance(error, (json.JSONDecodeError, UnicodeDecodeError))
                    if not torn:  # a line that ends in a newline was written whole
                        message = f"{path}:{place} is no measurement ({error}): repair or remove that line"
                        raise BadFile(message) from error
                    return tuple(rows), (f"the last line of {path.name} is torn (a crash while writing): not counted",)
                known = censuses.setdefault((row.model, row.method_id, row.device), row.census)
                if known == row.census:  # most of a row's bytes, and a group's rows hold one each
                    row.__dict__["census"] = known
                rows.append(row)
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror or error}") from error
    return tuple(rows), ()


def read_plan(path: Path) -> tuple[Case, ...] | None:
    """The planned cases, None where no plan was written."""
    written = _json(path, list[dict[str, str]])
    return None if written is None else cases_of(path, written)


def cases_of(path: Path, written: Iterable[Mapping[str, str]]) -> tuple[Case, ...]:
    """The cases of a plan; BadFile names its file where one is no case."""
    try:
        return tuple(Case(**item) for item in written)
    except TypeError as error:
        raise BadFile(f"{path} is no plan ({error}): {AGAIN}") from error


def _json(path: Path, kind: type[T]) -> T | None:
    return read_json(path, kind, AGAIN) if path.is_file() else None


def latest(rows: Sequence[Row]) -> tuple[Row, ...]:
    """One row a case, the last written standing for those before it (a resumed session appends)."""
    return tuple({row.case: row for row in rows}.values())


def nll_reader(*folders: Path | None) -> Nll:
    """Per-token NLL from the first `folder`/nll that holds it, checked against the sha that names it.

    The reader raises BadFile where a file's bytes are others than its name says.
    """

    def read(sha: str) -> NDArray[np.float32] | None:
        from harness.results import losses  # local: `report` renders without numpy

        return losses.find((folder / LOSSES for folder in folders if folder), sha)

    return read


def published_json(entries: Sequence[Mapping[str, Any]]) -> str:
    """`{"claims": [...]}`, strict JSON."""
    return json.dumps({"claims": encode(list(entries))}, indent=1, allow_nan=False)


def published_of(folder: Path) -> tuple[Mapping[str, Any], ...]:
    """The entries of a report directory, none where it has no such file; BadFile where it is no such file."""
    path = folder / PUBLISHED
    if not path.is_file():
        return ()
    claims = read_json(path, _Published, AGAIN_PUBLISHED).claims
    for number, claim in enumerate(claims, 1):
        fit(claim, _Claim, f"{path}: claims {number}", AGAIN_PUBLISHED)
    return claims


@dataclass(frozen=True)
class _Published:
    claims: tuple[dict[str, Any], ...]


_Claim = msgspec.defstruct(  # what is shown of every claim; the rest depends on what it is of
    "_Claim",
    [(name, str) for name in "report model text protocol part method metric printed unit verdict note".split()],
)
