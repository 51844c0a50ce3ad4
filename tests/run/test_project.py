"""What a project or a package brings: taken in, or refused with file and reason in one line."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.core import catalog, contracts
from harness.core.contracts import Member, Method, Metric, Parameter
from harness.core.errors import BadFile, HarnessError
from harness.core.options import Declared, read_declared
from harness.inputs.models import names
from harness.inputs.texts import corpora
from harness.run.plan import open_to

METHOD = """
import dataclasses
from harness.methods.references import METHODS
METHOD = dataclasses.replace(METHODS[0], name="{name}", core=False)
"""
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def closed_again() -> Iterator[None]:
    yield
    catalog.declare(Declared(Path()))


def declared(folder: Path, **files: str) -> Declared:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return Declared(folder, methods=tuple(f"{name}.py" for name in files))


def refused(folder: Path, **files: str) -> str:
    open_to(declared(folder, **files))
    with pytest.raises(HarnessError) as caught:
        catalog.methods()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_adds_a_method_and_leaves_with_its_project(tmp_path: Path) -> None:
    open_to(declared(tmp_path, mine=METHOD.format(name="mine")))
    assert catalog.methods()["mine"].summary
    assert catalog.listed_methods()["mine"].origin == str(tmp_path / "mine.py")
    before = catalog.outside_code()
    (tmp_path / "mine.py").write_text(METHOD.format(name="mine") + "# changed\n")
    assert catalog.outside_code() != before
    open_to(Declared(tmp_path))
    assert "mine" not in catalog.methods()


def test_files_that_fail_say_which_and_why(tmp_path: Path) -> None:
    assert "bad.py (declared under [tool.harness]) fails to import: ZeroDivisionError" in refused(tmp_path, bad="1 / 0")
    assert "fails to import: SyntaxError" in refused(tmp_path, bad="def")
    assert "empty.py holds no METHOD of type Method" in refused(tmp_path, empty="")
    assert "'nf4' is already a method of the harness" in refused(tmp_path, clash=METHOD.format(name="nf4"))
    twice = refused(tmp_path, one=METHOD.format(name="mine"), two=METHOD.format(name="mine"))
    assert twice.startswith(str(tmp_path / "two.py"))
    assert str(tmp_path / "one.py") in twice
    open_to(Declared(tmp_path, methods=("none.py",)))
    with pytest.raises(HarnessError, match=r"none\.py \(declared under \[tool\.harness\]\) is not there"):
        catalog.methods()


GOOD = catalog.methods()["nf4"]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (dataclasses.replace(GOOD, name="a:b"), "is no name that a specification can hold"),
        (dataclasses.replace(GOOD, bits=0), "not a number above 0"),
        (dataclasses.replace(GOOD, load=None), "its load is None, which cannot be called"),  # type: ignore[arg-type]
        (dataclasses.replace(GOOD, dtype="fp8"), "its dtype is 'fp8'"),
        (dataclasses.replace(GOOD, parameters={"dtype": Parameter(int, 1, "")}), "'dtype' is named as no argument"),
        (
            dataclasses.replace(GOOD, parameters={"n": Parameter(int, "x", "")}),
            "is of type int, its default 'x' is not",
        ),
        (dataclasses.replace(GOOD, parameters={"n": Parameter(int, 3, "", (1, 2))}), "which is none of its choices"),
        (Metric("speed", (), lambda *_: None), "it has no members"),  # type: ignore[arg-type]
        (Metric("speed", (Member("fast", "s", "lower"),), lambda *_: None), "does not start with 'speed.'"),  # type: ignore[arg-type]
        (Metric("speed", (Member("speed", "s", "less"),), lambda *_: None), "is better 'less'"),  # type: ignore[arg-type]
        (Metric("speed", 2 * (Member("speed", "s", "lower"),), lambda *_: None), "is there twice"),  # type: ignore[arg-type]
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_broken_declarations_are_told(broken: Method | Metric, message: str) -> None:
    assert message in " | ".join(contracts.faults(broken))


def test_whole_declarations_have_no_faults() -> None:
    assert not [fault for method in catalog.methods().values() for fault in contracts.faults(method)]
    assert not [fault for metric in catalog.metrics().values() for fault in contracts.faults(metric)]


def test_a_metric_is_found_by_its_full_name(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {one.name: one for metric in catalog.metrics().values() for one in metric.members}
    brought = Metric("speed", (Member("speed.fast", "s", "lower"),), lambda *_: None)  # type: ignore[arg-type]
    monkeypatch.setattr(catalog, "metrics", lambda: {"speed": brought})  # the harness's own are not looked up there
    catalog.member.cache_clear()
    assert {name: catalog.member(name) for name in known} == known
    assert catalog.member("speed.fast") is brought.members[0]
    assert [catalog.member(name) for name in ("speed.slow", "memory.unheard", "unheard")] == [None] * 3
    catalog.member.cache_clear()


def point(name: str, value: Any) -> SimpleNamespace:
    def load() -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    return SimpleNamespace(name=name, value=f"package:{name}", load=load, group="", dist=None)


def test_entry_points_that_fail_or_clash(monkeypatch: pytest.MonkeyPatch) -> None:
    for points, message in (
        ([point("x", ImportError("no such thing"))], "entry point harness.methods: x = package:x fails: ImportError"),
        ([point("x", 3)], "entry point harness.methods: x = package:x is no Method"),
        ([point("x", GOOD)], "'nf4' is already a method of the harness"),
        ([point("x", dataclasses.replace(GOOD, name="x", bits=-1))], "breaks its contract: its bits are -1"),
    ):
        monkeypatch.setattr(catalog, "entry_points", lambda group, found=points: found)
        catalog.listed_methods.cache_clear()
        with pytest.raises(HarnessError, match=message.replace("(", r"\(")):
            catalog.methods()
    catalog.listed_methods.cache_clear()


def test_models_and_datasets_that_clash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HarnessError, match=r"\[tool\.harness\.models\] declares 'gpt2', a known name"):
        open_to(Declared(tmp_path, models={"gpt2": "path:x"}))
    with pytest.raises(HarnessError, match=r"\[tool\.harness\.datasets\] declares 'lee', a known name"):
        open_to(Declared(tmp_path, datasets={"lee": "text:x"}))
    for module, known in ((names, "gpt2"), (corpora, "lee")):
        kind = "models" if module is names else "datasets"
        monkeypatch.setattr(catalog, "entry_points", lambda group, known=known: [point(known, "path:x")])
        module.installed.cache_clear()
        more: dict[str, Any] = {kind: {"theirs": "path:x"}}
        with pytest.raises(HarnessError, match=f"entry point harness.{kind}: {known} = .* is already a"):
            module.installed()
        monkeypatch.setattr(catalog, "entry_points", lambda group: [point("theirs", "path:x")])
        with pytest.raises(HarnessError, match="which an installed package adds too"):
            open_to(dataclasses.replace(Declared(tmp_path), **more))
        monkeypatch.undo()
        module.installed.cache_clear()


def test_the_table_declares_files(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.harness]\nmethods = ["a.py"]\nmetrics = ["b.py"]\n')
    found = read_declared(tmp_path)[1]
    assert (found.methods, found.metrics) == (("a.py",), ("b.py",))
    (tmp_path / "pyproject.toml").write_text("[tool.harness]\nmethods = 'a.py'\n")
    with pytest.raises(BadFile, match=r"methods must be a list of texts, not 'a.py'"):
        read_declared(tmp_path)


def test_the_example_is_short_and_keeps_its_contract(tmp_path: Path) -> None:
    """As a plain file of a project, without installing it; CI also installs it as a package."""
    example = ROOT / "docs" / "example-plugin"
    files = [path for path in example.iterdir() if path.is_file()]
    assert sum(len(path.read_text().splitlines()) for path in files) < 60
    (tmp_path / "pyproject.toml").write_text(f"[tool.harness]\nmethods = ['{example / 'example_quantizer.py'}']\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--pyargs",
        "harness.cases.test_contracts",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "14 passed" in done.stdout
