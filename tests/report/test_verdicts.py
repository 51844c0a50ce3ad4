"""The report's account of every verdict: both comparisons, smallest effect, look-up, what was read, what moved it."""

from __future__ import annotations

from typing import Any

from harness.core.records import Case, Row, Verdict
from harness.report.account import verdicts
from tests.report.test_report import markdown

DIFFERENCE = ["torch: 2.13.0 -> 2.14.0", "threads: 2 -> 4"]


def row(metric: str, method: str = "nf4", **more: Any) -> Row:
    text = ("lee", "chunk:512") if metric.startswith("perplexity") else ("", "")
    facts = {"value": 1.0, "verdict": Verdict.SAME, "baseline": "m/nf4@cpu+avx512.yaml"}
    return Row.of(Case("m", method, *text, metric, "cpu"), **{**facts, **more})


def cells(text: str, metric: str) -> list[str]:
    line = next(line for line in text.splitlines() if f"`{metric}`" in line and line.startswith("|"))
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_each_line_holds_both_verdicts_the_change_the_smallest_effect_and_the_look_up() -> None:
    moved = row(
        "perplexity.delta",
        verdict=Verdict.OUT_OF_BOUND,
        verdict_reference=Verdict.OUT_OF_BOUND,
        verdict_baseline=Verdict.WITHIN_NOISE,
        detail={"change": {"value": 0.001, "low": -0.001, "high": 0.003, "p": 0.3}, "smallest": "0.4%"},
    )
    text = verdicts([moved, row("memory.storage", verdict_baseline=Verdict.SAME, detail={"smallest": "1 B"})])
    assert cells(text, "perplexity.delta")[3:] == [
        "out of bound", "within noise", "+0.1% [-0.1%, +0.3%]", "0.4%", "`m/nf4@cpu+avx512.yaml`",
    ]  # fmt: skip
    assert cells(text, "memory.storage")[3:7] == ["–", "same", "–", "1 B"]
    assert verdicts([row("perplexity", value=None)]) == ""


def test_a_reference_that_moved_is_said_with_the_environment_line_by_line() -> None:
    reason = "+0.01 nat against the record; the unquantized reference itself moved: it was no quantizer"
    found = row(
        "perplexity", "fp32", verdict=Verdict.WORSE, verdict_baseline=Verdict.WORSE, reason=reason,
        detail={"environment_difference": DIFFERENCE},
    )  # fmt: skip
    text = markdown([found], [found.case], {})
    told = "Recorded in another environment than 1 case that moved or may not compare (`fp32` `perplexity`): "
    told += "The unquantized reference "
    assert f"{told}itself moved.\n\n- torch: 2.13.0 -> 2.14.0\n- threads: 2 -> 4" in text
    same = row("perplexity", verdict_baseline=Verdict.WORSE, detail={"environment_difference": []})
    assert "Recorded in this very environment, and moved (`nf4` `perplexity`)" in verdicts([same])
    early = row("perplexity", verdict_baseline=Verdict.NOT_COMPARABLE, detail={"environment_difference": []})
    assert "Recorded in" not in verdicts([early])


def test_what_stopping_early_read_and_knows() -> None:
    detail = {"tokens_used": 4088, "tokens_available": 75530, "decided": "below", "why_whole": ""}
    text = verdicts([row("perplexity.delta", interval=(-0.002, 0.004), detail=detail)])
    assert "`m`, `nf4`: 4,088 of 75,530 tokens used (5%), stopped at 'below' with -0.00200 to +0.00400 nat" in text
    whole = {**detail, "decided": "end", "why_whole": "no window variance is recorded for this text"}
    assert verdicts([row("perplexity.delta", interval=(0.1, 0.1), detail=whole)]).endswith(
        "no window variance is recorded for this text"
    )


def test_the_tail_of_the_divergence_stands_beside_its_mean() -> None:
    case = Case("m", "nf4", "lee", "chunk:512", "divergence.kl", "cpu")
    found = Row.of(case, value=0.003, unit="nat", verdict=Verdict.SAME, detail={"p99": 0.05, "max": 1.25})
    text = markdown([found], [case], {})
    assert "kl p99 (nat)" in text
    assert "0.05000 |          1.250" in text
