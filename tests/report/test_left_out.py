"""What is left out is not missing: a count of its own wherever cases are counted, and no word in a cell."""

from __future__ import annotations

import math
import re

from harness.core.records import Verdict
from harness.report import conditions, document, export, page, plots, tables
from harness.report.account import account, sections, tally, tally_of
from harness.results.directory import SavedSession
from tests.report.test_report import cells, row

LEFT = row("nf4", "perplexity.delta", None, verdict=Verdict.NOT_COMPARABLE, reason="left out: no words")
GONE = row("fp4", "perplexity.delta", None, reason="killed")
ROWS = [row("fp32", "perplexity", 20.0), LEFT, GONE, row("nf4", "perplexity", 21.0)]
PLAN = [one.case for one in ROWS]


def test_a_count_of_its_own() -> None:
    assert [one.missing for one in ROWS] == [False, False, True, False]
    assert tally(ROWS) == {"planned": 4, "ran": 2, "missing": 1, "left out": 1}
    assert tally_of(ROWS[:1]) == "planned 1, ran 1, missing 0"
    two = [*ROWS, row("fp32", "perplexity", 20.0, model="o")]
    told = re.sub(" +", " ", account(two, [one.case for one in two]))
    assert "| `m` | cpu | 4 | 2 | 1 | 1 | 1 missing" in told
    assert "| `o` | cpu | 1 | 1 | 0 | 0 | 1 within noise |" in told
    shown = page.page(SavedSession(tuple(ROWS), tuple(PLAN), {}))
    assert "<p>Planned 4, ran 2, missing 1, left out 1.</p>" in shown
    assert "</b> on cpu: planned 4, ran 2, missing 1, left out 1." in shown
    overview = document._overview(*sections(ROWS))
    assert [cells(overview, name)["missing"] for name in ("nf4", "fp4")] == ["0", "1"]
    assert [cells(overview, name)["left out"] for name in ("nf4", "fp4")] == ["1", "–"]


def test_no_word_in_a_cell() -> None:
    words = ["–", "missing"]
    (section,) = sections(ROWS)
    assert [tables.quality(section, method, section.texts[0]) for method in ("nf4", "fp4")] == words
    assert [conditions.figure(one) for one in (LEFT, GONE)] == ["left out", "missing"]
    lines = [line for line in tables.lines(section) if not line.is_reference]
    assert [export._value(line, "perplexity.delta", str) for line in lines] == words
    found = [page.Page(ROWS, PLAN, {}).cell(one, None) for one in (LEFT, GONE)]
    assert [cell.words for cell in found if cell] == words
    panel = plots.Panel("memory.storage", plots.in_mib, plots.mebibytes, "")
    assert [plots.written(one, panel, math.nan) for one in (LEFT, GONE)] == words
