"""The report as text: a golden session, what is missing, what is not finite, and names that must stay harmless."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from pytest_regressions.file_regression import FileRegressionFixture

from harness.core.errors import BadFile, HarnessError, MissingAsset
from harness.core.records import Case, Row, Verdict
from harness.core.values import digest
from harness.report import conditions, document, read_report, rewrite, write
from harness.report.account import NEVER, complete, sections
from harness.results.directory import SavedSession, nll_reader

DATA = Path(__file__).parent / "data"
MADE = DATA / "made-session"  # figures made up by hand: five methods, one killed, one case never reached


def markdown(
    rows: Sequence[Row],
    planned: Sequence[Case],
    worlds: Mapping[str, Mapping[str, Any]],
    notes: Sequence[str] = (),
    command: str = "",
) -> str:
    return document.markdown(SavedSession(tuple(rows), tuple(planned), worlds, tuple(notes), command))


def case(method: str, metric: str, *, text: bool | None = None, model: str = "m") -> Case:
    textual = metric.startswith("perplexity") if text is None else text
    return Case(model, method, "lee" if textual else "", "chunk:512" if textual else "", metric, "cpu")


def row(method: str, metric: str, value: float | None, **more: Any) -> Row:
    more.setdefault("verdict", Verdict.MISSING if value is None else Verdict.WITHIN_NOISE)
    return Row.of(case(method, metric, model=more.pop("model", "m")), value=value, **more)


def cells(report: str, method: str, table: int = 0) -> dict[str, str]:
    """The cells of a method's line by header, in the report's `table`-th table that has a 'method' column."""
    blocks = [block.splitlines() for block in report.split("\n\n") if block.startswith("| method")]
    header, _, *lines = blocks[table]
    split = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in (header, *lines)]
    found = [line for line in split[1:] if line[0].split(" (")[0].rstrip(" †") == f"`{method}`"]
    return dict(zip(split[0], found[0], strict=True))


def test_a_made_up_session_reads_as_recorded(file_regression: FileRegressionFixture) -> None:
    session = read_report(MADE)
    text = markdown(
        session.rows,
        session.planned,
        session.environments,
        notes=session.notes,
        command=session.command,
    )
    file_regression.check(text, extension=".md", encoding="utf-8", fullpath=DATA / "report.md")


def test_ratios_and_units_are_what_hand_computation_gives() -> None:
    rows = [
        row("fp32", "perplexity", 20.0),
        row("nf4", "perplexity", 22.0),
        row("nf4", "perplexity.delta", math.log(1.1), interval=(math.log(1.05), math.log(1.15))),
        row("nf4", "memory.storage", 3 * 2.0**20, bits_per_weight=4.5),
        row("fp32", "memory.storage", 12 * 2.0**20, bits_per_weight=32.0),
        row("nf4", "latency.decode", 0.01234, count=10, spread=0.001, detail={"p90": 0.02, "log_ratio": math.log(2)}),
    ]
    report = markdown(rows, [item.case for item in rows], {})
    assert cells(report, "nf4") == {
        "method": "`nf4`",
        "perplexity": "22.000",
        "ratio to reference [95%]": "1.1000 [1.0500, 1.1500]",
        "bits/weight": "4.500",
        "storage MiB": "3.00",
        "decode / reference [95%]": "2.0000",
        "quality": "within noise",
        "memory": "within noise",
        "speed": "within noise",
    }
    assert cells(report, "fp32")["ratio to reference [95%]"] == "1"
    assert cells(report, "nf4", 1)["storage / reference"] == "0.250"
    latency = cells(report, "nf4", 2)
    assert (latency["p90 ms"], latency["IQR ms"], latency["runs"]) == ("20.0", "1.00", "10")
    assert latency["ratio to reference [95%]"] == "2.0000"


def timed(method: str, ran: str, ratio: float, apart: float, **more: Any) -> Row:
    """A latency of a method in a dtype: `ratio` times the reference's, give or take `apart` of its log."""
    log = math.log(ratio)
    detail = {"log_ratio": log, "log_ratio_low": log - apart, "log_ratio_high": log + apart, **more}
    detail["reference_id"] = "fp32:batch=auto:dtype=fp32"
    return row(method, "latency.decode", 0.01 * ratio, method_id=f"{method}:batch=1:dtype={ran}", detail=detail)


def test_a_ratio_of_times_says_of_which_dtype_its_reference_is() -> None:
    rows = [timed("fp32", "fp32", 1.0, 0.01), timed("fp16", "fp16", 0.5, 0.03), timed("nf4", "fp16", 0.75, 0.04)]
    report = markdown(rows, [item.case for item in rows], {})
    found = cells(report, "nf4", 1)
    low, high = (math.exp(math.log(1.5) + sign * 0.05) for sign in (-1, 1))  # 0.03 and 0.04 by squares
    assert found["ratio to fp32 [95%]"] == "0.7500 [0.7206, 0.7806]"
    assert found["ratio to fp16 [95%]"] == f"1.5000 [{low:.4f}, {high:.4f}]"
    assert cells(report, "fp16", 1)["ratio to fp16 [95%]"] == "1"
    assert cells(report, "fp32", 1)["ratio to fp16 [95%]"] == "–"
    assert "Methods ran in fp16: the ratio to `fp32` is of dtype and quantization together." in report
    assert "The ratio to `fp16` is of quantization alone" in report


def test_a_ratio_whose_interval_is_not_usable_joins_none() -> None:
    rows = [timed("fp16", "fp16", 0.5, 0.03), timed("nf4", "fp16", 0.75, 0.04, log_ratio_usable=False)]
    report = markdown(rows, [item.case for item in rows], {})  # the reference itself was not timed
    assert cells(report, "nf4", 1)["ratio to fp16 [95%]"] == "1.5000"


def test_without_the_plain_model_in_that_dtype_its_measurement_is_asked_for() -> None:
    rows = [timed("fp32", "fp32", 1.0, 0.01), timed("nf4", "fp16", 0.75, 0.04)]
    report = markdown(rows, [item.case for item in rows], {})
    assert cells(report, "nf4", 1)["ratio to fp32 [95%]"] == "0.7500 [0.7206, 0.7806]"
    assert "ratio to fp16 [95%]" not in report
    assert "Measure `fp16` too for a ratio within one dtype." in report


def test_ratios_of_one_dtype_are_told_as_before() -> None:
    rows = [timed("fp32", "fp32", 1.0, 0.01), timed("bf16", "bf16", 2.0, 0.01), timed("nf4", "fp32", 0.75, 0.04)]
    report = markdown(rows, [item.case for item in rows], {})
    assert cells(report, "nf4", 1)["ratio to reference [95%]"] == "0.7500 [0.7206, 0.7806]"
    assert "Methods ran in" not in report


def test_the_profile_of_one_window_is_headed_so() -> None:
    rows = [timed("nf4", "fp32", 0.75, 0.04, device_seconds=0.002, device_tokens=511)]
    report = markdown(rows, [item.case for item in rows], {})
    assert cells(report, "nf4", 1)["device ms of a window"] == "2.00"


def test_the_reference_stands_first_and_the_others_in_plan_order() -> None:
    planned = [case(method, "perplexity") for method in ("nf4", "absmax-int8", "fp32", "fp4")]
    (section,) = sections(complete([], planned))
    assert section.methods == ("fp32", "nf4", "absmax-int8", "fp4")


def test_without_a_delta_the_quotient_of_perplexities_is_shown_without_interval() -> None:
    rows = [row("fp32", "perplexity", 20.0), row("nf4", "perplexity", 25.0)]
    report = markdown(rows, [item.case for item in rows], {})
    assert cells(report, "nf4")["ratio to reference [95%]"] == "1.2500 ‡"
    assert "‡ No interval" in report


def test_an_unusable_interval_is_not_shown() -> None:
    few = {"interval": (0.0, 0.2), "detail": {"usable": False}}
    slow = {"log_ratio": 0.0, "log_ratio_low": -1.0, "log_ratio_high": 1.0, "log_ratio_usable": False}
    rows = [row("nf4", "perplexity.delta", 0.1, **few), row("nf4", "latency.decode", 0.1, detail=slow)]
    report = markdown(rows, [item.case for item in rows], {})
    assert cells(report, "nf4")["ratio to reference [95%]"] == "1.1052 ‡"
    assert cells(report, "nf4", 1)["ratio to reference [95%]"] == "1.0000"


def test_a_later_row_supersedes_an_earlier_one() -> None:
    rows = [row("fp32", "perplexity", None, reason="killed"), row("fp32", "perplexity", 20.0)]
    report = markdown(rows, [rows[0].case], {})
    assert "Planned 1, ran 1, missing 0." in report
    assert "killed" not in report


def test_planned_cases_without_a_row_are_missing_with_a_reason() -> None:
    planned = [case("fp32", "perplexity"), case("nf4", "perplexity"), case("nf4", "memory.storage")]
    report = markdown(
        [row("fp32", "perplexity", 20.0), row("nf4", "perplexity", None, reason="no memory")], planned, {}
    )
    assert report.startswith("# Quantization report\n\n**Harm: 2 missing.**")
    assert "Planned 3, ran 1, missing 2." in report
    assert cells(report, "nf4")["perplexity"] == "missing"
    assert cells(report, "nf4")["storage MiB"] == "missing"
    assert "- 1 case missing: no memory (`m`: `nf4`; `perplexity`)" in report
    assert f"- 1 case missing: {NEVER} (`m`: `nf4`; `memory.storage`)" in report


def test_rows_of_an_earlier_plan_are_shown_but_not_counted() -> None:
    report = markdown(
        [row("fp32", "perplexity", 20.0), row("nf4", "perplexity", 21.0)], [case("fp32", "perplexity")], {}
    )
    assert "Planned 1, ran 1, missing 0." in report
    assert "1 row of an earlier plan stand" in report
    assert cells(report, "nf4")["perplexity"] == "21.000"


def test_nothing_planned_and_nothing_run_say_so() -> None:
    assert "**Nothing was measured: no case was planned.**" in markdown([], [], {})
    report = markdown([], [case("fp32", "perplexity"), case("nf4", "perplexity")], {})
    assert "**Nothing was measured: 0 of 2 planned cases ran.**" in report
    assert "No harm" not in report


def test_non_finite_figures_are_words_and_never_a_crash() -> None:
    rows = [
        row("fp32", "perplexity", math.nan, verdict=Verdict.OUT_OF_BOUND, reason="non-finite loss"),
        row("nf4", "perplexity", math.inf, verdict=Verdict.OUT_OF_BOUND, reason="non-finite loss in 3 tokens"),
        row("nf4", "perplexity.delta", math.inf, interval=(math.nan, math.inf), verdict=Verdict.OUT_OF_BOUND),
        row("nf4", "latency.decode", math.nan, detail={"p90": "nan", "log_ratio": "inf", "log_ratio_low": None}),
    ]
    report = markdown(rows, [item.case for item in rows], {})
    assert cells(report, "fp32")["perplexity"] == "not a number"
    assert cells(report, "nf4")["perplexity"] == "infinite"
    assert cells(report, "nf4")["ratio to reference [95%]"] == "infinite ‡"
    assert "3 out of bound" in report


def test_without_a_reference_there_is_no_ratio() -> None:
    rows = [row("nf4", "perplexity", 22.0), row("nf4", "memory.storage", 2.0**20)]
    report = markdown(rows, [item.case for item in rows], {})
    assert cells(report, "nf4") == {
        "method": "`nf4`",
        "perplexity": "22.000",
        "storage MiB": "1.00",
        "quality": "within noise",
        "memory": "within noise",
    }


def test_quality_memory_and_speed_have_a_verdict_each() -> None:
    rows = [
        row("fp32", "perplexity", 20.0),
        row("nf4", "perplexity", 22.0),
        row("nf4", "memory.storage", 1.0, verdict=Verdict.WORSE, reason="3 B more"),
    ]
    report = markdown(rows, [item.case for item in rows], {})
    assert (cells(report, "nf4")["quality"], cells(report, "nf4")["memory"]) == ("within noise", "worse")
    assert "- **worse**: `m`, `nf4`, `memory.storage` (cpu): 3 B more" in report


def test_methods_on_the_stored_grid_carry_a_mark_and_the_model_its_note() -> None:
    detail = {"grid_aligned": True, "model_note": "stored as Q4_1"}
    rows = [row("fp32", "perplexity", 20.0), row("linear-int4-affine:block=32", "perplexity", 20.0, detail=detail)]
    report = markdown(rows, [item.case for item in rows], {})
    assert "| `linear-int4-affine:block=32` † |" in report
    assert "> stored as Q4_1" in report
    assert "- † Its codes can represent the grid" in report
    assert "†" not in markdown(rows[:1], [rows[0].case], {})


def test_every_further_metric_has_its_own_column_with_unit() -> None:
    rows = [
        Row.of(case("nf4", "divergence.kl", text=True), value=0.0123456, unit="nat", interval=(0.01, 0.015)),
        Row.of(case("fp32", "divergence.kl", text=True), value=None, verdict=Verdict.MISSING, reason="why"),
    ]
    found = cells(markdown(rows, [item.case for item in rows], {}), "nf4", 1)
    assert found["divergence.kl (nat)"] == "0.01235 [0.01000, 0.01500]"


NEW = {"verdict": Verdict.NOT_COMPARABLE, "verdict_baseline": Verdict.NOT_COMPARABLE}


def test_on_a_new_machine_quality_and_memory_speak_for_themselves() -> None:
    bound = {**NEW, "verdict_reference": Verdict.WITHIN_BOUND}
    rows = [
        row("fp32", "perplexity", 20.0, **NEW),
        row("nf4", "perplexity", 22.0, **NEW),
        row("nf4", "perplexity.delta", 0.1, **bound),
        row("nf4", "latency.decode", 0.1, **NEW),
    ]
    report = markdown(rows, [item.case for item in rows], {})
    assert "**Nothing to compare with: 3 cases have no record on this machine; within their bounds: 1.**" in report
    quality = "- Quality, 3 cases: against the reference 1 within bound; against the record 3 not comparable."
    assert f"{quality}\n- Speed, 1 case: against the record 1 not comparable." in report
    assert "No harm" not in report
    assert (cells(report, "nf4")["quality"], cells(report, "nf4")["speed"]) == (
        "within bound (2 not comparable)",
        "not comparable",
    )
    rows.append(row("nf4", "memory.storage", 3.0, verdict=Verdict.SAME, verdict_baseline=Verdict.SAME))
    report = markdown(rows, [item.case for item in rows], {})
    assert "**No harm in the 1 case that has a record; 3 have none on this machine; within their bounds: 1.**" in report
    assert cells(report, "nf4")["memory"] == "same"


def test_a_latency_without_a_record_does_not_stand_over_the_rest() -> None:
    rows = [row("nf4", "perplexity", 22.0, verdict_baseline=Verdict.SAME), row("nf4", "latency.decode", 0.1, **NEW)]
    report = markdown(rows, [item.case for item in rows], {})
    assert "**No harm: 2 of 2 planned cases ran, none is out of bound or worse.**" in report


def test_a_changed_input_is_harm() -> None:
    rows = [row("nf4", "perplexity", 22.0, verdict=Verdict.INPUT_CHANGED, reason="config.rope_theta: 1 -> 2")]
    report = markdown(rows, [item.case for item in rows], {})
    assert "**Harm: 1 input changed.**" in report
    assert "- **input changed**: `m`, `nf4`" in report
    assert cells(report, "nf4")["quality"] == "input changed"


def test_environments_that_differ_stand_side_by_side() -> None:
    rows = [row("fp32", "perplexity", 20.0, environment="a"), row("nf4", "perplexity", 20.0, environment="b")]
    report = markdown(
        rows, [item.case for item in rows], {"a": {"threads": 2, "cpu": "x"}, "b": {"threads": 4, "cpu": "x"}}
    )
    assert "- Environments `a` (1 row), `b` (1 row): cpu x" in report
    assert re.search(r"\| threads +\| 2 +\| 4 +\|", report)


def test_two_token_plans_under_one_name_are_said_to_be_two() -> None:
    rows = [
        row("fp32", "perplexity", 20.0, protocol_id="W 512", token_hash="a" * 64),
        row("nf4", "perplexity", 20.0, protocol_id="W 256", token_hash="b" * 64),
    ]
    assert "2 different token plans, which do not compare" in markdown(rows, [item.case for item in rows], {})


def test_a_window_that_shrank_says_so_in_every_heading() -> None:
    told = {"protocol": "chunk:256"}
    names = [(method, metric) for method in ("fp32", "nf4") for metric in ("perplexity", "perplexity.word")]
    rows = [row(*name, 20.0, unit="ppl", detail=told) for name in names]
    rows += [dataclasses.replace(one, protocol="chunk:256") for one in rows]
    report = markdown(rows, [item.case for item in rows], {})
    assert "### `m`: `lee`, `chunk:512 run as chunk:256`\n" in report
    assert "### `m`: `lee`, `chunk:256`\n" in report
    assert "further metrics on `lee`, `chunk:512 run as chunk:256`\n" in report


def test_a_figure_that_is_left_out_is_no_failure_and_keeps_its_reason() -> None:
    rows = [row("fp32", "perplexity", 20.0), row("fp32", "perplexity.byte", 2.0)]
    rows.append(row("fp32", "perplexity.word", None, verdict=Verdict.NOT_COMPARABLE, reason="left out: no words"))
    report = markdown(rows, [item.case for item in rows], {})
    assert "**Harm" not in report
    assert "left out: no words" in report
    assert "perplexity.word" not in cells(report, "fp32", 1)  # no figure: no column
    assert "Planned 3, ran 2, missing 0, left out 1." in report
    assert "- Quality, 3 cases: left out 1; " in report
    assert "Left out, by reason:\n\n- 1 case not comparable: left out: no words" in report
    assert "Missing, by reason" not in report


def test_an_unknown_environment_is_named() -> None:
    rows = [row("fp32", "perplexity", 20.0, environment="abc"), row("nf4", "perplexity", 20.0, environment="def")]
    report = markdown(rows, [item.case for item in rows], {"abc": {"versions": {"torch": "2.9"}, "flags": ["a", "b"]}})
    assert "- Environment `abc` (1 row): flags a, b, versions.torch 2.9" in report
    assert "`def` is not in environments.json." in report


def test_the_derived_command_leaves_another_models_reference_to_its_option() -> None:
    reference = "fp32=path:base, v1"
    planned = [
        case(method, "perplexity", model="path:b")._replace(reference=reference) for method in (reference, "nf4")
    ]
    assert "--methods nf4 --" in markdown([], planned, {})
    alone = markdown([], planned[:1], {})
    assert "--methods fp32 --" in alone
    assert "--reference 'fp32=path:base\\, v1'" in alone


def test_weights_are_listed_under_the_model_that_they_are_of() -> None:
    rows = [row("fp32=path:base", "perplexity", 20.0, revision="aa"), row("nf4", "perplexity", 21.0, revision="bb")]
    assert conditions.weights(rows) == ["Weights of `path:base`: `aa`", "Weights of `m`: `bb`"]


def test_the_derived_command_plans_the_same_cases() -> None:
    planned = [case("nf4:layers=0-11", "perplexity", model="path:a b"), case("fp32", "perplexity", model="path:a b")]
    assert markdown([], planned, {}).endswith(
        "    pytest -p harness.plugin --pyargs harness.cases --models 'path:a b' --methods nf4:layers=0-11,fp32 "
        "--datasets lee --protocols chunk:512 --metrics perplexity --reference fp32 --device cpu\n"
    )


HOSTILE = "a|b`c`<script>alert(1)</script>\x1b[31m\u202e[x](javascript:y)*_z_\n# head"


def test_hostile_names_and_reasons_come_out_harmless() -> None:
    rows = [
        Row.of(
            Case(HOSTILE, HOSTILE, HOSTILE, HOSTILE, "perplexity", "cpu"),
            value=1.0,
            verdict=Verdict.WORSE,
            reason=HOSTILE,
            detail={"model_note": HOSTILE, "grid_aligned": True},
            protocol_id=HOSTILE,
            token_hash=HOSTILE,
            environment=HOSTILE,
            baseline=HOSTILE,
            revision=HOSTILE,
        )
    ]
    report = markdown(rows, [rows[0].case], {HOSTILE: {HOSTILE: HOSTILE}}, notes=[HOSTILE], command=HOSTILE)
    prose, _, command = report.partition("## To reproduce")
    assert "\x1b" not in report
    assert "\u202e" not in report
    assert "<script" not in prose
    assert not re.search(r"(?<!\\)\[x(?<!\\)\]", prose)
    assert not re.search(r"(?<!\\)`c", prose)
    assert "\n# head" not in report
    assert all(line.startswith("    ") for line in command.strip("\n").splitlines())
    for block in prose.split("\n\n"):  # a raw pipe would add a column
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines() if block.startswith("|")}
        assert len(widths) <= 1


def test_reading_gives_back_what_was_written() -> None:
    session = read_report(MADE)
    lines = (MADE / "measurements.jsonl").read_text().splitlines()
    assert [item.to_json() for item in session.rows] == lines
    assert len(session.planned) == len(lines) + 2
    assert session.command == "tox run -e report"


def test_a_census_that_repeats_is_shared_and_changes_nothing(tmp_path: Path) -> None:
    census = {"kinds": {"Linear": 4}, "count": 1}
    case = Case("m", "nf4", "", "", "memory.storage", "cpu")
    rows = [Row.of(case, census=census, value=float(value), method_id="a") for value in range(3)]
    rows[2:2] = [Row.of(case, census={**census, "count": 2}, method_id=name) for name in "ab"]
    (tmp_path / "measurements.jsonl").write_text("".join(f"{row.to_json()}\n" for row in rows))
    read = read_report(tmp_path / "measurements.jsonl").rows
    assert list(read) == rows
    assert read[1].census is read[0].census is read[4].census


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [row("fp32", "perplexity", 20.0).to_json(), row("nf4", "perplexity", 21.0).to_json()]
    (tmp_path / "measurements.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_a_torn_last_line_is_a_note(folder: Path) -> None:
    with (folder / "measurements.jsonl").open("a") as file:
        file.write('{"schema": 1, "mod')
    session = read_report(folder)
    assert len(session.rows) == 2
    assert "the last line of measurements.jsonl is torn (a crash while writing): not counted" in session.notes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"schema": 1, "mod', r"measurements\.jsonl:2 is no measurement"),
        ('{"schema": 99}', r"measurements\.jsonl:2 .*schema 99 is newer than this harness reads"),
        ("[1]", r"measurements\.jsonl:2 .*it must be a table"),
        ('{"schema": 1}', r"measurements\.jsonl:2 is no measurement"),
    ],
)
def test_a_broken_line_in_the_middle_is_refused_by_number(folder: Path, line: str, message: str) -> None:
    path = folder / "measurements.jsonl"
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{line}\n{second}\n")
    with pytest.raises(BadFile, match=message):
        read_report(folder)


def test_a_newer_schema_is_refused_on_the_last_line_too(folder: Path) -> None:
    with (folder / "measurements.jsonl").open("a") as file:
        file.write('{"schema": 99}')
    with pytest.raises(BadFile, match="newer than this harness reads"):
        read_report(folder)


@pytest.mark.parametrize("name", ["plan.json", "environments.json", "session.json"])
@pytest.mark.parametrize("text", ["{", '"x"'])
def test_other_broken_files_are_refused_by_name(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(BadFile, match=name.replace(".", r"\.")):
        read_report(folder)


def test_a_plan_of_something_else_is_refused(folder: Path) -> None:
    (folder / "plan.json").write_text('[{"model": "m"}]')
    with pytest.raises(BadFile, match="is no plan"):
        read_report(folder)


def test_without_a_plan_the_rows_are_the_plan_and_a_note_says_so(folder: Path) -> None:
    session = read_report(folder)
    assert [item.method for item in session.planned] == ["fp32", "nf4"]
    assert any("plan.json is not there" in note for note in session.notes)


def test_a_folder_without_measurements_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MissingAsset, match=r"holds no measurements: name a report directory"):
        read_report(tmp_path)
    with pytest.raises(BadFile, match="is no report directory"):
        rewrite(tmp_path / "absent")


def test_rewriting_gives_the_same_report_and_every_linked_plot_exists(tmp_path: Path) -> None:
    session = read_report(MADE)
    for name in ("measurements.jsonl", "plan.json", "environments.json"):
        (tmp_path / name).write_bytes((MADE / name).read_bytes())
    path = write(
        tmp_path, session.rows, session.planned, session.environments, notes=session.notes, command=session.command
    )
    first = path.read_text()
    links = re.findall(r"!\[.*?\]\((.*?)\)", first)
    assert len(links) == 3
    assert all((tmp_path / link.replace("%2B", "+")).is_file() for link in links)
    assert rewrite(tmp_path).read_text() == first
    told = json.loads((tmp_path / "session.json").read_text())
    assert (told["command"], told["notes"]) == ("tox run -e report", list(session.notes))


def test_a_report_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HarnessError, match=r"file/report.md cannot be written \(File exists\): make room"):
        write(tmp_path / "file", [], [], {})


def test_losses_are_read_only_under_the_name_they_hash_to(tmp_path: Path) -> None:
    import numpy as np

    values = np.array([1.0, 2.0], dtype="<f4")
    sha = digest(values.tobytes().hex())
    (tmp_path / "nll").mkdir()
    np.savez(tmp_path / "nll" / f"{sha}.npz", nll=values)
    read = nll_reader(tmp_path)
    found = read(sha)
    assert found is not None
    assert found.tolist() == [1.0, 2.0]
    assert read("f" * 64) is None
    assert read("../nll/" + sha) is None
    assert nll_reader(None)(sha) is None
    np.savez(tmp_path / "nll" / f"{'a' * 64}.npz", nll=values)
    with pytest.raises(BadFile, match="does not hold what its name says"):
        read("a" * 64)
    (tmp_path / "nll" / f"{'b' * 64}.npz").write_bytes(b"not a zip")
    with pytest.raises(BadFile, match="cannot be read"):
        read("b" * 64)


def test_importing_the_report_loads_neither_torch_nor_matplotlib() -> None:
    program = "import sys, harness.report; print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_render_leaves_its_arguments_alone() -> None:
    rows = [row("fp32", "perplexity", 20.0, detail={"model_note": "x"})]
    before = [dataclasses.asdict(item) for item in rows]
    assert markdown(rows, [rows[0].case], {}) == markdown(rows, [rows[0].case], {})
    assert [dataclasses.asdict(item) for item in rows] == before
