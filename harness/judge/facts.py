"""Exact facts: what must be equal in every environment, and the reviewable file that holds it. No torch.

`baselines/<model>/<method>.yaml`, compared and written by pytest-regressions from `exact_document`:

    weights: {cpu: {bytes: {memory.storage: 123}, census: {...}}}    by device, whose default dtype differs
    texts: {lee: {chunk:512: {first 4096: {token_hash: ..., tokens: 4096}}}}
    provenance: {recorded: ..., device_class: ..., environment: {...}}
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from harness.core.contracts import Member
from harness.core.environment import Environment
from harness.core.errors import BadFile
from harness.core.records import SCHEMA, Case, Row
from harness.core.specification import parse
from harness.judge.recorded import rounded
from harness.judge.wording import token_limit

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same language, ten times as fast where libyaml is there
BRIEF = 12  # characters of a hash or table that tell it from another in a line
DEEPEST = 32  # levels of nesting; ours have eight
NAME_LENGTH = 120  # of a model's or method's part of a file name: file systems take 255 for all of it
FIX = "restore it from version control, or delete it and record again with --regen-all"

Parts = dict[tuple[str, ...], Any]


def stem(specification: str) -> str:
    """A specification's file name; a very long one ends in a digest instead, so that two stay two."""
    name = parse(specification).filename
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 33]}~{sha256(name.encode()).hexdigest()[:32]}"


def exact_path(folder: Path, case: Case) -> Path:
    """The file of a case's exact facts."""
    return folder / stem(case.model) / f"{stem(case.method)}.yaml"


def read_document(path: Path, known: tuple[str, ...]) -> dict[str, Any]:
    """A YAML file of ours with these top-level keys; BadFile, one line, for anything else or a newer schema."""
    try:
        text = path.read_text(encoding="utf-8")
        _refuse_traps(text)
        document = yaml.load(text, Loader=LOADER)
    except (yaml.YAMLError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadFile(f"{path} cannot be read as YAML ({first}): {FIX}") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if type(schema) is not int:
        raise BadFile(f"{path} is no baseline (it has no schema number): {FIX}")
    if schema > SCHEMA:
        raise BadFile(f"{path} has schema {schema}, newer than this harness reads ({SCHEMA}): upgrade the harness")
    for key in document:
        if key not in known:
            raise BadFile(f"{path} has no place for '{key}' (known: {', '.join(known)}): {FIX}")
    found: dict[str, Any] = document
    return found


def _refuse_traps(text: str) -> None:
    """ValueError for what the loader would die of: nesting beyond its stack, and aliases that unfold without end."""
    depth = 0
    for event in yaml.parse(text, Loader=LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise ValueError("it is nested too deep")
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("it holds an alias, which no baseline needs")


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
    found: Parts = {}
    for device, facts in document.get("weights", {}).items():
        found |= {("weights", device, "bytes", name): value for name, value in facts.get("bytes", {}).items()}
        found |= {("weights", device, "census"): facts["census"]} if "census" in facts else {}
    for dataset, protocols in document.get("texts", {}).items():
        for protocol, limits in protocols.items():
            for limit, facts in limits.items():
                found |= {("texts", dataset, protocol, limit, name): value for name, value in facts.items()}
    return found


def _nested(parts: Parts) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for path, value in sorted(parts.items()):
        place = document
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
    return document


def read_exact(path: Path) -> dict[str, Any] | None:
    """A file of exact facts, None where there is none; BadFile names it and the fix."""
    if not path.is_file():
        return None
    document = read_document(path, ("schema", "model", "method", "weights", "texts", "provenance"))
    try:
        for part, value in _parts(document).items():
            if not all(isinstance(key, str) for key in part) or (part[2] == "bytes" and type(value) is not int):
                raise TypeError("/".join(map(str, part)))
        recorded_world(document)
    except (AttributeError, TypeError, BadFile) as error:
        raise BadFile(f"{path} does not hold facts by device and text ({error}): {FIX}") from error
    return document


def recorded_world(document: Mapping[str, Any]) -> tuple[str, Environment]:
    """When and in which world a file's facts were recorded."""
    told = document.get("provenance", {})
    return str(told.get("recorded", "")), Environment.from_dict(told.get("environment", {}))


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
    found: list[str] = []
    for path, old, new in changed:
        if path[-1] == "census":
            names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            found += [
                f"census on {path[1]}, {name}: {_brief(old.get(name))} -> {_brief(new.get(name))}" for name in names
            ]
        elif path[0] == "weights":
            found.append(f"{path[-1]} on {path[1]}: {old} -> {new}")
        else:
            found.append(f"{path[-1]} of {'/'.join(path[1:-1])}: {_brief(old)} -> {_brief(new)}")
    return found


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
