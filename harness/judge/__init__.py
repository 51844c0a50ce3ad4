"""The verdicts of one row: against the reference of the same run, and against the recorded baseline. No torch.

*Against the reference* a bound of `bounds` is held to the figure itself, which is exact for the text that was
read; a timing's bound to the interval of its log ratio. *Against the record*, per-token losses are paired with the
recorded ones over windows; a change counts when its 95% interval lies beyond the floor. Whatever may not be compared
(other tokens, another protocol, weights, device or environment) is `not comparable`, with the field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from harness.core.contracts import Member
from harness.core.environment import Environment, difference
from harness.core.records import Row, Verdict
from harness.judge.bounds import Bounds
from harness.judge.question import Losses, Outcome, Question
from harness.judge.record import against_record
from harness.judge.recorded import Recorded
from harness.judge.reference import against_reference
from harness.judge.wording import message

__all__ = ["fails", "hold", "judge", "message"]
LEFT = frozenset({"change", "bound", "floor", "smallest", "environment_difference"})  # by an earlier judgement
TOLD = frozenset({Verdict.WORSE, Verdict.BETTER, Verdict.NOT_COMPARABLE})  # with how the environments differ
FAILING = frozenset({Verdict.OUT_OF_BOUND, Verdict.WORSE})
REQUIRED = frozenset({Verdict.UNRECORDED, Verdict.NOT_COMPARABLE})  # with --require-baselines


def judge(
    row: Row,
    member: Member,
    *,
    bounds: Bounds,
    recorded: Recorded | None,
    environment: Environment,
    nll: Losses,
    tests: int = 1,
) -> Row:
    """The row with its verdicts, the more severe one's reason first, and the file that served.

    Args:
        row: as measured; `value` None stays `missing`.
        member: what the metric promises.
        bounds: tolerable losses and floors.
        recorded: what `Baselines.find` gave.
        environment: in which the row was measured.
        nll: per-token losses by sha, None where no file holds them.
        tests: statistical tests of the session (`error_rate`), which share its error rate.

    Returns:
        The row; `detail` gains `floor`, and where they were used `change` (nats, with its interval and p value),
        `bound`, `smallest` (the smallest effect that the comparison could have seen) and, of a figure that moved or
        may not be compared, `environment_difference`, line by line.
    """
    if row.value is None:
        return replace(row, verdict=Verdict.MISSING)
    question = Question(row, member, bounds, recorded, nll, environment, tests)
    reference, record = against_reference(question), against_record(question)
    outcomes = sorted((outcome for outcome in (reference, record) if outcome.verdict), key=severity)
    detail = _detail(question, reference, record)
    if recorded is not None and record.verdict in TOLD:
        detail["environment_difference"] = difference(recorded.environment, environment)
    return replace(
        row,
        verdict=outcomes[0].verdict or Verdict.SAME,
        verdict_reference=reference.verdict,
        verdict_baseline=record.verdict,
        reason="; ".join(outcome.reason for outcome in outcomes if outcome.reason),
        baseline=recorded.file if recorded else "",
        detail=detail,
    )


def severity(outcome: Outcome) -> int:
    """0 for the most severe."""
    return (outcome.verdict or Verdict.WITHIN_BOUND).severity


def hold(row: Row, changed: Sequence[str]) -> Row:
    """The judged row, `worse` where exact facts are not those recorded; other tokens alone are `not comparable`."""
    if not changed or row.value is None:
        return row
    text = f"exact facts differ from the record: {'; '.join(changed)}"
    tokens = all(line.startswith(("token_hash ", "tokens ")) for line in changed)
    word = Verdict.NOT_COMPARABLE if tokens else Verdict.WORSE
    if word.severity >= row.verdict.severity:
        return replace(row, reason=f"{row.reason}; {text}")
    return replace(row, verdict=word, verdict_baseline=word, reason=f"{text}; {row.reason}")


def _detail(question: Question, reference: Outcome, record: Outcome) -> dict[str, Any]:
    """The row's detail with what was decided by; what an earlier judgement left there is replaced."""
    row, rule = question.row, question.bounds.against_reference(question.row.case)
    detail = {key: value for key, value in row.detail.items() if key not in LEFT}
    detail["floor"] = row.detail.get("aa_floor") if question.member.timed else question.bounds.floor(row.case)
    if record.change is not None:
        change = asdict(record.change)
        detail["change"] = {**{name: change[name] for name in ("value", "low", "high")}, "floor": record.floor}
        detail["change"] |= {} if record.p is None else {"p": record.p}
    if rule is not None and reference.verdict is not None:
        detail["bound"] = f"{rule} ({rule.reason})"
    if smallest := record.smallest or reference.smallest:
        detail["smallest"] = smallest
    return detail


def fails(row: Row, *, require_baselines: bool, allow_missing: bool) -> bool:
    """Whether this row fails the session.

    Out of bound, worse and (unless allowed) missing do, and whatever a non-finite reference leaves undecided; with
    `require_baselines` unrecorded and not comparable too, but for latency (on another machine it has the reference
    only) and for a delta that was decided against its bound before its text ended (the record is of the whole text).
    """
    verdicts = {row.verdict, row.verdict_reference, row.verdict_baseline}
    if row.value is None or row.verdict is Verdict.MISSING:
        return not allow_missing
    if verdicts & FAILING or (row.verdict is Verdict.UNUSABLE and row.detail.get("reference_non_finite")):
        return True
    excepted = row.case.family == "latency" or row.stopped_early
    return require_baselines and not excepted and bool(verdicts & REQUIRED)
