"""Baseline files: exact facts, recorded figures, and the per-token losses behind them. Read, found, written; no torch.

    baselines/<model>/<method>.yaml           exact facts (`facts`): census, predicted bytes, tokens
    baselines/<model>/<method>@<class>.yaml   figures of a device class (losses) or of an environment class (the rest)
    baselines/<model>/nll/<sha>.npz           per-token NLL of recorded cases, float32

Names are the specifications' injective file names, a class's ':' written '+'. Nothing is written but by `record` and,
through pytest-regressions, from `exact_document`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from harness.core import catalog
from harness.core.environment import Environment, class_difference
from harness.core.errors import BadFile
from harness.core.files import replace_text
from harness.core.records import SCHEMA, Case, Row, Verdict
from harness.judge import bounds
from harness.judge.facts import (
    FIX,
    exact_bytes,
    exact_document,
    exact_facts,
    exact_path,
    holds,
    now,
    provenance,
    read_document,
    read_exact,
    recorded_world,
    stem,
)
from harness.judge.recorded import Recorded, from_entry, world_key
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
Overlay = tuple[str, tuple[Recorded, ...]]  # the class it is for, and its entries


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


def read_overlay(path: Path) -> Overlay:
    """An overlay's class and entries; BadFile, one line, names the file, what is wrong and the fix."""
    document = read_document(path, ("schema", "model", "method", "class", "entries", "environments"))
    model, method, reach = (document.get(name) for name in ("model", "method", "class"))
    entries, worlds = document.get("entries"), document.get("environments")
    if not (isinstance(model, str) and isinstance(method, str) and isinstance(reach, str)):
        raise BadFile(f"{path} does not say which model, method and class it is for: {FIX}")
    if path.name != overlay_path(Path(), model, method, reach).name:
        raise BadFile(f"{path} is of {method} on {reach}: a baseline must keep its name; {FIX}")
    if not isinstance(entries, list) or not isinstance(worlds, dict):
        raise BadFile(f"{path} holds no list of entries and table of environments: {FIX}")
    try:
        environments = {str(name): Environment.from_dict(world) for name, world in worlds.items()}
        found = tuple(from_entry(f"entry {number}", entry, environments) for number, entry in enumerate(entries, 1))
    except (BadFile, AttributeError) as error:
        raise BadFile(f"{path}: {error}; {FIX}") from error
    return reach, found


def write_overlay(path: Path, model: str, method: str, reach: str, entries: Iterable[Recorded]) -> None:
    """Write an overlay whole, entries in order of their keys, each environment once."""
    ordered = sorted(entries, key=lambda entry: entry.key)
    document = {
        "schema": SCHEMA,
        "model": model,
        "method": method,
        "class": reach,
        "entries": [entry.to_entry() for entry in ordered],
        "environments": {world_key(entry.environment): entry.environment.to_dict() for entry in ordered},
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
    finite = row.value is not None and math.isfinite(row.value)
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
        lasting = bool(row.dataset) and not (member and member.timed)
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
