"""Files held to types: every way that one does not fit is one line with the file, the place and what belongs there."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from msgspec import Meta

from harness.core.errors import BadFile
from harness.core.schema import Table, check, read_json, read_toml, read_yaml


class Inner(Table, frozen=True):
    name: str
    bits: Annotated[int, Meta(ge=1)] | None = None
    word: Literal["", "one", "two"] = ""

    def __post_init__(self) -> None:
        if self.name == "nobody":
            raise ValueError("nobody is no\nname")


@dataclass(frozen=True)
class Outer:
    schema: int = 1
    inner: tuple[Inner, ...] = ()
    by_name: dict[str, Inner] = field(default_factory=dict)
    numbers: tuple[float, float] | None = None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "it must be a table, not []"),
        ({}, "no schema number: begin with schema 1"),
        ({"schema": "1"}, "schema must be a whole number, not '1'"),
        ({"schema": 2}, "schema 2 is newer than this harness reads (1): upgrade the harness"),
        ({"schema": 1, "inner": {}}, "inner must be a list of tables, not {}"),
        ({"schema": 1, "inner": [{"name": "a"}, {}]}, "inner 2: no 'name'"),
        ({"schema": 1, "inner": [{"name": "a", "nam": 1}]}, "inner 1: no place for 'nam' (known: name, bits, word)"),
        ({"schema": 1, "inner": [{"name": "a", "bits": 0}]}, "inner 1.bits must be a whole number >= 1, not 0"),
        ({"schema": 1, "inner": [{"name": "a", "bits": True}]}, "inner 1.bits must be a whole number, not True"),
        ({"schema": 1, "inner": [{"name": "nobody"}]}, "inner 1: nobody is no name"),
        (
            {"schema": 1, "by_name": {"a": {"name": "a"}, "b": {"name": "b", "word": "three"}}},
            "by_name.b.word must be one of '', 'one', 'two', not 'three'",
        ),
        ({"schema": 1, "by_name": {3: {"name": "a"}}}, "by_name: a key must be text"),
        ({"schema": 1, "numbers": [1]}, "numbers must be a list of numbers of length 2, not [1]"),
        ({"schema": 1, "numbers": [1, "x" * 99]}, f"numbers 2 must be a number, not '{'x' * 59}..."),
    ],
)
def test_the_place_and_what_belongs_there_are_named(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        check(data, Outer)
    assert str(caught.value) == message


def test_what_fits_is_read() -> None:
    sound = {"schema": 1, "inner": [{"name": "a", "bits": 4}], "numbers": [1, 2.5], "more": "of a later release"}
    assert check(sound, Outer) == Outer(1, (Inner("a", 4),), numbers=(1.0, 2.5))


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (read_toml, "schema = ", "cannot be read as TOML: Invalid value"),
        (read_toml, "x = " + "[" * 5000, "cannot be read as TOML: "),
        (read_json, '{"schema": ', "cannot be read as JSON: Expecting value"),
        (read_json, "[" * 100_000, "cannot be read as JSON: it is nested too deep"),
        (read_yaml, "a: [", "cannot be read as YAML: while parsing"),
        (read_yaml, "[" * 20_000, "cannot be read as YAML: it is nested too deep"),
        (read_yaml, "a: &a [*a]", "cannot be read as YAML: it holds an alias"),
    ],
)
def test_what_is_no_such_file_is_one_line_with_the_fix(tmp_path: Path, read: Any, text: str, message: str) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(BadFile) as caught:
        read(path, Outer, "write it anew")
    assert str(caught.value).startswith(f"{path} {message}")
    assert str(caught.value).endswith("; write it anew")
    assert "\n" not in str(caught.value)


def test_a_newer_file_is_not_told_to_be_written_anew(tmp_path: Path) -> None:
    (tmp_path / "file").write_text('{"schema": 2}')
    with pytest.raises(BadFile, match=r"upgrade the harness$"):
        read_json(tmp_path / "file", Outer, "write it anew")
