"""A report directory: its files' names, who may write it, how rows, plan and report get into it and out. No torch.

Nothing that was measured is lost: a row is on the disk before the next is measured, every file is replaced whole, and
one session at a time owns the directory. An earlier session's report stays until a row was measured that takes its
place. Only what the harness wrote is removed, in a folder that bears its mark; a folder of the user's own is refused.
`read_report` reads one back, or a bare measurements.jsonl, as what a report is made of.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import unquote

import msgspec
import numpy as np
from numpy.typing import NDArray

from harness.core.environment import Environment
from harness.core.errors import BadFile, HarnessError, MissingAsset
from harness.core.files import append_line, owned, replace_text
from harness.core.identity import identity_digest
from harness.core.records import Case, Row
from harness.core.schema import ALTERED, fit, read_json
from harness.core.values import checksum, encode, parse_json, sealed
from harness.results import losses
from harness.results.flat import records

MEASUREMENTS = "measurements.jsonl"  # one row a line
ENVIRONMENTS = "environments.json"  # by the id that rows name
IDENTITIES = "identities.json"  # of models, by the digest that rows name: `core.identity`
PLAN = "plan.json"  # every case that was meant
SESSION = "session.json"  # what only the session knows: its command, notes for the reader, what it measures on
SHARD = "shard.json"  # which part of which plan
PUBLISHED = "published.json"  # published figures that the session computed again
PUBLISHED_PAGE = "published.md"  # the same for a reader
REPORT = "report.md"
PAGE = "report.html"  # the same to look at in a browser
SIDE, TROUBLE = "side.json", "trouble.log"  # of one side of an upgrade
UPGRADE = "upgrade.md"  # beside the sides' folders
LOSSES = "nll"  # the folder of per-token losses
TABLES = (
    MEASUREMENTS,
    ENVIRONMENTS,
    IDENTITIES,
    PLAN,
    SESSION,
    SHARD,
    PUBLISHED,
    PUBLISHED_PAGE,
    REPORT,
    PAGE,
    SIDE,
    TROUBLE,
)
EARLIER = (MEASUREMENTS, REPORT, PUBLISHED)  # what makes a report that somebody may want to keep
# held by the session that writes the directory; it stays, and marks a folder that was new or empty when it was taken
LOCK = ".session.lock"
INPUTS = ".inputs.json"  # while pytest-xdist's workers measure: what weights and texts were when the session began
UNFINISHED = (*(f".{name}.*" for name in TABLES), ".*.svg.*", ".writable-*", "nll/.*.npz.*", "nll/.reference-*")
SET_ASIDE = "nll/.set-aside-"  # before the name of a loss's index that an earlier session left
OURS = re.compile(r"[0-9a-f]{64}\.npz|reference-[0-9a-f]{32}|\.[0-9a-f]{32}\.lock(\.turnstile)?")  # in nll/
PLOT = re.compile(r"\]\(([^()/\s]+\.svg)\)")  # as a report shows it


class ReportDirectory:
    """One report directory, for who writes it.

    Every method raises HarnessError, one line, for what the disk says: it is full, read-only or gone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses = folder / LOSSES
        self.environments: dict[str, Mapping[str, Any]] = {}  # of the rows that this object was given
        self.identities: dict[str, Mapping[str, str]] = {}  # of the models that rows may name
        self.waits = False  # an earlier report lies here, and nothing was measured yet that takes its place
        self._keep = False  # the earlier measurements
        self._before: set[str] = set()  # while it waits: what lay in nll/
        self._laid: dict[str, str] = {}  # while it waits: texts by file name, and rows that hold no measurement
        self._held: list[tuple[Row, Mapping[str, Any]]] = []
        self._owner: IO[str] | None = None

    # one session at a time, in a folder of the harness's own

    def claim(self, option: str = "--report-dir ") -> None:
        """Make the folder if need be, and mark it; HarnessError where it holds what no session wrote."""
        mark = self.folder / LOCK
        with writing(self.folder, option):
            self.folder.mkdir(parents=True, exist_ok=True)
            others = sorted(path.name for path in self.folder.iterdir() if path != mark)
            if others and not (mark.is_file() and not mark.is_symlink()) and not written_before(self.folder):
                raise HarnessError(
                    f"{option}{self.folder} holds '{others[0]}' and no report of the harness, which would remove what "
                    "an earlier session left: name a new or an empty folder"
                )
            mark.touch()

    def own(self) -> None:
        """Take the directory for this process until it is released; HarnessError where another session has it."""
        if self._owner is None:
            self.claim()
            with writing(self.folder, "--report-dir "):
                self._owner = owned(self.folder / LOCK)
        if self._owner is None:
            raise HarnessError(
                f"another session writes --report-dir {self.folder}: wait for its end, or name another directory"
            )

    def release(self) -> None:
        """Leave the directory to the next session, an earlier report as it was; where nothing could begin, it goes."""
        if self._owner is None:
            return
        with contextlib.suppress(OSError):
            (self.folder / INPUTS).unlink(missing_ok=True)
            if self.waits:
                self._put_back()
                for path in self.losses.glob("*"):
                    if OURS.fullmatch(path.name) and path.name not in self._before:
                        path.unlink()
                if not self._before:
                    self.losses.rmdir()
            if [path.name for path in self.folder.iterdir()] == [LOCK]:
                (self.folder / LOCK).unlink()
                self.folder.rmdir()
        self._owner.close()
        self._owner = None

    def open(self, *, keep: bool) -> None:
        """Make the directory ready; an earlier session's report is removed, or kept, when the first row was measured.

        Only what sessions leave is removed, never what lies behind a link.
        """
        self.claim()
        with writing(self.folder, "--report-dir "):
            for path in (self.losses, *(self.folder / name for name in (*TABLES, INPUTS))):
                if path.is_symlink():  # what is written and removed here stays here
                    raise HarnessError(
                        f"--report-dir {self.folder}: its {path.name} is a link to another place: remove it"
                    )
            self.losses.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
            self._put_back()  # of a session that was killed
            for pattern in UNFINISHED:
                for left in self.folder.glob(pattern):
                    left.unlink(missing_ok=True)
            self._before = {path.name for path in self.losses.iterdir()}
            if not keep:  # each session computes its own reference
                for index in self.losses.glob("reference-*"):
                    index.replace(self.folder / f"{SET_ASIDE}{index.name}")
        self.environments = self.known_environments() if keep else {}
        self.identities = self.known_identities() if keep else {}
        self.waits, self._keep, self._laid, self._held = True, keep, {}, []
        if not any((self.folder / name).exists() for name in EARLIER):
            self.begin()

    def begin(self) -> None:
        """Let this session's report take the earlier one's place, where that has not happened yet."""
        if not self.waits:
            return
        report = self.folder / REPORT
        with writing(self.folder):
            shown = PLOT.findall(report.read_text("utf-8", "replace")) if report.is_file() else ()
            plots = [name for name in map(unquote, shown) if Path(name).name == name]
            old = [SESSION] if self._keep else [*plots, *TABLES]
            for path in (*(self.folder / name for name in old), *self.folder.glob(f"{SET_ASIDE}*")):
                path.unlink(missing_ok=True)
        self.waits = False
        self.put(self._laid)
        for row, world in self._held:
            self.append(row, world)

    def _put_back(self) -> None:
        """What was set aside for a session that measured nothing."""
        for index in self.folder.glob(f"{SET_ASIDE}*"):
            index.replace(self.folder / LOSSES / index.name.removeprefix(Path(SET_ASIDE).name))

    # into it

    def append(self, row: Row, world: Mapping[str, Any]) -> None:
        """Flush a row, behind the environment that it was measured in; one without a figure replaces no report."""
        if self.waits and row.value is None:
            self._held.append((row, world))
            return
        self.begin()
        with writing(self.folder):
            known = self.environments.get(row.environment)
            if row.environment and (known is None or (world and world != known)):
                self.environments[row.environment] = world
                self._write_environments()
            append_line(self.folder / MEASUREMENTS, row.to_json())

    def keep(
        self,
        rows: Sequence[Row],
        environments: Mapping[str, Mapping[str, Any]] | None = None,
        identities: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """These rows and no others, with environments and identities: those given, or those that were kept before."""
        self.begin()
        if environments is not None:
            self.environments = dict(environments)
        known, named = self.identities if identities is None else identities, {row.identity for row in rows}
        with writing(self.folder):
            self._write_environments()
            replace_text(self.folder / MEASUREMENTS, "".join(row.to_json() + "\n" for row in rows))
            indices = [index.read_text("utf-8", "replace") for index in self.losses.glob("reference-*")]
            shas = {*indices, *(sha for row in rows for sha in (row.nll, row.detail.get("reference_nll")))}
            for path in self.losses.glob("*"):
                if OURS.fullmatch(path.name) and not path.name.startswith("reference-") and path.stem not in shas:
                    path.unlink()
        self.keep_identities({name: facts for name, facts in known.items() if name in named}, alone=True)

    def keep_identities(self, identities: Mapping[str, Mapping[str, str]], *, alone: bool = False) -> None:
        """Facts of models by the digests that rows name, beside those that are known, or alone."""
        self.identities = {**({} if alone else self.identities), **identities}
        if self.identities or (self.folder / IDENTITIES).is_file():
            self.lay({IDENTITIES: json.dumps(self.identities, indent=1, sort_keys=True) + "\n"})

    def _write_environments(self) -> None:
        text = json.dumps(self.environments, indent=1, sort_keys=True)
        replace_text(self.folder / ENVIRONMENTS, text + "\n")

    def keep_plan(self, cases: Iterable[Case]) -> None:
        """Every case that is meant, in order."""
        planned = [case.told() for case in cases]
        self.lay({PLAN: json.dumps(planned, indent=0), SESSION: _session({"plan": checksum(planned)})})

    def keep_session(self, **facts: Any) -> None:
        """What only the session knows: its command, notes for the reader, and digests of plan and environments."""
        self.put({SESSION: _session(facts)})

    def keep_inputs(self, inputs: Mapping[str, str]) -> None:
        """What weights and texts were when the session began, for pytest-xdist's workers.

        They were started before anybody knew which cases are selected, and what xdist sends them later is the order
        of tests alone: no message reaches them.
        """
        self.put({INPUTS: json.dumps(dict(inputs))})

    def known_inputs(self) -> dict[str, str]:
        """What `keep_inputs` left; nothing where it cannot be read: then nothing is held."""
        try:
            inputs = parse_json((self.folder / INPUTS).read_bytes())
        except (OSError, ValueError):
            return {}
        return {name: str(value) for name, value in inputs.items()} if isinstance(inputs, dict) else {}

    def lay(self, texts: Mapping[str, str]) -> None:
        """`put`, once this session's report has taken an earlier one's place."""
        if self.waits:
            self._laid |= texts
        else:
            self.put(texts)

    def put(self, texts: Mapping[str, str]) -> None:
        """Write files by their names, each whole or not at all."""
        for name, text in texts.items():
            with writing(self.folder / name):
                replace_text(self.folder / name, text)

    # out of it, for a session that goes on

    def known_environments(self) -> dict[str, Mapping[str, Any]]:
        """Environments by the digest that they still have; none where the file is gone or damaged."""
        try:
            data = parse_json((self.folder / ENVIRONMENTS).read_bytes())
            return {name: world for name, world in data.items() if Environment.from_dict(world).id == name}
        except (OSError, ValueError, AttributeError, TypeError, BadFile):
            return {}

    def known_identities(self) -> dict[str, Mapping[str, str]]:
        """Facts of models by the digest that they still have; none where the file is gone or damaged."""
        try:
            data = parse_json((self.folder / IDENTITIES).read_bytes())
            return {name: facts for name, facts in data.items() if identity_digest(facts) == name}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def resumable(self, note: Callable[[str], None] = lambda line: None) -> dict[str, Row]:
        """Measured rows by case id on which a session may build, the last one winning.

        A damaged line, a row whose losses or environment are gone or damaged, and a time that was taken beside other
        work are left out: their cases are measured again. `note` gets a line on them.
        """
        measured: dict[str, Row] = {}
        damaged = 0
        path = self.folder / MEASUREMENTS
        for _, _, row in _lines(path) if path.is_file() else ():
            if isinstance(row, ValueError):
                damaged += 1
            elif row.value is not None and not row.detail.get("crowded"):
                measured[row.case.id] = row
        worlds = self.known_environments()
        whole = functools.cache(functools.partial(losses.holds, self.losses))  # many rows share a loss
        kept = {}
        for name, row in measured.items():
            shas = [sha for sha in (row.nll, row.detail.get("reference_nll")) if sha]
            if row.environment in worlds and all(isinstance(sha, str) and whole(sha) for sha in shas):
                kept[name] = row
        if damaged or len(kept) < len(measured):
            lost = len(measured) - len(kept)
            note(
                f"harness: {damaged} damaged lines and {lost} rows without their losses or environment: measured again"
            )
        return kept


def _session(facts: Mapping[str, Any]) -> str:
    return json.dumps(sealed(facts), indent=1, sort_keys=True) + "\n"


def written_before(folder: Path) -> bool:
    """Whether the harness left this folder before it marked its own: it holds a plan, figures or an upgrade's sides."""
    for look in (_planned, published_of):
        try:
            if look(folder):
                return True
        except BadFile:  # somebody else's file of that name
            continue
    return (folder / UPGRADE).is_file() and any(folder.glob(f"*/{SIDE}"))


def _planned(folder: Path) -> bool:
    cases = cases_of(folder / PLAN, read_json(folder / PLAN, list[dict[str, str]]))
    return bool(cases) or (folder / SHARD).is_file()


@contextlib.contextmanager
def writing(place: Path, option: str = "") -> Iterator[None]:
    """Turn what a disk says (full, read-only, gone) into one line, which names the option that chose the place."""
    try:
        yield
    except OSError as error:
        raise HarnessError(
            f"{option}{place} cannot be written ({error.strerror or error}): make room or name another"
        ) from error


def _lines(path: Path) -> Iterator[tuple[int, bytes, Row | ValueError]]:
    """The lines of a measurements.jsonl with their numbers, each as a row or as what is wrong with it."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.isspace():
                    continue
                try:
                    yield number, line, Row.from_json(line)
                except ValueError as error:
                    yield number, line, error
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror or error}") from error


AGAIN = "measure again to write it anew"
AGAIN_PUBLISHED = "run `pytest -m published` again"
T = TypeVar("T")
Nll = Callable[[str], NDArray[np.float32] | None]  # per-token NLL in nats by its sha; None where nobody has it


@dataclass(frozen=True)
class SavedSession:
    """A finished (or interrupted) session as its files tell it."""

    rows: tuple[Row, ...]
    planned: tuple[Case, ...]
    environments: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what a reader must know of the files themselves
    command: str = ""  # that made it, from session.json where there is one
    folder: Path | None = None  # None for a bare measurements.jsonl: no per-token NLL at hand
    identities: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # facts of models, by the rows' digests
    finished: str = ""  # when its report was written first, in UTC; '' of older ones

    def only(self, models: Sequence[str] = (), methods: Sequence[str] = ()) -> SavedSession:
        """The part of some models or methods (all where none is named); BadFile where one has no case here."""
        cases = dict.fromkeys((*self.planned, *(row.case for row in self.rows)))
        for name, wanted in (("model", models), ("method", methods)):
            known = dict.fromkeys(getattr(case, name) for case in cases)
            if unknown := [one for one in wanted if one not in known]:
                raise BadFile(f"{self.folder} holds no case of '{unknown[0]}': it has {', '.join(known)}")
            cases = {case: None for case in cases if not wanted or getattr(case, name) in wanted}
        rows = tuple(row for row in self.rows if row.case in cases)
        return replace(self, rows=rows, planned=tuple(case for case in self.planned if case in cases))

    def to_pandas(self) -> Any:
        """The rows as a pandas DataFrame, one a measured case, under the names of `flat.COLUMNS`."""
        import pandas

        return pandas.DataFrame(records(latest(self.rows)))


def read_report(path: Path) -> SavedSession:
    """Read a report directory, or a bare `.jsonl` file.

    A torn last line (a crash while writing) becomes a note; any other unreadable line is a BadFile, and so are
    plan.json, environments.json, identities.json and session.json where they are there and unreadable, or not as they
    were written. Without plan.json the rows themselves are taken for the plan, with a note, since what never ran is
    then unknown.
    """
    lines = path / MEASUREMENTS if path.is_dir() else path
    remembered = _json(path / SESSION, _Remembered) or _Remembered()
    if not lines.is_file():
        if published_of(path):  # a session of published figures alone
            return SavedSession((), (), command=remembered.command, folder=path)
        raise MissingAsset(f"{path} holds no measurements: name a report directory or a {MEASUREMENTS} file")
    rows: list[Row] = []
    notes: list[str] = []
    censuses: dict[tuple[str, ...], dict[str, Any]] = {}
    for number, line, row in _lines(lines):
        if isinstance(row, ValueError):
            torn = not line.endswith(b"\n") and isinstance(row, (json.JSONDecodeError, UnicodeDecodeError))
            if not torn:  # a line that ends in a newline was written whole
                raise BadFile(f"{lines}:{number} is no measurement ({row}): repair or remove that line") from row
            notes.append(f"the last line of {lines.name} is torn (a crash while writing): not counted")
            break
        known = censuses.setdefault((row.model, row.method_id, row.device), row.census)
        if known == row.census:  # most of a row's bytes, and a group's rows hold one each
            row.__dict__["census"] = known
        rows.append(row)
    if not path.is_dir():
        return SavedSession(tuple(rows), tuple(row.case for row in latest(rows)), notes=tuple(notes))
    written = _json(path / PLAN, list[dict[str, str]], remembered.plan)
    if written is None:
        planned = tuple(row.case for row in latest(rows))
        notes.append(f"{PLAN} is not there: cases that never ran are unknown, only rows are counted")
    else:
        planned = cases_of(path / PLAN, written)
    environments = _json(path / ENVIRONMENTS, dict[str, dict[str, Any]], remembered.environments) or {}
    identities = _json(path / IDENTITIES, dict[str, dict[str, str]]) or {}
    told = (*notes, *remembered.notes), remembered.command, path, identities, remembered.finished
    return SavedSession(tuple(rows), planned, environments, *told)


@dataclass(frozen=True)
class _Remembered:
    """What session.json holds."""

    command: str = ""
    notes: tuple[str, ...] = ()
    plan: str = ""  # digests of plan.json and environments.json
    environments: str = ""
    finished: str = ""


def cases_of(path: Path, written: Iterable[Mapping[str, str]]) -> tuple[Case, ...]:
    """The cases of a plan; BadFile names its file where one is no case."""
    try:
        return tuple(Case(**item) for item in written)
    except TypeError as error:
        raise BadFile(f"{path} is no plan ({error}): {AGAIN}") from error


def _json(path: Path, kind: type[T], check: str = "") -> T | None:
    """What a file holds, None where there is none; BadFile where it no longer has its digest."""
    if not path.is_file():
        return None
    told = read_json(path, kind, AGAIN)
    if check not in ("", checksum(told)):
        raise BadFile(f"{path} {ALTERED}: restore it, or {AGAIN}")
    return told


def latest(rows: Sequence[Row]) -> tuple[Row, ...]:
    """One row a case, the last written standing for those before it (a resumed session appends)."""
    return tuple({row.case: row for row in rows}.values())


def nll_reader(*folders: Path | None) -> Nll:
    """Per-token NLL from the first `folder`/nll that holds it; BadFile where its bytes are not what its sha says."""
    return functools.partial(losses.find, [folder / LOSSES for folder in folders if folder])


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
