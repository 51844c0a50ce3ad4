"""Specifications and [tool.harness] tables of any text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.core import catalog, options
from harness.core.errors import HarnessError
from harness.core.options import Declared
from harness.core.records import Case
from harness.core.specification import parse, parse_list
from harness.inputs.models import names as models
from harness.inputs.texts import corpora, protocols
from harness.judge import baselines
from harness.judge.baselines import exact_path
from harness.methods.quantizing import arguments
from harness.run import plan
from tests.fuzz.bounds import harmless_line, quick, survives
from tests.fuzz.damage import HOSTILE, damaged, json_values, texts

SOUND = b"""[tool.harness]
methods = ["mine.py"]
[tool.harness.models]
mine = "path:checkpoints/mine"
[tool.harness.datasets]
notes = "text:notes.txt"
[tool.harness.options]
max-tokens = 4096
"""
names = st.sampled_from(
    (*sorted(catalog.methods()), *corpora.DATASETS, *models.KNOWN, *models.SOURCES, "chunk", "stride", "x")
)
specifications = st.one_of(
    texts,
    st.builds(lambda name, parts: ":".join((name, *parts)), names, st.lists(texts, max_size=3)),
    st.builds(
        lambda name, key, value: f"{name}:{key}={value}", names, st.sampled_from(("block", "layers", "text")), texts
    ),
)


def resolved(text: str) -> None:
    """As a method."""
    specification = parse(text)
    arguments.resolve(specification, plan.method_of(specification, catalog.methods()), "cpu")


@quick
@given(text=specifications)
def test_specifications(text: str) -> None:
    for read in (parse, parse_list, options.names, options.positive, resolved):
        survives(read, text)
    survives(lambda: protocols.parse(parse(text)))
    survives(lambda: corpora.resolve(parse(text), Declared(Path("/nowhere"))))
    survives(lambda: models.declared_source(parse(text), Declared(Path("/nowhere"))))


@quick
@given(model=specifications, method=specifications)
def test_no_name_leaves_the_folder_of_the_baselines(model: str, method: str) -> None:
    try:
        case = Case(str(parse(model)), str(parse(method)), "", "", "memory.storage", "cpu")
    except HarnessError:
        return
    folder = Path("/baselines")
    for path in (exact_path(folder, case), baselines.overlay_path(folder, case.model, case.method, "cpu:../x")):
        assert path.parent.parent == folder
        assert ".." not in path.parts
        assert len(path.name.encode()) < 255
    harmless_line(case.id)


@quick
@given(data=st.data())
def test_damaged_tables(tmp_path: Path, data: st.DataObject) -> None:
    (tmp_path / "pyproject.toml").write_bytes(data.draw(damaged(SOUND)))
    built(tmp_path)


@quick
@given(
    kind=st.sampled_from(("models", "datasets", "options", "methods", "metrics", "other")),
    key=st.one_of(texts, st.sampled_from([setting.flag for setting in options.SETTINGS])),
    value=json_values,
)
def test_tables_of_any_shape(kind: str, key: str, value: Any) -> None:
    for table in ({kind: value}, {kind: {key: value}}):
        survives(options.read_table, Path("pyproject.toml"), table)


@pytest.mark.parametrize("text", ["tool = 3", "[tool]\nharness = []", "[tool]\nharness = 1", "x = " + "[" * 5000])
def test_known_bad_tables(tmp_path: Path, text: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    built(tmp_path)


def built(folder: Path) -> None:
    """Options from the folder's table."""
    survives(lambda: options.build({}, options.read_declared(folder)[1], folder))


@pytest.mark.parametrize("text", HOSTILE)
def test_an_error_quotes_hostile_text_harmlessly(text: str) -> None:
    error = HarnessError(f"unknown '{text}'")
    harmless_line(str(error))
    harmless_line(str(HarnessError(text * 5000)))
    assert len(str(HarnessError(text * 5000))) < 2100
