"""Pages under docs/: each names its command, and is what its script renders from the data beside it."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from harness import catalog, documents
from harness.arguments import resolve
from harness.contracts import Arguments
from harness.controls import CONTROLS, EMBEDDED
from harness.documents import Document
from harness.errors import BadFile
from harness.specifications import parse

ROOT = Path(__file__).parents[2]
DOCS, BENCHMARKS = ROOT / "docs", ROOT / "benchmarks"
SCRIPTS = (
    "pitfalls",
    "nf4",
    "sensitivity",
    "gguf_formats",
    "gate/run",
    "llamacpp",
    "gptq",
    "scale",
    "clusters",
    "ray_cluster",
    "faults/run",
    "run",
    "frontier",
)
PAGES = sorted(DOCS.glob("*.md"))


def script(name: str) -> ModuleType:
    """A script of benchmarks/, which is no package; its neighbours are found beside it, as when it is run."""
    path = BENCHMARKS / f"{name}.py"
    sys.path[:0] = [str(path.parent)]
    try:
        specification = importlib.util.spec_from_file_location(f"benchmarks_{path.stem}", path)
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(path.parent))


def document(name: str) -> Document:
    found: Document = script(name).DOCUMENT
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_opens_with_a_command_that_exists(page: Path) -> None:
    head = " ".join(page.read_text().splitlines()[:5])
    found = re.search(r"Made by `python (?:(benchmarks/[\w/]+\.py)|-m harness (\w+))", head)
    assert found, f"{page.name} does not open with 'Made by `python ...`'"
    made = ROOT / found[1] if found[1] else ROOT / "harness" / "commands" / f"{found[2]}.py"
    assert made.is_file()
    assert f"docs/{page.name}`" in head


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_page_is_rendered_from_its_data(name: str) -> None:
    made = document(name)
    data = documents.read(DOCS / "data" / f"{made.name}.json")
    assert (DOCS / f"{made.name}.md").read_text() == documents.page(made, data), f"run: {made.command}"


def test_every_data_file_has_its_script() -> None:
    assert {path.stem for path in (DOCS / "data").glob("*.json")} == {document(name).name for name in SCRIPTS}


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


@pytest.mark.parametrize("name", ["pitfalls", "nf4", "sensitivity"])
def test_a_changed_figure_changes_the_page(name: str) -> None:
    made = document(name)
    data = documents.read(DOCS / "data" / f"{made.name}.json")
    before = documents.page(made, data)
    paths = [path for path in numbers(data["results"]) if path[-1] in {"delta", "perplexity"}]
    assert paths
    for path in paths[:: max(1, len(paths) // 7)]:
        place = data["results"]
        for key in path[:-1]:
            place = place[key]
        kept = place[path[-1]]
        place[path[-1]] = 1.25 * kept + 0.25 if math.isfinite(kept) else 3.0
        assert documents.page(made, data) != before, path
        place[path[-1]] = kept


def test_every_control_bears_its_mark_on_the_page() -> None:
    """On the embedded model where it is shown there; the figures are those that the command measured."""
    found = documents.read(DOCS / "data" / "pitfalls.json")["results"]["controls"]
    assert list(found) == [control.name for control in CONTROLS]
    for control in CONTROLS:
        shown = found[control.name]
        assert EMBEDDED in shown or EMBEDDED not in control.models, control.name
        assert shown, control.name
        for model, figures in shown.items():
            assert control.symptom(figures["fault"]), (control.name, model)
            assert not control.symptom(figures["right"]), (control.name, model)


@pytest.mark.parametrize("name", ["nf4", "sensitivity", "pitfalls"])
def test_a_page_holds_the_embedded_model(name: str) -> None:
    results = documents.read(DOCS / "data" / f"{name}.json")["results"]
    assert EMBEDDED in results["losses" if name == "nf4" else "models"]


def test_plots_are_drawn_from_the_data() -> None:
    made = document("nf4")
    drawn = made.plots(documents.read(DOCS / "data" / "nf4.json")["results"])
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
        script="toys",
    )


def test_a_script_prints_its_page_or_writes_page_data_and_plots(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = toy({"value": math.inf})
    assert documents.run(made, ["--models", "a,b"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# Toy\n\nMade by `python benchmarks/toys.py -o docs/toy.md` on 20")
    assert "value inf, models ['a', 'b']" in printed
    assert documents.run(made, ["-o", str(tmp_path / "toy.md")]) == 0
    assert (tmp_path / "toy.svg").read_text() == "<svg/>"
    kept = json.loads((tmp_path / "data" / "toy.json").read_text())
    assert kept["results"] == {"value": "inf", "models": []}
    capsys.readouterr()
    assert documents.run(made, ["--data", str(tmp_path / "data" / "toy.json")]) == 0
    assert capsys.readouterr().out == (tmp_path / "toy.md").read_text()


def test_data_that_is_none_is_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    with pytest.raises(BadFile, match=r"cannot be read as a page's data .*: make the page again with -o"):
        documents.read(path)
    path.write_text("{")
    with pytest.raises(BadFile, match="cannot be read as a page's data"):
        documents.read(path)
    path.write_text('{"results": {}}')
    with pytest.raises(BadFile, match="holds no 'world' and 'results'"):
        documents.read(path)


NF4 = script("nf4_figures")


def through_method(name: str, weight: torch.Tensor) -> torch.Tensor:
    """A weight (out, in) as a catalogued method stores it."""
    method = catalog.methods()[name]
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Module()])
    model.layers[0].up = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    model.layers[0].up.weight = torch.nn.Parameter(weight, requires_grad=False)
    arguments: Arguments = resolve(parse(f"{name}:block=64"), method, "cpu")
    method.sketch(model, arguments)
    (stored,) = method.quantized(model)
    return stored.dequantize()


def test_the_page_s_rounding_is_the_methods() -> None:
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(3))
    made = {(kind, code): values for kind, code, _, values in NF4.candidates(weight, 64)}
    known = {"linear-int4": ("symmetric", 4), "linear-int4-affine": ("affine", 4), "nf4": ("nf4", 4), "fp4": ("fp4", 4)}
    for name, key in known.items():
        torch.testing.assert_close(made[key].view(48, 128), through_method(name, weight), rtol=0, atol=1e-6)


def test_linear_codes_of_two_bits_by_hand() -> None:
    weight = torch.tensor([-1.0, -0.4, 0.6, 0.2] * 8)
    assert NF4.symmetric(weight, 2, 32)[:4].tolist() == [-1.0, 0.0, 1.0, 0.0]
    affine = NF4.affine(weight, 2, 32)[:4]  # -1 to 0.6 in three steps of 0.5333
    torch.testing.assert_close(affine, torch.tensor([-1.0, -1 + 1.6 / 3, 0.6, -1 + 3.2 / 3]))


def test_bits_count_scales() -> None:
    bits = {(kind, code): bits for kind, code, bits, _ in NF4.candidates(torch.randn(1 << 16), 64)}
    assert bits["symmetric", 3] == 3.5
    assert bits["affine", 4] == 5.0
    assert bits["nf4", 4] == 4.5
    # codes 4, absmax 8 / 64, nested absmax 32 / (64 * 256), then 16 + 256 levels and an offset in fp32
    assert bits["nf4-dq", 4] == pytest.approx(4 + 8 / 64 + 32 / 2**14 + 32 * (16 + 256 + 1) / 2**16)


def test_nf4_s_levels_follow_from_the_definition() -> None:
    levels = NF4.nf4.LEVELS
    assert max(abs(ours - theirs) for ours, theirs in zip(NF4.quantiles(), levels, strict=True)) < 1e-6


def test_shares_of_levels_add_up() -> None:
    shares = NF4.use(NF4.nf4.LEVELS)
    assert sum(shares) == pytest.approx(1)
    assert shares[0] + shares[15] > 1 / 64  # the largest magnitude of every block takes an end
