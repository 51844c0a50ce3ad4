"""Pages of measurements: each names its command, and is what its script renders from the data beside it."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from harness import __main__ as commands
from harness.core.errors import BadFile
from studies import pages
from studies.pages import Document
from studies.pitfalls import CONTROLS, EMBEDDED

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "studies"
SCRIPTS = (
    "pitfalls.run",
    "quantizers.nf4",
    "quantizers.sensitivity",
    "quantizers.gguf_formats",
    "quantizers.llamacpp",
    "quantizers.gptq",
    "quantizers.frontier",
    "gate.run",
    "scale.scale",
    "scale.clusters",
    "scale.ray_cluster",
    "reliability.run",
    "performance.run",
    "performance.second_opinion",
    "zoo.run",
)
WRITTEN = {"api", "changelog", "claims", "contributing", "gpu", "index", "pytest", "verdicts"}  # by hand
PAGES = sorted(page for page in (*DOCS.glob("*.md"), *(ROOT / "docs").glob("*.md")) if page.stem not in WRITTEN)


def document(script: str) -> Document:
    found: Document = importlib.import_module(f"studies.{script}").DOCUMENT
    return found


def data_of(made: Document) -> Path:
    return ROOT / made.folder / "data" / f"{made.name}.json"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_opens_with_a_command_that_exists(page: Path) -> None:
    head = " ".join(page.read_text().splitlines()[:5])
    found = re.search(r"Made by `python -m (?:(studies\.[\w.]+)|harness (\w+))", head)
    assert found, f"{page.name} does not open with 'Made by `python -m ...`'"
    assert importlib.util.find_spec(found[1]) if found[1] else hasattr(commands, found[2])
    assert f"{page.relative_to(ROOT)}`" in head


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_page_is_rendered_from_its_data(name: str) -> None:
    made = document(name)
    data = pages.read(data_of(made))
    assert (ROOT / made.folder / f"{made.name}.md").read_text() == pages.page(made, data), f"run: {made.command}"


def test_every_data_file_has_its_script() -> None:
    kept = {*DOCS.glob("data/*.json"), *ROOT.glob("docs/data/*.json")}
    assert kept == {data_of(document(name)) for name in SCRIPTS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).is_file(), target


def numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of the floats in a JSON value."""
    if isinstance(value, float):
        yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in children:
        yield from numbers(item, (*path, key))


@pytest.mark.parametrize("name", ["pitfalls.run", "quantizers.nf4", "quantizers.sensitivity"])
def test_a_changed_figure_changes_the_page(name: str) -> None:
    made = document(name)
    data = pages.read(data_of(made))
    before = pages.page(made, data)
    paths = [path for path in numbers(data["results"]) if path[-1] in {"delta", "perplexity"}]
    assert paths
    for path in paths[:: max(1, len(paths) // 7)]:
        place = data["results"]
        for key in path[:-1]:
            place = place[key]
        kept = place[path[-1]]
        place[path[-1]] = 1.25 * kept + 0.25 if math.isfinite(kept) else 3.0
        assert pages.page(made, data) != before, path
        place[path[-1]] = kept


def test_every_control_bears_its_mark_on_the_page() -> None:
    """On the embedded model where it is shown there; the figures are those that the command measured."""
    found = pages.read(DOCS / "data" / "pitfalls.json")["results"]["controls"]
    assert list(found) == [control.name for control in CONTROLS]
    for control in CONTROLS:
        shown = found[control.name]
        assert EMBEDDED in shown or EMBEDDED not in control.models, control.name
        assert shown, control.name
        for model, figures in shown.items():
            assert control.pitfall.symptom(figures["fault"]), (control.name, model)
            assert not control.pitfall.symptom(figures["right"]), (control.name, model)


def test_plots_are_drawn_from_the_data() -> None:
    made = document("quantizers.nf4")
    drawn = made.plots(pages.read(DOCS / "data" / "nf4.json")["results"])
    assert list(drawn) == ["nf4.svg"]
    assert drawn["nf4.svg"].startswith("<?xml")
    assert (DOCS / "nf4.svg").is_file()


def toy(results: Mapping[str, Any]) -> Document:
    return Document(
        "toy",
        "Toy",
        lambda models: {**results, "models": list(models)},
        lambda found: f"value {found['value']}, models {found['models']}",
        lambda found: {"toy.svg": "<svg/>"},
        script="toys.toy",
    )


def test_a_script_prints_its_page_or_writes_page_data_and_plots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = toy({"value": math.inf})
    assert pages.run(made, ["--models", "a,b"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# Toy\n\nMade by `python -m studies.toys.toy -o docs/studies/toy.md` on 20")
    assert "value inf, models ['a', 'b']" in printed
    assert pages.run(made, ["-o", str(tmp_path / "toy.md")]) == 0
    assert (tmp_path / "toy.svg").read_text() == "<svg/>"
    kept = json.loads((tmp_path / "data" / "toy.json").read_text())
    assert kept["results"] == {"value": "inf", "models": []}
    capsys.readouterr()
    assert pages.run(made, ["--data", str(tmp_path / "data" / "toy.json")]) == 0
    assert capsys.readouterr().out == (tmp_path / "toy.md").read_text()


def test_data_that_is_none_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    with pytest.raises(BadFile, match=r"cannot be read as a page's data .*: make the page again with -o"):
        pages.read(path)
    path.write_text("{")
    with pytest.raises(BadFile, match="cannot be read as a page's data"):
        pages.read(path)
    path.write_text('{"results": {}}')
    with pytest.raises(BadFile, match="holds no 'world' and 'results'"):
        pages.read(path)
