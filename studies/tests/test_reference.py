"""docs/reference says what the code says, about everything that there is."""

from __future__ import annotations

import re

import pytest

from harness.core import catalog
from harness.core.options import SETTINGS
from harness.core.records import Verdict
from harness.core.specification import Specification
from harness.inputs.texts.protocols import FORMS, parse
from studies import reference
from studies.reference import BOS, HOME

WRITTEN = reference.pages()


@pytest.mark.parametrize("name", WRITTEN)
def test_a_page_is_what_the_code_says(name: str) -> None:
    assert (HOME / name).read_text() == WRITTEN[name], "run: python -m studies.reference"


def test_no_page_is_left_over() -> None:
    assert {path.name for path in HOME.iterdir()} == {*WRITTEN, "index.md"}


def test_everything_has_its_line() -> None:
    own = [name for name, item in catalog.listed_methods().items() if item.own]
    members = [member.name for metric in catalog.metrics().values() for member in metric.members]
    assert all(f"`{name}`" in WRITTEN["methods.md"] for name in own)
    assert all(f"`{name}`" in WRITTEN["metrics.md"] for name in members)
    assert all(f"`--{setting.flag}" in WRITTEN["options.md"] for setting in SETTINGS)
    assert all(f"**{word}**" in WRITTEN["verdicts.md"] for word in Verdict)


def test_the_words_that_fail_a_session() -> None:
    said = dict(re.findall(r"^\| \*\*(.+?)\*\* \| .+? \| (yes|no|with|only)", WRITTEN["verdicts.md"], re.MULTILINE))
    assert [word for word, fails in said.items() if fails == "yes"] == [
        "missing",
        "input changed",
        "out of bound",
        "worse",
    ]
    assert [word for word, fails in said.items() if fails == "with"] == ["not comparable", "unrecorded"]


@pytest.mark.parametrize("name", FORMS)
def test_a_picture_scores_each_token_at_most_once(name: str) -> None:
    ends, windows = reference.windows_of(name)
    scored = [int(token) for window in windows for token in window.ids[len(window.ids) - window.scored :]]
    assert len(set(scored)) == len(scored)
    assert BOS not in scored
    assert WRITTEN[f"protocol-{name}.svg"].count(f'fill="{reference.SCORED}" stroke="#51606b"/><text') == len(scored)
    lengths, width, step = reference.TOYS[name]
    assert sum(lengths) == ends[-1]
    words = {"stride": (str(width), str(step)), "sentence": ()}.get(name, (str(width),))
    assert parse(Specification(name, words)).name == name


def test_columns_of_a_docstring_stay_in_place() -> None:
    text = reference.prose("Title.\n\nname      unit   means\nother     s      time\n\n| a |\n|---|\n\n# Head\n")
    assert "```text\nname      unit   means\nother     s      time\n```" in text
    assert "\n\n| a |\n|---|\n\n#### Head" in text
