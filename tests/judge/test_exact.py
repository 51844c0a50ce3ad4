"""Changed exact facts: one case fails for them, the others point to it."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from harness.core.records import Case, Row, Verdict
from harness.judge import exact, fails

WHERE = "m/nf4.yaml, recorded 2026-11-30T00:00:00Z on cpu:avx512"
CENSUS = "census on cpu, buffers: 0 -> 131072"
FIRST, FOOTPRINT, LOSS = (
    Case("m", "nf4", *text, metric, "cpu")
    for text, metric in (
        (("", ""), "memory.parameters"),
        (("", ""), "memory.footprint"),
        (("t", "chunk:4"), "perplexity"),
    )
)


def row(case: Case, verdict: Verdict = Verdict.SAME, **more: Any) -> Row:
    reference = Verdict.WITHIN_BOUND if case.family == "memory" else None
    facts = {"value": 1.0, "unit": "B", "reason": "own", "verdict_reference": reference, **more}
    return Row.of(case, verdict=verdict, verdict_baseline=verdict, **facts)


def session() -> list[Row]:
    """A buffer more: every case meets the census, and the footprint's own bytes moved with it."""
    bytes_ = "memory.footprint on cpu: 1000 -> 132072"
    return [
        exact.hold(row(FIRST), [CENSUS], WHERE, FIRST),
        exact.hold(row(FOOTPRINT, Verdict.WORSE), [bytes_, CENSUS], WHERE, FIRST),
        exact.hold(row(LOSS, Verdict.WITHIN_NOISE), [CENSUS], WHERE, FIRST),
    ]


def failing(rows: list[Row]) -> list[str]:
    return [one.case.metric for one in rows if fails(one, require_baselines=True, allow_missing=True)]


def test_the_first_fails_and_names_it_the_others_point_to_it() -> None:
    rows = session()
    assert failing(rows) == ["memory.parameters"]
    assert rows[0].reason == f"exact facts differ from the record: {CENSUS} ({WHERE}); own"
    assert rows[1].verdict is Verdict.WITHIN_BOUND
    assert (rows[2].verdict, rows[2].verdict_baseline) == (Verdict.WITHIN_NOISE, Verdict.WITHIN_NOISE)
    assert {one.reason for one in rows[1:]} == {f"own; exact facts changed: see {FIRST.id}"}
    assert exact.settle(rows) == rows


def test_facts_as_recorded_leave_a_row_as_it_is() -> None:
    measured = row(LOSS)
    assert exact.hold(measured, [], WHERE, LOSS) is measured
    resumed = exact.hold(measured, [CENSUS], WHERE, FIRST)
    assert exact.hold(row(LOSS, detail=resumed.detail), [], WHERE, LOSS) == measured
    assert exact.first_of(measured) == ""


def test_a_more_severe_verdict_stands() -> None:
    found = exact.hold(row(FIRST, Verdict.OUT_OF_BOUND), [CENSUS], WHERE, FIRST)
    assert (found.verdict, found.verdict_baseline) == (Verdict.OUT_OF_BOUND, Verdict.WORSE)


def test_where_the_first_has_no_figure_the_next_fails() -> None:
    gone = Row.of(FIRST, verdict=Verdict.MISSING, reason="killed")
    settled = exact.settle([gone, *session()[1:]])
    assert failing(settled) == ["memory.footprint"]
    assert settled[1].reason.startswith("exact facts differ from the record: memory.footprint on cpu: 1000 -> 132072; ")
    assert settled[1].reason.endswith("; own")
    assert settled[2].reason == f"own; exact facts changed: see {FOOTPRINT.id}"
    assert exact.settle(settled) == settled


def test_groups_fail_each_for_themselves() -> None:
    other = FIRST._replace(method="fp4")
    rows = [*session(), exact.hold(row(other), [CENSUS], WHERE, other)]
    assert failing(exact.settle(rows)) == ["memory.parameters", "memory.parameters"]


def test_a_shard_leaves_the_failure_to_the_shard_that_has_the_first() -> None:
    rows = session()[1:]
    assert exact.settle(rows, {FIRST}) == rows
    assert failing(rows) == []


def test_of_several_that_fail_the_first_does_where_their_rows_come_together() -> None:
    """As of shards: bytes moved in two of them, and neither knew of the other."""
    bytes_ = "memory.footprint on cpu: 1000 -> 132072"
    one = exact.hold(row(FIRST, Verdict.WORSE), ["memory.parameters on cpu: 1 -> 2"], WHERE, FIRST)
    two = exact.hold(row(FOOTPRINT, Verdict.WORSE), [bytes_], WHERE, FOOTPRINT)
    three = exact.hold(row(LOSS), [CENSUS], WHERE, FOOTPRINT)
    assert failing([one, two, three]) == ["memory.parameters", "memory.footprint"]
    for rows in ([one, two, three], [Row.from_json(each.to_json()) for each in (one, two, three)]):
        settled = exact.settle(rows)
        assert failing(settled) == ["memory.parameters"]
        assert settled[1:] == [
            exact.hold(row(FOOTPRINT, Verdict.WORSE), [bytes_], WHERE, FIRST),
            exact.hold(row(LOSS), [CENSUS], WHERE, FIRST),
        ]
        assert exact.settle(settled) == settled


@pytest.mark.parametrize("method", ["nf4", "nf4:block=64"])
def test_the_message_has_the_line_its_place_and_two_commands(method: str) -> None:
    case = FIRST._replace(method=method)
    text = exact.message(exact.hold(row(case), [CENSUS], WHERE, case))
    lines = dict(line.split(maxsplit=1) for line in text.splitlines()[1:])
    assert (lines["changed"], lines["recorded"]) == (CENSUS, WHERE)
    assert lines["measure"].endswith("memory.parameters/cpu") == (method == "nf4")
    record = shlex.split(lines["record"])  # every exact fact of the group, and of no other
    assert "--regen-all" in record
    assert {"memory.parameters", "memory.storage"} <= set(record[record.index("--harness-metrics") + 1].split(","))
    assert ("-k" in record) == (method == "nf4")
