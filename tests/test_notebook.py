"""What the documents say from Python is run: every block of docs/api.md, every cell of the example notebook."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import harness
from studies.notebook import executed

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "examples" / "measure.ipynb"
PAGE = ROOT / "docs" / "api.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)

pytest_plugins = ("pytester",)


def shape(notebook: dict[str, Any]) -> list[str]:
    """What cells print, line by line, without the digits of numbers and the width of columns."""
    lines = [
        line
        for cell in notebook["cells"]
        for output in cell.get("outputs", ())
        for line in "".join(output["text"]).split("\n")
    ]
    return [re.sub(r"\s+", " ", re.sub(r"-{2,}", "-", re.sub(r"[-+]?\d[\d.,]*", "0", line))) for line in lines]


def test_the_notebook_measures_three_methods_in_ten_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written = json.loads(NOTEBOOK.read_text())
    codes = ["".join(cell["source"]) for cell in written["cells"] if cell["cell_type"] == "code"]
    assert len([line for line in codes[0].splitlines() if line]) <= 10
    found = executed(written)
    assert shape(found) == shape(written)
    assert sum("bits a weight" in line for line in shape(found)) == 3


def test_the_notebook_says_which_two_words_to_change() -> None:
    text = NOTEBOOK.read_text()
    assert "change two words: `tiny-gpt2` to `gpt2` and `synthetic` to `wikitext-2`" in text
    first = next(cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
    source = "".join(first["source"])
    assert source.count('"tiny-gpt2"') == source.count('"synthetic"') == 1


def test_the_page_runs_from_top_to_bottom(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder; the block that is a test file of a user's is run by pytest."""
    blocks = BLOCK.findall(PAGE.read_text())
    assert len(blocks) >= 7
    space: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        if block.startswith("# test_mine.py"):
            pytester.makepyfile(test_mine=block)
            pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)
        else:
            exec(compile(block, str(PAGE), "exec"), space)
    assert space["METHOD"].name == "my-int6"
    assert space["METRIC"].family == "confidence"


def test_the_page_names_every_public_name() -> None:
    text = PAGE.read_text()
    assert [name for name in harness.__all__ if not re.search(rf"\b{name}\b", text)] == ["__version__"]
