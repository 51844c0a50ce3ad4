"""`python -m harness explain`: the known rule first, for each table whose rule is known, and little else."""

from __future__ import annotations

import argparse
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from harness.__main__ import parser
from harness.core.errors import BadSpecification, HarnessError
from harness.published import explaining, origins
from harness.published.explaining import RANDOM, RIGHT, Explained, explain, figures, rules

DATA = Path(__file__).parents[1] / "report" / "data" / "made-session"


def ours(**values: str) -> dict[str, dict[str, Decimal]]:
    return {"ours": {method.replace("_", "-"): Decimal(value) for method, value in values.items()}}


TABLES = {  # as printed, what the same weights give right, model, tokens of the text, the fault and its words
    "phi": (
        {"fp32": "3.049601", "bnb-int8": "3.13", "bnb-fp4": "3.31"},
        ours(fp32="86.491", bnb_int8="95.565", bnb_fp4="120.470"),
        ("phi-3-mini", 0), ("batch-denominator", "batch of 4"),
    ),
    "rounded": ({"fp32": "3.05"}, ours(fp32="86.5"), ("phi-3-mini", 0), ("batch-denominator", "batch of 4")),
    "olmo": (
        {"fp32": "218.36021423339844", "bnb-nf4": "243.39186096191406"},
        ours(fp32="14.9789", bnb_nf4="15.8185"),
        ("olmo-1b", 102_103), ("windows-scored-twice", "windows of 2048, one every 1024"),
    ),
    "neo": (
        {"fp32": "48.26519106014306", "bnb-nf4": "78.53157690724922"},
        ours(fp32="268.516", bnb_nf4="542.0"),
        ("gpt-neo-125m", 0), ("wrong-base", "2 to the mean of nats"),
    ),
    "cut texts": (
        {"fp32": "31.62", "bnb-int8": "31.83", "absmax-int8-tensor": "inf"},
        ours(fp32="31.6163", bnb_int8="31.8268"),
        ("gpt2", 0), ("", RIGHT),
    ),
    "rows": ({"fp32": "49.615657664681976"}, ours(fp32="49.6158"), ("gpt2", 0), ("", RIGHT)),
}  # fmt: skip


def answer(name: str) -> Explained:
    theirs, readings, (model, tokens), _ = TABLES[name]
    return explain(theirs, readings, model, tokens)


@pytest.mark.parametrize("name", TABLES)
def test_the_known_rule_comes_first_and_little_else_is_explained(name: str) -> None:
    found, (fault, words) = answer(name), TABLES[name][3]
    first = found.explanations[0]
    assert first.step.fault == fault
    assert words in first.step.words
    assert found.random <= RANDOM // 20
    assert str(found).splitlines()[0].startswith(f"their {found.printed} is our ")


def test_another_digit_is_not_explained() -> None:
    theirs, readings, (model, tokens), _ = TABLES["olmo"]
    assert not explain({**theirs, "fp32": "219.36021423339844"}, readings, model, tokens).explanations
    assert not explain({**theirs, "bnb-nf4": "244.39"}, readings, model, tokens).explanations
    assert not explain(theirs, readings, model, 0).explanations  # a power that nothing fixes is not tried


def test_labels_of_the_wrong_place_and_lost_scales_are_marks() -> None:
    table = {"fp32": "20389.62", "bnb-int8": "20321.64", "bnb-fp4": "13977.58", "bnb-nf4": "18281.47"}
    found = explain(table, ours(fp32="40.0"), "gpt2")
    assert not found.explanations
    assert "labels-shifted-twice" in found.marks[0]
    assert found.random <= RANDOM // 20
    assert not explain({**table, "bnb-fp4": "30000.0"}, ours(fp32="40.0"), "gpt2").marks
    assert "codes-without-scale" in answer("cut texts").marks[0]


def test_averages_that_no_power_gives_are_told_apart_by_measured_readings() -> None:
    """What `--measure` reads of a text under each rule; a program that averages perplexities prints one of them."""
    chance = np.random.default_rng(0)
    losses = [chance.gamma(2, 2, size=length) for length in chance.integers(1, 30, 40)]
    fed = [len(one) + 1 for one in losses]
    every = dict(rules("a text"))
    readings = {
        name: {"fp32": Decimal(origins.printed(rule, losses, fed))} for name, rule in every.items() if rule.labels == 1
    }
    for name, reading in readings.items():
        found = explain({"fp32": f"{reading['fp32']:.4f}"}, readings)
        assert (found.explanations[0].reading, found.explanations[0].step.words) == (name, RIGHT)
        assert found.random <= RANDOM // 20
    assert len(readings) == 10
    assert len(every) == 20  # the same under labels shifted twice


def test_figures_read_in_one_line() -> None:
    assert figures(["3.05", "bnb-nf4:dtype=fp16=3.17"]) == {"fp32": "3.05", "bnb-nf4": "3.17"}
    for wrong in ("fp32=much", "fp32=-1"):
        with pytest.raises(BadSpecification):
            figures([wrong])
    with pytest.raises(HarnessError, match="--ours bnb-nf4=FIGURE"):
        explain({"bnb-nf4": "3.0"}, ours(fp32="86"))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    parsed: argparse.Namespace = parser().parse_args(["explain", *arguments])
    return parsed.run(parsed), capsys.readouterr().out


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run(capsys, "fp32=3.05", "--ours", "fp32=86.5", "--model", "phi-3-mini")
    assert status == 0
    assert text.startswith("their 3.05 is our 86.5 to the power 0.25 (ours): a sentence's loss over the tokens")
    status, text = run(capsys, "4.4", "--ours", "86.5")
    assert (status, text.splitlines()[0]) == (1, "nothing known makes 4.4 out of ours")


def test_ours_from_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    readings = explaining.of_report(DATA, "", "")
    protocol, reading = next((name, found) for name, found in readings.items() if "fp32" in found)
    printed = f"{float(reading['fp32']) ** 0.6931472:.4f}"
    status, text = run(capsys, f"fp32={printed}", "--report-dir", str(DATA))
    assert status == 0
    assert f"({protocol}): 2 to the mean of nats (wrong-base)" in text
