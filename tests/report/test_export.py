"""What a report gives other programs, read back as they read it."""

from __future__ import annotations

import csv
import math
import shutil
from pathlib import Path

import pytest

from harness.__main__ import main
from harness.core.records import Case, Row, Verdict
from harness.report import read_report
from harness.report.account import complete
from harness.report.export import as_latex, export, tex
from harness.results.flat import COLUMNS

MADE = Path(__file__).parent / "data" / "made-session"


def test_csv_has_a_line_a_planned_case_and_its_paired_ratio() -> None:
    session = read_report(MADE)
    lines = list(csv.DictReader(export(MADE, "csv", None).splitlines()))
    assert tuple(lines[0]) == COLUMNS
    assert [Case(*(line[name] for name in Case._fields)) for line in lines] == list(session.planned)
    rows = {row.case: row for row in session.rows}
    for line, case in zip(lines, session.planned, strict=True):
        row = rows.get(case)
        value = "" if row is None or row.value is None else repr(row.value)
        assert line["value"] == value
        if row is not None and row.metric == "latency.decode" and row.value is not None:
            assert float(line["ratio"]) == math.exp(row.detail["log_ratio"])
            assert float(line["ratio_low"]) == math.exp(row.detail["log_ratio_low"])
    assert {line["verdict"] for line in lines if not line["value"]} == {"missing"}


def test_pandas_and_parquet_hold_the_same(tmp_path: Path) -> None:
    import pandas

    export(MADE, "parquet", tmp_path / "made.parquet")
    session = read_report(MADE)
    frame, table = session.to_pandas(), pandas.read_parquet(tmp_path / "made.parquet")
    assert list(frame.columns) == list(table.columns) == list(COLUMNS)
    assert len(table) == len(session.planned)
    assert frame["value"].dropna().tolist() == table["value"].dropna().tolist()
    assert frame["verdict"].iloc[0] == "same"


def test_json_lines_are_whole_rows() -> None:
    session = read_report(MADE)
    found = [Row.from_json(line) for line in export(MADE, "jsonl", None).splitlines()]
    assert found == list(complete(session.rows, session.planned))


def test_latex_names_the_protocol_and_sets_names_as_they_are() -> None:
    text = export(MADE, "latex", None)
    assert text.count(r"\begin{table}") == 1
    assert "smollm2-135m on cpu on lee under chunk:512 (text lee; tokens smollm2" in text
    assert r"absmax-int8-tensor & 456.731 & 24.78 [13.03, 47.13] & 8.000 & 209.20 &" in text
    assert r"fp32 & 18.432 & 1 & 32.00 & 513.10 & 1 (123 ms) & 1 (31.7 ms) \\" in text
    assert tex("a_b{50%}\\~^#&$") == r"a\_b\{50\%\}\textbackslash{}\textasciitilde{}\textasciicircum{}\#\&\$"
    case = Case("m_1", "nf4", "", "", "memory.storage", "cpu")
    assert r"m\_1 on cpu." in as_latex([Row.of(case, value=2.0**20, unit="B", verdict=Verdict.SAME)])


def test_a_user_reads_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(MADE, tmp_path / "made")
    assert main(["export", str(tmp_path / "made"), "--to", "parquet"]) == 2
    assert capsys.readouterr().err.endswith("parquet is no text: name a file with -o FILE.parquet\n")
    assert (
        main(["export", str(tmp_path / "made"), "--to", "csv", "-o", str(tmp_path / "made" / "plan.json" / "a.csv")])
        == 2
    )
    assert "cannot be written" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "made"), "--to", "csv", "-o", str(tmp_path / "a.csv")]) == 0
    assert (tmp_path / "a.csv").read_text().count("\n") == 43
