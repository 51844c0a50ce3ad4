"""Baselines carry a digest of what they say: a changed figure is refused, another layout is the same."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.core.contracts import Member
from harness.core.environment import Environment
from harness.core.errors import BadFile
from harness.core.records import Case, Row
from harness.judge.baselines import (
    exact_document,
    exact_facts,
    provenance,
    read_exact,
    read_overlay,
    record,
    seal,
    validate,
    write_exact,
)

WORLD = Environment(torch="2.13.0", instructions="avx2 avx512", threads=2, machine="a" * 16)
CASE = Case("m", "nf4", "lee", "chunk:512", "perplexity.delta", "cpu")
STORAGE = Member("memory.storage", "B", "lower", exact=True, textual=False)
LINE = re.compile(r"[^\n]*(restore it|upgrade the harness)[^\n]*\Z")
FLIPS = 600  # of one bit, drawn anew in the same order each time


def rows(value: float = 0.0125) -> list[Row]:
    facts: dict[str, Any] = {"environment": WORLD.id, "unit": "nat", "interval": (0.011, 0.014), "spread": 0.0007}
    facts |= {"detail": {"floor": 1e-4, "tokens": 4096}, "count": 8, "protocol_id": "windows: 512", "revision": "r"}
    return [Row.of(CASE._replace(dataset=name), value=value, **facts) for name in ("lee", "ptb")]


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    (path,) = record(tmp_path, rows(), {WORLD.id: WORLD.to_dict()}, tmp_path)
    return path


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    path = tmp_path / "m" / "nf4.yaml"
    case = CASE._replace(metric="memory.storage", dataset="", protocol="")
    row = Row.of(case, value=1000.0, detail={"predicted": 1000}, census={"buffers": 0, "bits_per_weight": 4.5})
    write_exact(path, exact_document(None, exact_facts(row, STORAGE), provenance(WORLD.to_dict())))
    return path


@pytest.mark.parametrize(("kind", "read"), [("overlay", read_overlay), ("facts", read_exact)])
def test_a_flipped_bit_is_found_and_another_layout_is_none(
    kind: str, read: Any, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(kind)
    sound, data, draw, found = read(path), path.read_bytes(), random.Random(0), 0
    for _ in range(FLIPS):
        at, bit = draw.randrange(len(data)), 1 << draw.randrange(8)
        path.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
        try:
            seen = read(path)
        except BadFile as error:
            seen, found = str(error), found + 1
        assert seen == sound or (str(path) in seen and LINE.search(seen)), (at, bit)
    assert found > FLIPS / 2
    path.write_text(yaml.safe_dump(yaml.safe_load(data), width=40, default_flow_style=True, sort_keys=True))
    assert read(path) == sound


def test_files_of_before_have_no_digest_and_are_sealed(overlay: Path, facts: Path) -> None:
    sealed = overlay.read_bytes(), facts.read_bytes()
    old = yaml.safe_load(overlay.read_text())
    for entry in old["entries"]:
        del entry["check"]
    overlay.write_text(yaml.safe_dump(old, sort_keys=False, allow_unicode=True, width=120))
    lines = facts.read_text().splitlines(keepends=True)
    facts.write_text("".join(line for line in lines if not line.startswith("check:")))
    validate(overlay.parents[1])
    assert seal(overlay.parents[1]) == [facts, overlay]
    assert (overlay.read_bytes(), facts.read_bytes()) == sealed
    assert seal(overlay.parents[1]) == []


@pytest.mark.parametrize(("kind", "old", "new"), [("overlay", "0.0125", "0.0225"), ("facts", ": 1000", ": 1001")])
def test_an_edited_figure_is_not_sealed(kind: str, old: str, new: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(kind)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(BadFile, match="was changed after it was written"):
        seal(path.parents[1])


def test_a_key_that_stands_twice_is_refused(facts: Path) -> None:
    facts.write_text(facts.read_text() + "model: other\n")
    with pytest.raises(BadFile, match="'model' stands twice in one table"):
        read_exact(facts)


def test_an_environment_that_is_not_the_row_s_chooses_no_file(tmp_path: Path) -> None:
    other = replace(WORLD, instructions="avx2").to_dict()
    with pytest.raises(BadFile, match=f"its environment {WORLD.id} was changed after it was written: measure again"):
        record(tmp_path, rows(), {WORLD.id: other}, tmp_path)
    assert not list(tmp_path.rglob("*.yaml"))
