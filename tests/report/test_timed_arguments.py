"""Times with arguments stand wherever a reader looks first: the tables, plots, page, exports, the last lines."""

from __future__ import annotations

import math
from typing import Any

from harness.core.records import Case, Row, Verdict
from harness.plugin import ending
from harness.report import conditions, frontier, page, plots, tables
from harness.report.account import by_measure, sections
from harness.report.export import as_latex
from harness.results.directory import SavedSession

DECODE = "latency.decode:batch=4:prompt=512"
PREFILL = "latency.prefill:batch=4:prompt=512"
RATIO = {"log_ratio": math.log(0.5), "log_ratio_low": -0.8, "log_ratio_high": -0.6, "log_ratio_usable": True}
WORK = {"prompt_tokens": 512, "new_tokens": 1, "batch": 4}


def row(method: str, metric: str, value: float, **detail: Any) -> Row:
    text = ("lee", "chunk:512") if metric.startswith("perplexity") else ("", "")
    where = Case("m", method, *text, metric, "cpu")
    return Row.of(where, value=value, count=16, detail=detail, verdict=Verdict.SAME, verdict_baseline=Verdict.SAME)


ROWS = [
    row("fp32", "perplexity", 20.0),
    row("fp32", DECODE, 0.02, **WORK),
    row("nf4", "perplexity.delta", 0.1),
    row("nf4", DECODE, 0.01, **RATIO, **WORK),
    row("nf4", PREFILL, 0.01, **RATIO, prompt_tokens=512, batch=4),
]


def test_one_function_says_which_metric_a_measure_is() -> None:
    known = by_measure(["latency.forward", DECODE, PREFILL, "latency.prefill"])
    assert list(known.items()) == [
        ("latency.prefill", "latency.prefill"),  # that without arguments, where it was timed too
        ("latency.decode", DECODE),
        ("latency.forward", "latency.forward"),
    ]


def test_times_with_arguments_stand_in_every_first_view() -> None:
    (section,) = sections(ROWS)
    assert tables.timed(section) == plots.timed(section) == (PREFILL, DECODE)
    assert "decode:batch=4:prompt=512 / reference [95%]" in tables.main(section, section.texts[0])
    assert ending.speed(section, "nf4", "decode") == "0.50"
    point = frontier.points(section, section.texts[0])[1]
    assert (point.seconds, point.log_time) == (0.01, math.log(0.5))
    session = SavedSession(tuple(ROWS), tuple(one.case for one in ROWS), {})
    assert page.Page(session.rows, session.planned, {}).timed == [PREFILL, DECODE]
    latex = as_latex(ROWS)
    assert "decode:batch=4:prompt=512 time" in latex
    assert "decode:batch=4:prompt=512 a prompt of 512 tokens, 1 token behind it, batch 4" in latex


def test_the_batch_stands_with_the_metric_that_ran_at_it() -> None:
    (line,) = conditions.timing([*ROWS, row("nf4", "latency.decode", 0.01, prompt_tokens=128, new_tokens=1, batch=1)])
    assert f"`{DECODE}` a prompt of 512 tokens, 1 token behind it, batch 4; " in line
    assert "`latency.decode` a prompt of 128 tokens, 1 token behind it, batch 1; " in line
    assert "batch 4, 16 blocks" in conditions.protocol_of(ROWS[1])
