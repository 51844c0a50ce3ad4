"""What a report gives other programs, read back as they read it."""

from __future__ import annotations

import csv
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from harness.__main__ import main
from harness.core.errors import HarnessError
from harness.core.records import Case, Row, Verdict
from harness.report import read_report
from harness.report.account import complete
from harness.report.export import as_latex, as_model_card, export, tex
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


def test_latex_is_sound_whatever_names_hold() -> None:
    """No LaTeX is installed where this runs: what it would stumble over is looked for by hand."""
    case = Case("m_1{", "[x]%&#$^~\\<|>", "le_e", "chunk:512", "perplexity", "cpu")
    hostile = Row.of(case, value=20.0, unit="ppl", verdict=Verdict.SAME, protocol_id="100% of {a}_b & $c$ #1 \\end")
    texts = [as_latex([hostile]), export(MADE, "latex", None)]
    for text in texts:
        head, _, body = text.partition("\n")
        assert head == "% in the preamble: \\usepackage{booktabs}"
        plain = body.replace("\\\\\n", "\n").replace(r"\textbackslash{}", "").replace("$\\times$", "")
        bare = re.sub(r"\\[{}%&#$_]", "", plain)
        depth = 0
        for character in bare:
            depth += (character == "{") - (character == "}")
            assert depth >= 0
        assert depth == 0
        assert not set("%#$_~^<>|") & set(bare)
        assert re.findall(r"\\begin\{(\w+)\}", bare) == ["table", "tabular"] * bare.count(r"\begin{table}")
        assert re.findall(r"\\end\{(\w+)\}", bare) == ["tabular", "table"] * bare.count(r"\begin{table}")
        commands = set(re.findall(r"\\([a-zA-Z]+)", bare))
        assert commands <= {"begin", "end", "caption", "toprule", "midrule", "bottomrule"} | {
            f"text{name}" for name in ("less", "greater", "bar", "asciitilde", "asciicircum")
        }
        (columns,) = re.findall(r"\\begin\{tabular\}\{([lr]+)\}", bare)
        lines = re.findall(r"^(.*) \\\\$", text, re.MULTILINE)
        assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {len(columns) - 1}
        assert not [line for line in lines if line.startswith(("[", "*"))]
    assert r"on le\_e under chunk:512 (100\% of \{a\}\_b \& \$c\$ \#1 \textbackslash{}end)" in texts[0]
    assert "(latency.prefill a prompt of 128 tokens, batch 1; latency.decode a prompt of 128 tokens" in texts[1]


def test_a_model_card_is_what_the_hub_reads(capsys: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub import ModelCard, ModelCardData

    assert main(["export", str(MADE), "--to", "model-card", "--methods", "absmax-int8"]) == 0
    text = capsys.readouterr().out
    data = ModelCard(text + "\n# A quantized model\n").data
    assert isinstance(data, ModelCardData)
    assert data.model_name == "smollm2-135m (absmax-int8)"
    rows = {row.metric: row for row in read_report(MADE).rows if row.method == "absmax-int8" and row.dataset}
    assert data.eval_results
    assert {one.metric_type for one in data.eval_results} == rows.keys()
    for one in data.eval_results:
        row = rows[one.metric_type]
        assert one.metric_value == row.value
        assert (one.task_type, one.dataset_type, one.dataset_config) == ("text-generation", "lee", "chunk:512")
        assert one.dataset_args == {"protocol": row.protocol_id, "token_ids_sha256": row.token_hash}
        assert one.metric_args is not None
        assert one.metric_args["revision"] == row.revision
    again = yaml.safe_load(data.to_yaml())["model-index"]  # what the Hub's own library makes of it
    assert [own["value"] for own in again[0]["results"][0]["metrics"]] == [row.value for row in rows.values()]
    whole = yaml.safe_load(export(MADE, "model-card", None).strip("-\n"))
    assert len(whole["model-index"]) > 3  # an entry a method
    assert "base_model" not in whole  # of a package, not of the Hub
    hub = replace(rows["perplexity"], model="hub:org/name@abc", value=math.inf)
    card = yaml.safe_load(as_model_card([hub]).strip("-\n"))
    assert card["base_model"] == "org/name"
    assert card["model-index"][0]["results"][0]["metrics"][0]["value"] == "inf"
    with pytest.raises(HarnessError, match="no figure of a whole text"):
        as_model_card([replace(hub, value=None)])
    assert main(["export", str(MADE), "--to", "csv", "--methods", "nf5"]) == 2
    assert "holds no case of 'nf5': it has fp32, " in capsys.readouterr().err


def test_the_command_reads_lists_as_a_session_does(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[object, ...]] = []

    def export(*given: object) -> str:
        seen.append(given)
        return ""

    monkeypatch.setattr("harness.report.export.export", export)
    assert main(["export", "out", "--to", "csv", "--models", r"path:a\,b,gpt2", "--methods", "nf4,fp32"]) == 0
    assert seen == [(Path("out"), "csv", None, ["path:a,b", "gpt2"], ["nf4", "fp32"])]


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
