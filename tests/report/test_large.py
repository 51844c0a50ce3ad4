"""A report of very many cases: short, and with everything that failed or moved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from harness.__main__ import main
from harness.core.records import Case, Row, Verdict
from harness.report.account import MOST_CASES
from harness.report.plots import svgs
from harness.results.directory import ReportDirectory
from tests.report.test_report import markdown

METHODS = ("fp32", "nf4")


def a_session(cases: int, worse: int = 0) -> list[Row]:
    """Rows of two methods over many texts on two models; the last few are worse."""
    rows = []
    for place in range(cases):
        model, text = f"m{place % 4 // 2}", f"text:{place // 4}"
        case = Case(model, METHODS[place % 2], text, "chunk:512", "perplexity", "cpu")
        row = Row.of(case, value=30.0 + place % 2 + place / 1e4, unit="ppl", verdict=Verdict.WITHIN_NOISE)
        rows.append(replace(row, protocol_id="w", token_hash=f"{text}", environment="e"))
    bad = [
        replace(row, verdict=Verdict.WORSE, reason=f"bad {place}") for place, row in enumerate(rows[cases - worse :])
    ]
    return [*rows[: cases - worse], *bad]


def report(rows: list[Row]) -> str:
    return markdown(rows, [row.case for row in rows], {"e": {}})


def test_up_to_the_limit_every_case_has_its_line() -> None:
    text = report(a_session(MOST_CASES))
    assert text.count("text:7`") > 4
    assert "harness report DIR --models NAME" not in text


def test_beyond_it_one_table_a_model_and_every_verdict_that_matters() -> None:
    rows = a_session(MOST_CASES + 4, worse=30)
    text = report(rows)
    assert len(text.splitlines()) < 200
    assert f"This report has {MOST_CASES + 4:,} cases" in text
    texts = len({row.dataset for row in rows})
    line = next(line for line in text.splitlines() if line.startswith("| `nf4`"))
    assert f" {texts:,} ".replace(",", "") in line
    assert f"30 of {MOST_CASES + 4:,} measured cases failed or moved" in text
    assert all(f"bad {place}" in text for place in range(30))
    assert svgs(rows, [row.case for row in rows]) == {}


def test_a_name_with_two_token_plans_is_still_told_apart() -> None:
    rows = a_session(MOST_CASES + 4)
    rows[0] = replace(rows[0], token_hash="another")
    text = report(rows)
    assert "stands for 2 different token plans" in text
    assert text.count("token ids sha256") == 2


def test_one_model_of_a_large_report_is_printed_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = a_session(MOST_CASES + 4)
    (tmp_path / "measurements.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))
    ReportDirectory(tmp_path).keep_plan(row.case for row in rows)
    assert main(["report", str(tmp_path), "--models", "m1"]) == 0
    text = capsys.readouterr().out
    assert "## `m1` on cpu" in text
    assert "`m0`" not in text
    assert "### `m1`: `text:7`" in text
    assert not (tmp_path / "report.md").exists()
    assert main(["report", str(tmp_path), "--models", "m7"]) == 2
    assert "holds no case of 'm7': it has m0, m1" in capsys.readouterr().err
