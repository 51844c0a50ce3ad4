"""Baseline files: exact facts, recorded figures, and the per-token losses behind them. Read, found, written; no torch.

    baselines/<model>/<method>.yaml           exact facts: census, predicted bytes, tokens
    baselines/<model>/<method>@<class>.yaml   figures of a device class (losses) or of an environment class (the rest)
    baselines/<model>/nll/<sha>.npz           per-token NLL of recorded cases, float32
    baselines/<model>/identities.yaml         what the model was, by the digest that figures name (`core.identity`)

Names are the specifications' injective file names, a class's ':' written '+'. Nothing is written but by `record` and,
through pytest-regressions, from `exact_document`, by one process at a time (`recording`). An entry of an overlay is a
`Recorded` without where it was found; its environment stands once in the file. Floats are kept to ten significant
digits, so that a person can review them and a second writing changes nothing. Exact facts must be equal in every
environment; their file is

    weights: {cpu: {bytes: {memory.storage: 123}, census: {...}}}    by device, whose default dtype differs
    texts: {lee: {chunk:512: {first 4096: {token_hash: ..., tokens: 4096}}}}
    provenance: {recorded: ..., device_class: ..., environment: {...}}

Each entry and each file of exact facts carries `check`, a digest of what it says, to which whoever reads it holds it:
another layout is the same, a changed figure is refused. Files of before have none; `seal` adds it.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import math
import os
import re
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from glob import escape
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

import msgspec
import yaml
from msgspec.structs import fields, replace

from harness.core import catalog
from harness.core.contracts import Member
from harness.core.environment import LATER, Environment, class_difference
from harness.core.errors import BadFile, BadSpecification
from harness.core.files import owned, replace_text
from harness.core.identity import identity_digest
from harness.core.records import Case, Row, Verdict
from harness.core.schema import ALTERED, SCHEMA, Table, fit, read_yaml
from harness.core.specification import parse_method
from harness.core.text import plural
from harness.core.values import CHECK, checksum, decode_number, digest, sealed
from harness.judge import bounds
from harness.results import losses

FIX = "restore it from version control, or delete it and record again with --regen-all"
DERIVED = "matrices"  # of a census: told by the weights that it lists and the model's architecture
IDENTITIES = "identities.yaml"  # of a model's folder
IDENTIFY = "python -m harness rebaseline --identify"
CHANGED = frozenset({Verdict.INPUT_CHANGED, Verdict.WORSE, Verdict.BETTER, Verdict.NOT_COMPARABLE, Verdict.UNRECORDED})
DIGITS = 10  # a float32 loss has 7, a clock of nanoseconds 9
# of a row's detail, what a later judgement reads: losses of the reference, and how a timing was compared
KEPT = (
    "reference_nll", "log_ratio", "log_ratio_low", "log_ratio_high", "aa_floor", "crowded", "reference_p50", "tokens",
    "reference_identity",
)  # fmt: skip
OUT_OF_BOUND = "out_of_bound"  # of an entry's detail: recorded all the same, and it fails against its bound still
PLACE = ("file", "carries", "difference")  # where it was found, never in the file
MOST = 80  # characters of a class in a file name
NAME_LENGTH = 120  # of a model's or method's part of a file name: file systems take 255 for all of it
BRIEF = 12  # characters of a hash or table that tell it from another in a line
LOCK = ".recording.lock"  # in the folder while somebody writes there
POLL_SECONDS = 0.02

Parts = dict[tuple[str, ...], Any]


class Recorded(Table, frozen=True):
    """One figure of a baseline file; units as in the row that it came from."""

    metric: str
    device: str
    value: float
    unit: str
    count: int = 1
    dataset: str = ""
    protocol: str = ""
    reference: str = "fp32"
    spread: float | None = None
    interval: tuple[float, float] | None = None
    floor: float | None = None  # of the change, measured or set when it was recorded
    repeats: int = 1
    method_id: str = ""
    revision: str = ""
    identity: str = ""  # digest, of the facts in identities.yaml beside the file; "" in records of before it was noted
    protocol_id: str = ""
    token_hash: str = ""
    nll: str = ""  # nll/<sha>.npz beside the file
    detail: dict[str, Any] = msgspec.field(default_factory=dict)
    recorded: str = ""  # when, UTC
    environment: Environment = Environment()
    file: str = ""  # that served, relative to the baselines folder
    carries: bool = True  # False: recorded for another class of environments
    difference: str = ""  # then, the field that differs: 'device class: cpu:avx2 -> cpu:avx512'

    def __post_init__(self) -> None:
        for name in ("value", "spread", "floor"):
            if not math.isfinite(getattr(self, name) or 0.0):
                raise ValueError(f"{name} must be finite, not {getattr(self, name)}")
        if self.interval and not self.interval[0] <= self.interval[1]:
            raise ValueError(f"interval must be two numbers, the lower first, not {list(self.interval)}")

    @classmethod
    def of_row(cls, row: Row, environment: Environment, when: str) -> Recorded:
        """The entry that records a row; ValueError for a row without a finite value."""
        if row.value is None or not math.isfinite(row.value):
            raise ValueError(f"{row.case.id}: only a finite figure can be recorded, not {row.value}")
        detail = {name: row.detail[name] for name in KEPT if row.detail.get(name) is not None}
        detail |= {OUT_OF_BOUND: True} if row.verdict_reference is Verdict.OUT_OF_BOUND else {}
        taken = {item.name: getattr(row, item.name) for item in fields(cls) if item.name in Row.__dataclass_fields__}
        taken |= {"detail": detail, "floor": decode_number(row.detail.get("floor"))}
        taken |= {"repeats": max(1, len(row.samples)), "environment": environment, "recorded": when}
        return cls(**rounded(taken))

    @property
    def key(self) -> tuple[str, ...]:
        """What another recording of the same thing replaces: a text stands once a limit, a timing once a machine."""
        machine = self.environment.machine if "log_ratio" in self.detail else ""
        limit = token_limit(self.protocol_id)
        return (self.dataset, self.protocol, self.metric, self.device, self.reference, limit, machine)

    @property
    def check(self) -> str:
        """A digest of the entry with its environment. What is empty counts for nothing: a later field breaks none."""
        world = {name: value for name, value in world_facts(self.environment).items() if value}
        return checksum({**self.facts(), "environment": world})

    def to_entry(self) -> dict[str, Any]:
        """YAML: the facts, with the digest behind them."""
        return {**self.facts(), CHECK: self.check}

    def facts(self) -> dict[str, Any]:
        """What is not empty, by name; the environment is its key in the file."""
        entry: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in PLACE or value is None or value == "" or value == {}:
                continue
            if item.name == "environment":
                value = world_key(value)
            if item.name == "value" and self.unit == "B":
                value = int(value)
            entry[item.name] = list(value) if isinstance(value, tuple) else value
        return entry


def world_key(environment: Environment) -> str:
    """12 hex digits for an environment with its checkout: by it an entry names its world in the file."""
    return digest(world_facts(environment))[:12]


def world_facts(environment: Environment) -> dict[str, Any]:
    """An environment as a file of baselines holds it: what is so in all that were recorded before is left out."""
    return {key: value for key, value in environment.to_dict().items() if key not in LATER or value != LATER[key]}


def rounded(value: Any) -> Any:
    """Floats inside a JSON value to ten significant digits, whole ones (bytes) as they are; tuples stay tuples."""
    if isinstance(value, float):
        return value if value.is_integer() else float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(rounded(item) for item in value)
    return value


def lasts(row: Row, *, timed: bool) -> bool:
    """Whether the figure is one of losses, which are carried over a device class."""
    return bool(row.dataset) and not timed


def token_limit(protocol_id: str) -> str:
    """'all', or 'first 4096': how much of the text a protocol id says was read."""
    match = re.search(r"\btokens: (?:the )?(first \d+)", protocol_id)
    return match[1] if match else "all"


def reading_of(protocol_id: str) -> str:
    """What a protocol id says of windows, of what they score and of the average: alike under any name of them."""
    match = re.search(r"; (windows: .*); normaliser: ", protocol_id)
    return match[1] if match else ""


class Baselines:
    """The recorded figures of a folder, each file read once a change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kept: dict[tuple[Path, int, int], Any] = {}

    def serving(self, row: Row, environment: Environment) -> Recorded | None:
        """The record that serves a row: `find`, or one of the same windows under another name of their protocol.

        A model that reads 256 tokens at once does the same under chunk:256 and chunk:512.
        """
        return self.find(row.case, environment, token_limit(row.protocol_id), reading_of(row.protocol_id))

    def find(
        self, case: Case, environment: Environment, limit: str | None = None, reading: str = ""
    ) -> Recorded | None:
        """The record that serves a case here: exact facts, else the most specific overlay that holds it.

        Where only another class's overlay holds it, that one comes back with `carries` False and the field that
        differs; a record under another reference comes back too, after those under this one.

        Args:
            case: whose model, method, metric, dataset, protocol and device a record must equal.
            environment: here.
            limit: of tokens (`token_limit`), which a record of a text must equal too; None takes any.
            reading: of windows (`reading_of`), which serves under another protocol's name as well.
        """
        document = self.facts(case)
        value = _parts(document).get(("weights", case.device, "bytes", case.metric))
        if value is not None:
            told, file = document.get("provenance", {}), str(exact_path(self.folder, case).relative_to(self.folder))
            world, own = Environment.from_dict(told.get("environment", {})), self._identity_of(case)
            own = told.get("identity") or own
            known: dict[str, Any] = {"recorded": told.get("recorded", ""), "environment": world, "file": file}
            return Recorded(case.metric, case.device, value, "B", identity=own, **known)
        wanted = (case.metric, case.dataset, case.device)
        own = f"@{environment.environment_class.replace(':', '+')}.yaml"

        def rank(entry: Recorded) -> tuple[Any, ...]:
            """What serves best is greatest: carried, same reference and name, most specific file, near, newest."""
            near = entry.environment.device_class == environment.device_class
            same_machine = entry.environment.machine == environment.machine
            same_reference = entry.reference == case.reference
            specific = entry.file.endswith(own)
            same_name = entry.protocol == case.protocol
            return entry.carries, same_reference, same_name, specific, near, same_machine, entry.recorded, entry.file

        found = []
        for path in overlays(self.folder / stem(case.model), stem(case.method)):
            reach, entries = self._cached(path, read_overlay)
            carries = reach in (environment.environment_class, environment.device_class)
            file = str(path.relative_to(self.folder))
            for entry in entries:
                if limit not in (None, token_limit(entry.protocol_id)):
                    continue
                same = entry.protocol == case.protocol or (reading and reading_of(entry.protocol_id) == reading)
                if same and (entry.metric, entry.dataset, entry.device) == wanted:
                    what = "" if carries else class_difference(entry.environment, environment) or f"class: {reach}"
                    found.append(replace(entry, file=file, carries=carries, difference=what))
        return max(found, key=rank, default=None)

    def _identity_of(self, case: Case) -> str:
        """Which model exact facts are of, which say so nowhere: that of the newest figure of the model and method."""
        paths = overlays(self.folder / stem(case.model), stem(case.method))
        found = [entry for path in paths for entry in self._cached(path, read_overlay)[1]]
        return max(found, key=lambda entry: entry.recorded).identity if found else ""

    def identity(self, name: str) -> Mapping[str, str] | None:
        """The facts behind a digest that figures name; None where no model's folder has it."""
        files = sorted(self.folder.glob(f"*/{IDENTITIES}"))
        return next((known[name] for file in files if name in (known := self._cached(file, read_identities))), None)

    def unidentified(self, cases: Iterable[Case]) -> str:
        """What the records of these cases lack since they are older, in one line with the command; '' for nothing."""
        found = Counter[str]()
        for model, method in dict.fromkeys((case.model, case.method) for case in cases if case.family != "invariant"):
            for path in overlays(self.folder / stem(model), stem(method)):
                found[model] += sum(not entry.identity for entry in self._cached(path, read_overlay)[1])
        if not found.total():
            return ""
        models = ", ".join(model for model, count in found.items() if count)
        place = os.path.relpath(self.folder)
        command = IDENTIFY if place == "baselines" else f"{IDENTIFY} --baselines {shlex.quote(place)}"
        return (
            f"no identity of the model is recorded with {plural(found.total(), 'figure')} of {models}: an edited "
            f"config, tokenizer or code is not seen there; {command} adds it and measures nothing"
        )

    def unpaired(self, cases: Iterable[Case]) -> set[Case]:
        """The paired losses among the cases for which losses that a record names are not there."""
        holds = functools.cache(losses.holds)  # several methods name one reference's
        found = set()
        for case in cases:
            if case.family != "perplexity" or not catalog.member_of(case).paired:
                continue
            for path in overlays(self.folder / stem(case.model), stem(case.method)):
                for entry in self._cached(path, read_overlay)[1]:
                    same = (entry.metric, entry.dataset, entry.device) == (case.metric, case.dataset, case.device)
                    names = entry.nll, str(entry.detail.get("reference_nll", ""))
                    if same and not all(holds(path.parent / "nll", sha) for sha in names):
                        found.add(case)
        return found

    def facts(self, case: Case) -> dict[str, Any]:
        """The file of a case's exact facts; {} where there is none."""
        path = exact_path(self.folder, case)
        return self._cached(path, read_exact) if path.is_file() else {}

    def _cached(self, path: Path, read: Callable[[Path], Any]) -> Any:
        status = path.stat()
        version = (path, status.st_mtime_ns, status.st_size)
        if version not in self._kept:
            self._kept[version] = read(path)
        return self._kept[version]


# files


def overlays(home: Path, method_stem: str = "") -> list[Path]:
    """The overlay files of a model's folder, of one method or of all."""
    return sorted(home.glob(f"{escape(method_stem) or '*'}@*.yaml"))


def overlay_path(folder: Path, model: str, method: str, reach: str) -> Path:
    """The file of figures recorded for a device or environment class."""
    safe = quote(reach, safe="-_.=,:").replace(":", "+")  # a report's word: no folder may come of it
    return folder / stem(model) / f"{stem(method)}@{safe[:MOST]}.yaml"


class Overlay(Table, frozen=True):
    """An overlay file; an entry names its environment by its key."""

    schema: int
    model: str
    method: str
    reach: str = msgspec.field(name="class")
    entries: tuple[dict[str, Any], ...]
    environments: dict[str, Environment]


def read_overlay(path: Path) -> tuple[str, tuple[Recorded, ...]]:
    """An overlay's class and entries; BadFile, one line, names the file, what is wrong and the fix."""
    overlay, entries = opened(path)
    return overlay.reach, entries


def opened(path: Path) -> tuple[Overlay, tuple[Recorded, ...]]:
    """The same with all that the file says of itself."""
    overlay = read_yaml(path, Overlay, FIX)
    try:
        name = overlay_path(Path(), overlay.model, overlay.method, overlay.reach).name
    except BadSpecification as error:
        raise BadFile(f"{path}: {error}; {FIX}") from error
    if path.name != name:
        raise BadFile(f"{path} is of {overlay.method} on {overlay.reach}: a baseline must keep its name; {FIX}")
    entries = []
    for number, entry in enumerate(overlay.entries, 1):
        where, key = f"{path}: entry {number}", str(entry.get("environment"))
        if key not in overlay.environments:
            raise BadFile(f"{where}: its environment '{key}' is not in the file; {FIX}")
        if places := set(PLACE) & entry.keys():
            raise BadFile(f"{where}: no place for '{min(places)}'; {FIX}")
        told = {**entry, "environment": overlay.environments[key]}
        check = told.pop(CHECK, None)
        read = fit(told, Recorded, where, FIX)
        if check not in (None, read.check):
            raise BadFile(f"{where} {ALTERED}: {FIX}")
        entries.append(read)
    return overlay, tuple(entries)


def write_overlay(path: Path, model: str, method: str, reach: str, entries: Iterable[Recorded]) -> None:
    """Write an overlay whole, entries in order of their keys, each environment once."""
    ordered = sorted(entries, key=lambda entry: entry.key)
    document = {
        "schema": SCHEMA,
        "model": model,
        "method": method,
        "class": reach,
        "entries": [entry.to_entry() for entry in ordered],
        "environments": {world_key(entry.environment): world_facts(entry.environment) for entry in ordered},
    }
    replace_text(path, yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120))


class Identities(Table, frozen=True):
    """An identities.yaml."""

    schema: int
    identities: dict[str, dict[str, str]]


def read_identities(path: Path) -> dict[str, dict[str, str]]:
    """What models were, by digest; BadFile names the file, and a digest that is not that of its facts."""
    known = read_yaml(path, Identities, FIX).identities
    for name, facts in known.items():
        if identity_digest(facts) != name:
            raise BadFile(f"{path}: {name[:BRIEF]} is not the digest of its facts; {FIX}")
    return known


def seal(folder: Path) -> list[Path]:
    """Add the digests that a folder's files lack, and change nothing else; returns the files written, in order.

    BadFile where one carries a digest that its content no longer has.
    """
    written = []
    with recording(folder):
        for path in sorted(folder.glob("*/*.yaml")):
            before = path.read_bytes()
            if path.name == IDENTITIES:  # each is its own digest
                continue
            if "@" in path.name:
                overlay = read_yaml(path, Overlay, FIX)
                write_overlay(path, overlay.model, overlay.method, *read_overlay(path))
            elif (facts := read_exact(path)) is not None:
                write_exact(path, facts)
            written += [path] * (path.read_bytes() != before)
    return written


def validate(folder: Path) -> None:
    """Read every baseline file of a folder, so that a broken one is told before anything is measured."""
    bounds.load(folder)
    for path in sorted(folder.glob("*/*.yaml")):
        if path.name == IDENTITIES:
            read_identities(path)
        elif "@" in path.name:
            read_overlay(path)
        else:
            read_exact(path)
    for path in sorted(folder.glob("*/nll/*.npz")):
        losses.load(path.parent, path.stem)


# recording


def to_record(rows: Iterable[Row], regenerate: str) -> list[Row]:
    """The rows that a regeneration writes into overlays.

    'all' takes every figure, 'force' those that differ from their record or have none. One that is out of
    its bound is marked so. Never a missing or non-finite one, an exact one (its file is pytest-regressions'), a timing
    without an interval, or one that was taken beside other work.
    """
    chosen = []
    for row in rows:
        member = catalog.member(row.metric)
        figures = (row.value, row.spread or 0.0, decode_number(row.detail.get("floor")) or 0.0, *(row.interval or ()))
        finite = all(figure is not None and math.isfinite(figure) for figure in figures)
        compared = not (member and member.timed) or row.detail.get("log_ratio_low") is not None
        elsewhere = row.case.family == "invariant" or (member and member.exact)  # an invariant has its own limit
        broken = row.stopped_early or row.detail.get("crowded")
        wanted = regenerate == "all" or row.verdict_baseline in CHANGED
        if finite and compared and wanted and not elsewhere and not broken:
            chosen.append(row)
    return chosen


def record(
    folder: Path,
    rows: Sequence[Row],
    environments: Mapping[str, Mapping[str, Any]],
    nll_folder: Path,
    identities: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> list[Path]:
    """Write rows (as `to_record` chose them) into their overlays, with the losses behind them.

    Losses of a text go to the device class's file, everything else to the environment class's. Entries of cases not
    among the rows stay; one that says the same as before keeps its provenance. A loss file that no overlay of the
    model names any more is removed. Whoever records at the same time waits.

    Args:
        folder: of the baselines.
        rows: measured, each with an environment among `environments`.
        environments: by id, as `Environment.to_dict` gives them.
        nll_folder: where the session's nll/<sha>.npz lie.
        identities: the facts of the rows' models, by the digests that the rows name.

    Returns:
        The files written, in order.

    Raises:
        BadFile: a standing file is damaged, or a row's environment is not the one that the row names.
    """
    with recording(folder) if rows else contextlib.nullcontext():
        return _record(folder, rows, environments, nll_folder, identities)


def _record(
    folder: Path,
    rows: Sequence[Row],
    environments: Mapping[str, Mapping[str, Any]],
    nll_folder: Path,
    identities: Mapping[str, Mapping[str, str]],
) -> list[Path]:
    when, written = now(), list[Path]()
    groups: dict[tuple[str, str, str], list[Recorded]] = {}
    for row in rows:
        world, member = Environment.from_dict(environments[row.environment]), catalog.member(row.metric)
        if world.id != row.environment:  # it chooses the file
            raise BadFile(f"{row.case.id}: its environment {row.environment} {ALTERED}: measure again")
        lasting = lasts(row, timed=bool(member and member.timed))
        reach = world.device_class if lasting else world.environment_class
        groups.setdefault((row.model, row.method, reach), []).append(Recorded.of_row(row, world, when))
    for (model, method, reach), fresh in sorted(groups.items()):
        path = overlay_path(folder, model, method, reach)
        before = {entry.key: entry for entry in (read_overlay(path)[1] if path.is_file() else ())}
        for entry in fresh:
            for sha in filter(None, (entry.nll, entry.detail.get("reference_nll"))):
                kept = path.parent / "nll" / f"{sha}.npz"
                if not losses.holds(kept.parent, sha) and (nll := losses.load(nll_folder, sha)) is not None:
                    losses.save(kept.parent, nll)
            old = before.get(entry.key)
            before[entry.key] = carried(old, entry) if old else entry
        write_overlay(path, model, method, reach, before.values())
        written.append(path)
    for home in {path.parent for path in written}:
        texts = [path.read_text(encoding="utf-8") for path in overlays(home)]
        for path in (home / "nll").glob("*.npz"):
            if not any(path.stem in text for text in texts):
                path.unlink()
    keep_identities({path.parent for path in written}, identities)
    return written


def carried(old: Recorded, entry: Recorded) -> Recorded:
    """The new entry, with the provenance of an old one that says the same (and perhaps not yet of which identity)."""
    kept = replace(entry, recorded=old.recorded, environment=old.environment)
    return kept if old in (kept, replace(kept, identity="")) else entry


def keep_identities(homes: Iterable[Path], identities: Mapping[str, Mapping[str, str]]) -> None:
    """In models' folders the identities that their files name, of those that are there and those given; no others."""
    for home in homes:
        path = home / IDENTITIES
        named = {entry.identity for overlay in overlays(home) for entry in read_overlay(overlay)[1]}
        named |= {known["provenance"].get("identity", "") for _, known in exact_files(home)}
        known = {**identities, **(read_identities(path) if path.is_file() else {})}
        kept = {name: dict(sorted(facts.items())) for name, facts in sorted(known.items()) if name in named}
        if kept:
            document = {"schema": SCHEMA, "identities": kept}
            replace_text(path, yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120))
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def recording(folder: Path) -> Iterator[None]:
    """Alone in a folder of baselines, from reading to writing: waits for whoever records there; leaves nothing behind.

    The kernel drops the lock when its holder dies.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    while True:
        file = owned(path)
        if file is not None:
            with file:
                if _lies_at(path, file.fileno()):  # else its last holder removed what was opened here
                    try:
                        yield
                    finally:
                        path.unlink(missing_ok=True)
                    return
        time.sleep(POLL_SECONDS)


def _lies_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


# exact facts


def stem(specification: str) -> str:
    """A specification's file name; a very long one ends in a digest instead, so that two stay two."""
    name = parse_method(specification).filename
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 33]}~{sha256(name.encode()).hexdigest()[:32]}"


def exact_path(folder: Path, case: Case) -> Path:
    """The file of a case's exact facts."""
    return folder / stem(case.model) / f"{stem(case.method)}.yaml"


def exact_files(home: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The files of exact facts in a model's folder, each with what it holds."""
    paths = sorted(path for path in home.glob("*.yaml") if "@" not in path.name and path.name != IDENTITIES)
    return [(path, {"provenance": {}, **(read_exact(path) or {})}) for path in paths]


def exact_facts(row: Row, member: Member) -> dict[str, Any]:
    """What a row brings that must hold in every environment; {} where it brings nothing.

    The census and (of an exact metric) the predicted bytes stand by device, since the default dtype is the device's;
    token count and hash stand by text, protocol and limit.
    """
    facts: Parts = {}
    if row.census:  # what follows from the rest of it is not recorded beside it
        census = {name: value for name, value in row.census.items() if name != DERIVED}
        facts["weights", row.device, "census"] = rounded(census)
    if member.exact and row.value is not None:
        facts["weights", row.device, "bytes", row.metric] = int(row.detail.get("predicted", row.value))
    if row.token_hash and "tokens" in row.detail:
        place = ("texts", row.dataset, row.protocol, token_limit(row.protocol_id))
        facts |= {(*place, "tokens"): row.detail["tokens"], (*place, "token_hash"): row.token_hash}
    return {"schema": SCHEMA, "model": row.model, "method": row.method, **_nested(facts)} if facts else {}


def _parts(document: Mapping[str, Any]) -> Parts:
    """Every fact by its path: a census is one fact, so that what left it does not stay behind."""
    parts: Parts = {}
    for device, facts in document.get("weights", {}).items():
        parts |= {("weights", device, "bytes", name): value for name, value in facts.get("bytes", {}).items()}
        parts |= {("weights", device, "census"): facts["census"]} if "census" in facts else {}
    for dataset, protocols in document.get("texts", {}).items():
        for protocol, limits in protocols.items():
            for limit, facts in limits.items():
                parts |= {("texts", dataset, protocol, limit, name): value for name, value in facts.items()}
    return parts


def _nested(parts: Parts) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for path, value in sorted(parts.items()):
        place = document
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
    return document


@dataclass(frozen=True)
class Weights:
    """What is recorded of a model's weights on one device."""

    bytes: dict[str, int] = field(default_factory=dict)
    census: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Provenance:
    """When and in which world facts were recorded."""

    recorded: str = ""
    environment: Environment = field(default_factory=Environment)


class Facts(Table, frozen=True):
    """A file of exact facts."""

    schema: int
    model: str = ""
    method: str = ""
    weights: dict[str, Weights] = msgspec.field(default_factory=dict)
    texts: dict[str, dict[str, dict[str, dict[str, Any]]]] = msgspec.field(default_factory=dict)
    provenance: Provenance = Provenance()


def read_exact(path: Path) -> dict[str, Any] | None:
    """A file of exact facts, None where there is none; BadFile names it and the fix."""
    if not path.is_file():
        return None
    document: dict[str, Any] = read_yaml(path, dict[str, Any], FIX)
    fit(document, Facts, str(path), FIX)
    return document


def write_exact(path: Path, document: Mapping[str, Any]) -> None:
    """Write a file of exact facts whole, as pytest-regressions lays it out."""
    text = yaml.safe_dump(sealed(document), default_flow_style=False, allow_unicode=True, indent=2)
    replace_text(path, text)


def holds(recorded: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> bool:
    """Whether every one of these facts is recorded at all, whatever its value."""
    return recorded is not None and _parts(facts).keys() <= _parts(recorded).keys()


def changes(recorded: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> list[str]:
    """The facts that are recorded otherwise, one line each: 'memory.storage on cpu: 1000 -> 1048'."""
    before, now = _parts(recorded or {}), _parts(facts)
    changed = [(path, before[path], value) for path, value in now.items() if path in before and before[path] != value]
    lines: list[str] = []
    for path, old, new in changed:
        if path[-1] == "census":
            lines += [f"census on {path[1]}, {line}" for line in _moved(old, new)]
        elif path[0] == "weights":
            lines.append(f"{path[-1]} on {path[1]}: {old} -> {new}")
        else:
            lines.append(f"{path[-1]} of {'/'.join(path[1:-1])}: {_brief(old)} -> {_brief(new)}")
    return lines


def _moved(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """What differs between two tables, key by key: 'bytes_by_dtype.float32: 4096 -> 135168'; of lists, their items."""
    for name in {**old, **new}:
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            yield from _moved(before, now, f"{prefix}{name}.")
        elif isinstance(before, list) and isinstance(now, list) and before != now:
            gone, come = (
                [item for item in some if item not in other] for some, other in ((before, now), (now, before))
            )
            yield f"{prefix}{name}: {_brief(gone, 5 * BRIEF)} -> {_brief(come, 5 * BRIEF)}"
        elif before != now:
            yield f"{prefix}{name}: {_brief(before)} -> {_brief(now)}"


def whence(recorded: Mapping[str, Any], case: Case) -> str:
    """Which file holds a case's exact facts, when and where they were recorded."""
    told = recorded.get("provenance", {})
    place = f"{stem(case.model)}/{stem(case.method)}.yaml"
    when = f", recorded {told['recorded']}" if told.get("recorded") else ""
    return f"{place}{when}" + (f" on {told['device_class']}" if told.get("device_class") else "")


def _brief(value: Any, most: int = BRIEF) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}..."


def exact_document(
    recorded: Mapping[str, Any] | None, facts: Mapping[str, Any], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """The file as it should stand: this session's facts over those recorded, which stay where not measured now.

    Provenance is the recorded one while every fact is equal, so that nothing but a changed fact changes the file; only
    the model's identity, where `provenance` brings one, is always today's.
    """
    before = _parts(recorded or {})
    after = {**before, **_parts(facts)}
    kept = (recorded or {}).get("provenance") if before == after else None
    identity = {"identity": provenance["identity"]} if "identity" in provenance else {}
    head = {"schema": SCHEMA, "model": facts["model"], "method": facts["method"]}
    return {**head, **_nested(after), "provenance": {**(kept or provenance), **identity}}


def provenance(environment: Mapping[str, Any], identity: str = "") -> dict[str, Any]:
    """When, of which model and in which world (as `Environment.to_dict` gives it) facts were recorded."""
    world = Environment.from_dict(environment)
    told = {"recorded": now(), "device_class": world.device_class, "environment": world.to_dict()}
    return {**told, "identity": identity} if identity else told


def now() -> str:
    """UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
