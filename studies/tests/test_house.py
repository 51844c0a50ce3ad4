"""What counts as a file that a case crosses."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from harness.core.options import Declared, Options
from harness.core.records import Case, Figure, Row
from studies import house

CASE = Case("m", "nf4", "", "", "memory.storage", "cpu")
FOLDER = Path(house.HOME)


class Subject:
    def __init__(self) -> None:
        self.case = CASE


@pytest.mark.parametrize(
    ("value", "does"),
    [
        (CASE, True),
        (Figure(1.0, "B"), True),
        (replace(Row.of(CASE), value=1.0), True),
        (Options(Declared(Path())), False),
        ([Row.of(CASE)], True),
        ({"id": CASE}, True),
        (Subject(), True),
        ("nf4", False),
        (["nf4"], False),
        ([], False),
        (None, False),
    ],
)
def test_what_travels(value: object, does: bool) -> None:
    assert house.travels(value) is does
    assert house.is_asked(value) is isinstance(value, Options)


def test_what_an_import_calls_is_not_entered() -> None:
    profile = house.Profile()
    source = "def called(): pass\ndef wrapped(): called()\n"
    space: dict[str, object] = {}
    exec(compile(source, str(FOLDER / "made_up.py"), "exec"), space)
    called, wrapped = space["called"], space["wrapped"]
    assert callable(called)
    assert callable(wrapped)
    body = compile("wrapped()\n", str(FOLDER / "importing.py"), "exec")
    sys.setprofile(profile)
    try:
        exec(body, space)
        seen = dict(profile.files)
        called()
    finally:
        sys.setprofile(None)
    assert seen == {}
    assert profile.files["made_up.py"].functions == {"called": 1}


# the stations of a case that both ways pass, in order
STATIONS = ("run/group.py", "metrics/memory.py", "judge/verdicts.py", "report/document.py")


@pytest.mark.parametrize(
    ("way", "first"),
    [
        ("measure", ("run/measure.py", "run/plan.py", "run/session.py")),
        ("pytest", ("plugin/state.py", "run/plan.py", "run/session.py", "plugin/collector.py")),
    ],
)
def test_a_case_crosses_the_rooms_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, first: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    profile = house.WAYS[way](house.CASES["memory"])
    crossed = [name for name, one in profile.files.items() if one.handed]
    assert sum(not name.startswith("core/") for name in crossed) <= house.LIMIT
    places = [crossed.index(name) for name in (*first, *STATIONS)]
    assert places == sorted(places)
    assert "methods/quantizing/int4.py" in profile.files.keys() - set(crossed)  # it quantizes weights and knows no case
    text = house.table(profile, every=True)
    assert len(text.splitlines()) == len(profile.files) + 1
    assert f"{len(crossed)} files are crossed" in text
