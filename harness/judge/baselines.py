"""Baseline files: exact facts, recorded figures, and the per-token losses behind them. Read, found, written; no torch.

    baselines/<model>/<method>.yaml           exact facts: census, predicted bytes, tokens
    baselines/<model>/<method>@<class>.yaml   figures of a device class (losses) or of an environment class (the rest)
    baselines/<model>/nll/<sha>.npz           per-token NLL of recorded cases, float32

Names are the specifications' injective file names, a class's ':' written '+'. Nothing is written but by `record` and,
through pytest-regressions, from `exact_document`. Exact facts must be equal in every environment; their file is

    weights: {cpu: {bytes: {memory.storage: 123}, census: {...}}}    by device, whose default dtype differs
    texts: {lee: {chunk:512: {first 4096: {token_hash: ..., tokens: 4096}}}}
    provenance: {recorded: ..., device_class: ..., environment: {...}}
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from glob import escape
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import yaml
from msgspec.structs import replace

from harness.core import catalog
from harness.core.contracts import Member
from harness.core.environment import Environment, class_difference
from harness.core.errors import BadFile
from harness.core.files import replace_text
from harness.core.records import Case, Row, Verdict
from harness.core.schema import SCHEMA, Table, fit, read_yaml
from harness.core.specification import parse
from harness.core.values import decode_number
from harness.judge import bounds, rules
from harness.judge.recorded import FIX, Recorded, from_entry, rounded, world_facts, world_key
from harness.judge.verdicts import token_limit
from harness.results import losses

__all__ = [
    "Baselines",
    "Recorded",
    "exact_document",
    "exact_facts",
    "exact_path",
    "holds",
    "overlay_path",
    "provenance",
    "read_exact",
    "read_overlay",
    "record",
    "to_record",
    "validate",
]
CHANGED = frozenset({Verdict.WORSE, Verdict.BETTER, Verdict.NOT_COMPARABLE, Verdict.UNRECORDED})

MOST = 80  # characters of a class in a file name


class Baselines:
    """The recorded figures of a folder, each file read once a change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kept: dict[Path, tuple[tuple[int, int], Any]] = {}

    def find(self, case: Case, environment: Environment) -> Recorded | None:
        """The record that serves a case here: exact facts, else the most specific overlay that holds it.

        Where only another class's overlay holds it, that one comes back with `carries` False and the field that
        differs; a record under another reference comes back too, after those under this one.
        """
        return self._exact(case) or max(
            (self._placed(entry, path, reach, environment) for path, reach, entry in self._entries(case)),
            key=lambda entry: _rank(entry, case, environment),
            default=None,
        )

    def _entries(self, case: Case) -> Iterable[tuple[Path, str, Recorded]]:
        wanted = (case.metric, case.dataset, case.protocol, case.device)
        for path in overlays(self.folder / stem(case.model), stem(case.method)):
            reach, entries = self._cached(path, read_overlay)
            for entry in entries:
                if (entry.metric, entry.dataset, entry.protocol, entry.device) == wanted:
                    yield path, reach, entry

    def _placed(self, entry: Recorded, path: Path, reach: str, environment: Environment) -> Recorded:
        carries = reach in (environment.environment_class, environment.device_class)
        what = "" if carries else class_difference(entry.environment, environment) or f"class: {reach}"
        return replace(entry, file=str(path.relative_to(self.folder)), carries=carries, difference=what)

    def facts(self, case: Case) -> dict[str, Any]:
        """The file of a case's exact facts; {} where there is none."""
        path = exact_path(self.folder, case)
        return self._cached(path, read_exact) if path.is_file() else {}

    def _exact(self, case: Case) -> Recorded | None:
        path, document = exact_path(self.folder, case), self.facts(case)
        value = exact_bytes(document, case)
        if value is None:
            return None
        when, world = recorded_world(document)
        file = str(path.relative_to(self.folder))
        return Recorded(case.metric, case.device, value, "B", recorded=when, environment=world, file=file)

    def _cached(self, path: Path, read: Callable[[Path], Any]) -> Any:
        status = path.stat()
        stamp = (status.st_mtime_ns, status.st_size)
        if path not in self._kept or self._kept[path][0] != stamp:
            self._kept[path] = (stamp, read(path))
        return self._kept[path][1]


def _rank(entry: Recorded, case: Case, environment: Environment) -> tuple[Any, ...]:
    """What serves best is greatest: carried, same reference, most specific file, this machine, newest."""
    specific = entry.file.endswith(f"@{environment.environment_class.replace(':', '+')}.yaml")
    near = entry.environment.device_class == environment.device_class
    same_machine = entry.environment.machine == environment.machine
    return entry.carries, entry.reference == case.reference, specific, near, same_machine, entry.recorded, entry.file


# files


def overlays(home: Path, method_stem: str = "") -> list[Path]:
    """The overlay files of a model's folder, of one method or of all."""
    return sorted(home.glob(f"{escape(method_stem)}@*.yaml" if method_stem else "*@*.yaml"))


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
    overlay = read_yaml(path, Overlay, FIX)
    if path.name != overlay_path(Path(), overlay.model, overlay.method, overlay.reach).name:
        raise BadFile(f"{path} is of {overlay.method} on {overlay.reach}: a baseline must keep its name; {FIX}")
    return overlay.reach, tuple(
        from_entry(f"{path}: entry {number}", entry, overlay.environments)
        for number, entry in enumerate(overlay.entries, 1)
    )


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


def validate(folder: Path) -> None:
    """Read every baseline file of a folder, so that a broken one is told before anything is measured."""
    bounds.load(folder)
    for path in sorted(folder.glob("*/*.yaml")):
        if "@" in path.name:
            read_overlay(path)
        else:
            read_exact(path)
    for path in sorted(folder.glob("*/nll/*.npz")):
        losses.load(path.parent, path.stem)


# recording


def to_record(rows: Iterable[Row], regenerate: str) -> list[Row]:
    """The rows that a regeneration writes into overlays.

    'all' takes every figure, 'force' those that differ from their record or have none. Never a missing or non-finite
    one, one out of bound, an exact one (its file is pytest-regressions'), or a timing without an interval.
    """
    return [row for row in rows if _recordable(row) and (regenerate == "all" or row.verdict_baseline in CHANGED)]


def _recordable(row: Row) -> bool:
    member = catalog.member(row.metric)
    compared = not (member and member.timed) or row.detail.get("log_ratio_low") is not None
    figures = (row.value, row.spread or 0.0, decode_number(row.detail.get("floor")) or 0.0, *(row.interval or ()))
    finite = all(figure is not None and math.isfinite(figure) for figure in figures)
    return (
        finite
        and row.case.family != "invariant"  # held to its own limit and to known faults, never to a record
        and compared
        and not row.stopped_early
        and row.verdict_reference is not Verdict.OUT_OF_BOUND
        and not (member and member.exact)
    )


def record(
    folder: Path, rows: Sequence[Row], environments: Mapping[str, Mapping[str, Any]], nll_folder: Path
) -> list[Path]:
    """Write rows (as `to_record` chose them) into their overlays, with the losses behind them.

    Losses of a text go to the device class's file, everything else to the environment class's. Entries of cases not
    among the rows stay; one that says the same as before keeps its provenance. A loss file that no overlay of the
    model names any more is removed.

    Args:
        folder: of the baselines.
        rows: measured, each with an environment among `environments`.
        environments: by id, as `Environment.to_dict` gives them.
        nll_folder: where the session's nll/<sha>.npz lie.

    Returns:
        The files written, in order.
    """
    when, written = now(), list[Path]()
    groups: dict[tuple[str, str, str], list[Recorded]] = {}
    for row in rows:
        world, member = Environment.from_dict(environments[row.environment]), catalog.member(row.metric)
        lasting = rules.lasts(row, timed=bool(member and member.timed))
        reach = world.device_class if lasting else world.environment_class
        groups.setdefault((row.model, row.method, reach), []).append(Recorded.of_row(row, world, when))
    for (model, method, reach), fresh in sorted(groups.items()):
        path = overlay_path(folder, model, method, reach)
        before = {entry.key: entry for entry in (read_overlay(path)[1] if path.is_file() else ())}
        for entry in fresh:
            _keep_nll(path.parent / "nll", entry, nll_folder)
            old = before.get(entry.key)
            before[entry.key] = old if old and old.same_figure(entry) else entry
        write_overlay(path, model, method, reach, before.values())
        written.append(path)
    for home in {path.parent for path in written}:
        _prune(home)
    return written


def _keep_nll(home: Path, entry: Recorded, source: Path) -> None:
    for sha in filter(None, (entry.nll, entry.detail.get("reference_nll"))):
        if not (home / f"{sha}.npz").is_file() and (nll := losses.load(source, sha)) is not None:
            losses.save(home, nll)


def _prune(home: Path) -> None:
    """Remove loss files that no overlay of the model names."""
    texts = [path.read_text(encoding="utf-8") for path in overlays(home)]
    for path in (home / "nll").glob("*.npz"):
        if not any(path.stem in text for text in texts):
            path.unlink()


BRIEF = 12  # characters of a hash or table that tell it from another in a line
NAME_LENGTH = 120  # of a model's or method's part of a file name: file systems take 255 for all of it

Parts = dict[tuple[str, ...], Any]


def stem(specification: str) -> str:
    """A specification's file name; a very long one ends in a digest instead, so that two stay two."""
    name = parse(specification).filename
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 33]}~{sha256(name.encode()).hexdigest()[:32]}"


def exact_path(folder: Path, case: Case) -> Path:
    """The file of a case's exact facts."""
    return folder / stem(case.model) / f"{stem(case.method)}.yaml"


def exact_facts(row: Row, member: Member) -> dict[str, Any]:
    """What a row brings that must hold in every environment; {} where it brings nothing.

    The census and (of an exact metric) the predicted bytes stand by device, since the default dtype is the device's;
    token count and hash stand by text, protocol and limit.
    """
    facts: Parts = {}
    if row.census:
        facts["weights", row.device, "census"] = rounded(row.census)
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


def recorded_world(document: Mapping[str, Any]) -> tuple[str, Environment]:
    """When and in which world a file's facts were recorded."""
    written = document.get("provenance", {})
    return written.get("recorded", ""), Environment.from_dict(written.get("environment", {}))


def exact_bytes(document: Mapping[str, Any], case: Case) -> int | None:
    """The recorded bytes of a case's metric on its device."""
    value: int | None = _parts(document).get(("weights", case.device, "bytes", case.metric))
    return value


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
            names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            lines += [
                f"census on {path[1]}, {name}: {_brief(old.get(name))} -> {_brief(new.get(name))}" for name in names
            ]
        elif path[0] == "weights":
            lines.append(f"{path[-1]} on {path[1]}: {old} -> {new}")
        else:
            lines.append(f"{path[-1]} of {'/'.join(path[1:-1])}: {_brief(old)} -> {_brief(new)}")
    return lines


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= BRIEF else f"{text[:BRIEF]}..."


def exact_document(
    recorded: Mapping[str, Any] | None, facts: Mapping[str, Any], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """The file as it should stand: this session's facts over those recorded, which stay where not measured now.

    Provenance is the recorded one while every fact is equal, so that nothing but a changed fact changes the file.
    """
    before = _parts(recorded or {})
    after = {**before, **_parts(facts)}
    kept = recorded is not None and before == after and bool(recorded.get("provenance"))
    head = {"schema": SCHEMA, "model": facts["model"], "method": facts["method"]}
    return {**head, **_nested(after), "provenance": dict(recorded["provenance"] if kept and recorded else provenance)}


def provenance(environment: Mapping[str, Any]) -> dict[str, Any]:
    """When and in which world (as `Environment.to_dict` gives it) facts were recorded."""
    world = Environment.from_dict(environment)
    return {"recorded": now(), "device_class": world.device_class, "environment": world.to_dict()}


def now() -> str:
    """UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
