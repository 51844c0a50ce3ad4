"""Known faults: green as listed, failing when they look different, named when they are gone."""

from __future__ import annotations

import math
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from harness import __main__ as commands
from harness import judge
from harness.core.environment import Environment
from harness.core.errors import BadFile
from harness.core.records import Case, Row, Verdict
from harness.judge.known_faults import NAME, SHIPPED, Fault, applying, load
from harness.judge.known_faults import judge as judged
from harness.metrics.measuring.checks import CHECKS, LAYER, MODELS
from harness.report.account import invariants

ROOT = Path(__file__).parents[2]
METHODS = ("bnb-int8", "bnb-fp4", "bnb-nf4", "bnb-nf4-dq")
HERE = Environment(bitsandbytes="0.50.2", transformers="5.23.0", instructions="avx2 avx512 avx512_bf16")
OLD = Environment(bitsandbytes="0.48.2", transformers="5.23.0", instructions="avx2 avx512 avx512_bf16")
PLAIN = Environment(bitsandbytes="0.50.2", transformers="5.23.0", instructions="avx2 avx512")
ENTRY = {
    "id": '"broken"',
    "invariant": '["state_dict"]',
    "methods": '["bnb-nf4"]',
    "package": '"bitsandbytes"',
    "versions": '">=0.49.0,<=0.50.2"',
    "class": '["avx512_bf16"]',
    "reference": '"tracker#1"',
    "summary": '"it breaks"',
    "figure": "[1.0, 1.2]",
}


def write(folder: Path, **changed: str | None) -> Path:
    entry = {**ENTRY, **changed}
    lines = [f"{key} = {value}" for key, value in entry.items() if value is not None]
    (folder / NAME).write_text("schema = 1\n[[fault]]\n" + "\n".join(lines) + "\n")
    return folder


def alone(folder: Path) -> tuple[Fault, ...]:
    """What the folder lists, without what the package lists too."""
    shipped = {fault.id for fault in load(SHIPPED.parent)}
    return tuple(fault for fault in load(folder) if fault.id not in shipped)


def row(value: float, *, holds: bool = False, metric: str = "invariant.state_dict", **detail: Any) -> Row:
    case = Case("layer", "bnb-nf4", "", "", metric, "cpu")
    return Row.of(case, value=value, detail={"holds": holds, "limit": "0.09", **detail})


def fails(found: Row) -> bool:
    return judge.fails(found, require_baselines=True, allow_missing=False)


def test_as_listed_it_is_green_and_named(tmp_path: Path) -> None:
    found = judged(row(1.14), alone(write(tmp_path)), HERE)
    assert (found.verdict, fails(found)) == (Verdict.SAME, False)
    assert found.detail["fault"] == "broken"
    assert "tracker#1" in found.reason
    assert "tracker#1" in invariants([found])


@pytest.mark.parametrize("value", [0.99, 1.21, math.nan])
def test_another_figure_fails(tmp_path: Path, value: float) -> None:
    found = judged(row(value), alone(write(tmp_path)), HERE)
    assert (found.verdict, fails(found)) == (Verdict.OUT_OF_BOUND, True)
    assert "looks different: a figure of 1 to 1.2" in found.reason


def test_an_exception_is_held_to_the_letter(tmp_path: Path) -> None:
    faults = alone(write(tmp_path, figure=None, exception='"AssertionError: K must be even"'))
    same = judged(row(math.inf, exception="AssertionError: K must be even"), faults, HERE)
    other = judged(row(math.inf, exception="AssertionError: K must be odd"), faults, HERE)
    silent = judged(row(1.1), faults, HERE)
    assert [fails(found) for found in (same, other, silent)] == [False, True, True]


def test_an_exception_where_a_figure_was_listed_fails(tmp_path: Path) -> None:
    assert fails(judged(row(math.inf, exception="ValueError: new"), alone(write(tmp_path)), HERE))


def test_a_fault_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    found = judged(row(0.0, holds=True), alone(write(tmp_path)), HERE)
    assert (found.verdict, fails(found)) == (Verdict.BETTER, False)
    assert "is gone" in found.reason
    assert "is gone" in invariants([found])


@pytest.mark.parametrize("world", [OLD, PLAIN])
def test_elsewhere_a_break_is_new(tmp_path: Path, world: Environment) -> None:
    faults = alone(write(tmp_path))
    assert fails(judged(row(1.14), faults, world))
    assert judged(row(0.0, holds=True), faults, world).verdict is Verdict.WITHIN_BOUND
    assert "broken" not in {fault.id for fault in applying(tmp_path, world)}


def test_a_stated_property_is_no_fault(tmp_path: Path) -> None:
    faults = alone(write(tmp_path, property="true"))
    assert "stated property" in judged(row(1.14), faults, HERE).reason
    assert judged(row(0.0, holds=True), faults, HERE).verdict is Verdict.WITHIN_BOUND
    assert "broken" not in {fault.id for fault in applying(tmp_path, HERE)}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"figure": None}, "needs one of exception and figure"),
        ({"exception": '"E: x"'}, "needs one of exception and figure"),
        ({"figure": "[2.0, 1.0]"}, "low, high"),
        ({"reference": None}, "fault 1: no 'reference'"),
        ({"versions": '"0.49 or so"'}, "versions must be"),
        ({"method": '["x"]'}, "no place for 'method'"),
        ({"methods": '"bnb-nf4"'}, "fault 1.methods must be a list of texts"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, changed: dict[str, str | None], words: str) -> None:
    with pytest.raises(BadFile, match=words) as caught:
        load(write(tmp_path, **changed))
    assert "\n" not in str(caught.value)


def test_other_bad_files(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("[[fault]]\n")
    with pytest.raises(BadFile, match="schema"):
        load(tmp_path)
    (tmp_path / NAME).write_text("schema = 1\nfaults = 3\n")
    with pytest.raises(BadFile, match="no place for 'faults'"):
        load(tmp_path)


def listed() -> tuple[Fault, ...]:
    return load(SHIPPED.parent)


def test_a_folder_without_a_list_has_the_packages_and_an_entry_of_its_own_stands_for_one(tmp_path: Path) -> None:
    shipped = load(tmp_path)
    assert shipped == listed() != ()
    own = load(write(tmp_path, id=f'"{shipped[0].id}"'))
    assert len(own) == len(shipped)
    assert own[0].reference == "tracker#1"


def test_the_repositorys_faults_speak_of_invariants_that_there_are() -> None:
    names = {check.name for check in CHECKS}
    for fault in listed():
        assert set(fault.invariant) <= names, fault.id
        methods = [method for method in METHODS if any(fnmatch(method, pattern) for pattern in fault.methods)]
        metrics = [f"invariant.{name}" for name in fault.invariant]
        where = (LAYER, *MODELS)
        cases = [Case(*one, "", "", name, "cpu") for one in product(where, methods) for name in metrics]
        assert any(fault.speaks_of(one) for one in cases), fault.id
        local = fault.reference.partition(",")[0]
        assert not local.startswith("docs/") or (ROOT / local).is_file(), fault.id


def test_the_state_dict_fault_holds_the_range_that_two_machines_saw() -> None:
    (fault,) = [fault for fault in listed() if fault.id == "state-dict-after-forward"]
    assert fault.figure is not None
    assert all(fault.figure[0] <= seen <= fault.figure[1] for seen in (1.143, 1.144, 1.125))
    assert not fault.figure[0] <= 0.093 <= fault.figure[1]
    assert [fault.reaches(world) for world in (HERE, OLD, PLAIN)] == [True, False, False]


@pytest.mark.parametrize(("world", "count"), [(HERE, 11), (OLD, 1)])
def test_doctor_names_the_faults_that_apply_here(
    world: Environment, count: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("harness.core.environment.capture", lambda device, threads, facts: world)
    assert commands.main(["doctor", "--baselines", str(ROOT / "baselines")]) == 0
    said = capsys.readouterr().out
    assert f"known faults that apply here: {count}" in said
    assert "  skip-list-replaces-defaults: " in said
