"""The verdicts of one row: against the reference of the same run, and against the recorded baseline. No torch.

*Against the reference* a bound of `bounds` is held to the figure itself, which is exact for the text that was read; a
timing's bound to the interval of its log ratio. *Against the record* the rules of `rules` hold. A model or tokens that
are not those recorded are `input changed`, each fact named; another machine or environment is `not comparable`, with
the field.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from harness.core.contracts import Member
from harness.core.environment import Environment, difference
from harness.core.records import Row, Verdict
from harness.core.specification import listed, other_model
from harness.core.stats import Estimate
from harness.core.text import MIB, percent
from harness.core.values import decode_number
from harness.judge import rules
from harness.judge.baselines import OUT_OF_BOUND, Recorded, token_limit
from harness.judge.bounds import Bounds, Rule, ran
from harness.judge.rules import (
    BRIEF,
    MOVED,
    Identities,
    Losses,
    Outcome,
    Question,
    log_ratio,
    read,
    stopped,
    unknown_identity,
)

LEFT = frozenset({"change", "bound", "floor", "smallest", "environment_difference"})  # by an earlier judgement
EXPLAINED = frozenset({Verdict.WORSE, Verdict.BETTER, Verdict.NOT_COMPARABLE})  # with how the environments differ
FAILING = frozenset({Verdict.OUT_OF_BOUND, Verdict.WORSE})
REQUIRED = frozenset({Verdict.UNRECORDED, Verdict.NOT_COMPARABLE})  # with --require-baselines
ABSENT = "absent or not of these tokens: `git lfs pull`, restore it, or record again"
AGAIN = frozenset({Verdict.INPUT_CHANGED, Verdict.WORSE, Verdict.UNRECORDED, Verdict.NOT_COMPARABLE})  # may be recorded
LABEL_WIDTH = 12  # of a failure's report
SELECTABLE = re.compile(r"[\w:+./-]+")  # what pytest's -k reads as one word


def judge(
    row: Row,
    member: Member,
    *,
    bounds: Bounds,
    recorded: Recorded | None,
    environment: Environment,
    nll: Losses,
    tests: int = 1,
    identities: Identities = unknown_identity,
) -> Row:
    """The row with its verdicts, the more severe one's reason first, and the file that served.

    Args:
        row: as measured; `value` None stays `missing`, or left out.
        member: what the metric promises.
        bounds: tolerable losses and floors.
        recorded: what `Baselines.find` gave.
        environment: in which the row was measured.
        nll: per-token losses by sha, None where no file holds them.
        tests: statistical tests of the session (`rules.tests`), which share its error rate.
        identities: a model's facts by their digest (`core.identity`), None where nobody knows them.

    Returns:
        The row; `detail` gains `floor`, and where they were used `change` (nats, with its interval and p value, and
        where tokens were paired the root mean square of their changes and how much of it is noise), `bound`, `smallest`
        (the smallest effect that the comparison could have seen) and, of a figure that moved or may not be compared,
        `environment_difference`, line by line.
    """
    if row.value is None:
        return row if row.left_out else replace(row, verdict=Verdict.MISSING)
    run = ran(row.case, row.method_id, environment)
    reference = against_reference(row, member, rule := bounds.against_reference(row.case, run), tests)
    if recorded is not None:
        question = Question(row, member, bounds, recorded, nll, environment, tests, identities)
        record = against_record(question, recorded, row.value)
    elif row.stopped_early:
        record = Outcome(Verdict.NOT_COMPARABLE, stopped(row))
    elif row.live:
        record = Outcome(Verdict.UNRECORDED, "no record: a live module has none")
    else:
        record = Outcome(Verdict.UNRECORDED, f"no record; to record it: {command(row, '--regen-all')}")
    decided = [(verdict, one) for one in (reference, record) if (verdict := one.verdict) is not None]
    decided.sort(key=lambda pair: pair[0].severity)

    detail = {key: value for key, value in row.detail.items() if key not in LEFT}
    detail["floor"] = row.detail.get("aa_floor") if member.timed else bounds.floor(row.case, run)
    if record.change is not None:
        change = record.change
        detail["change"] = {"value": change.value, "low": change.low, "high": change.high, "floor": record.floor}
        detail["change"] |= {} if record.p is None else {"p": record.p}
        detail["change"] |= {} if record.rms is None else {"rms": record.rms, "rms_limit": record.rms_limit}
    if reference.verdict is not None and rule:
        detail["bound"] = f"{rule} ({rule.reason})"
    if smallest := record.smallest or reference.smallest:
        detail["smallest"] = smallest
    if recorded is not None and record.verdict in EXPLAINED:
        detail["environment_difference"] = difference(recorded.environment, environment)
    return replace(
        row,
        verdict=decided[0][0],
        verdict_reference=reference.verdict,
        verdict_baseline=record.verdict,
        reason="; ".join(outcome.reason for _, outcome in decided if outcome.reason),
        baseline=recorded.file if recorded else "",
        detail=detail,
    )


def hold(row: Row, changed: Sequence[str]) -> Row:
    """The judged row, `worse` where exact facts are not those recorded; other tokens alone are `input changed`."""
    if not changed or row.value is None:
        return row
    text = f"exact facts differ from the record: {'; '.join(changed)}"
    tokens = all(line.startswith(("token_hash ", "tokens ")) for line in changed)
    word = Verdict.INPUT_CHANGED if tokens else Verdict.WORSE
    if word.severity >= row.verdict.severity:
        return replace(row, reason=f"{row.reason}; {text}")
    return replace(row, verdict=word, verdict_baseline=word, reason=f"{text}; {row.reason}")


def fails(row: Row, *, require_baselines: bool, allow_missing: bool, allow_changed_input: bool = False) -> bool:
    """Whether this row fails the session.

    Out of bound, worse and (unless allowed) missing and changed input do, and whatever a non-finite reference leaves
    undecided; with `require_baselines` unrecorded and not comparable too, but for latency (on another machine it has
    the reference only) and for a delta that was decided against its bound before its text ended (the record is of the
    whole text).
    """
    verdicts = {row.verdict, row.verdict_reference, row.verdict_baseline}
    if row.left_out:
        return False
    if row.missing or row.verdict is Verdict.MISSING:
        return not allow_missing
    if Verdict.INPUT_CHANGED in verdicts and not allow_changed_input:
        return True
    if verdicts & FAILING or (row.verdict is Verdict.UNUSABLE and row.detail.get("reference_non_finite")):
        return True
    excepted = row.case.family == "latency" or row.stopped_early
    return require_baselines and not excepted and bool(verdicts & REQUIRED)


def against_reference(row: Row, member: Member, rule: Rule | None, tests: int) -> Outcome:
    """Whether the figure stays within what may be lost against the unquantized model, or equals its prediction."""
    if broken := unsound(row, member):
        return broken
    value = row.value if row.value is not None else math.nan
    if "predicted_equal" in row.detail:
        if row.detail["predicted_equal"]:
            return Outcome(Verdict.WITHIN_BOUND, "as predicted, to the byte")
        predicted = row.detail.get("predicted", math.nan)
        text = f"measured {shown(value, row.unit)}, predicted {shown(predicted, row.unit)}: {value - predicted:+,.0f} B"
        return Outcome(Verdict.OUT_OF_BOUND, text)
    if rule is None or row.method == row.reference:
        return Outcome(None)
    if row.stopped_early:  # read only until it was decided: its interval against the bound; across it nothing is known
        low, high = row.interval or (-math.inf, math.inf)
        text = f"{row.metric} {percent(low)} to {percent(high)} against {row.reference} after {read(row)}, bound {rule}"
        seen = percent((high - low) / 2, sign="")
        if low > rule.limit:
            return Outcome(Verdict.OUT_OF_BOUND, text, smallest=seen)
        if high <= rule.limit:
            return Outcome(Verdict.WITHIN_BOUND, text, smallest=seen)
        return Outcome(Verdict.UNUSABLE, f"{text}: stopped at its resolution, undecided", smallest=seen)
    if member.timed:
        return _timing_within(row, rule, tests)
    good = value >= rule.limit if rule.kind == "at_least" else value <= rule.limit
    figure = percent(value) if rule.kind == "ratio" else shown(value, row.unit)
    text = f"{row.metric} {figure} against {row.reference}, bound {rule}"
    if row.interval is not None and member.paired and rule.kind == "ratio":
        text += f" (text like this: {percent(row.interval[0])} to {percent(row.interval[1])})"
    return Outcome(Verdict.WITHIN_BOUND if good else Verdict.OUT_OF_BOUND, text, smallest="exact on this text")


def unsound(row: Row, member: Member) -> Outcome | None:
    """What a loss or figure that is not finite means, or a time taken beside other work; None where all is well.

    Never averaged away.
    """
    if row.detail.get("crowded"):
        others = f"other work kept {row.detail['others']:.1f} cores busy meanwhile"
        return Outcome(Verdict.UNUSABLE, f"{others}: measure again on a quiet machine")
    ours, theirs = row.detail.get("non_finite", 0), row.detail.get("reference_non_finite", 0)
    if ours:
        whose = " of the reference" if row.method == row.reference else ""
        of = f" of {row.detail['scored']}" if "scored" in row.detail else ""
        return Outcome(Verdict.OUT_OF_BOUND, f"non-finite loss in {ours}{of} tokens{whose}")
    if theirs:
        text = f"the reference's own loss is non-finite in {theirs} tokens: nothing to compare with"
        return Outcome(Verdict.UNUSABLE, text)
    if row.value is not None and math.isfinite(row.value):
        return None
    verdict = Verdict.UNUSABLE if member.timed else Verdict.OUT_OF_BOUND
    return Outcome(verdict, f"{row.metric} is non-finite: {row.value}")


def _timing_within(row: Row, rule: Rule, tests: int) -> Outcome:
    ratio = log_ratio(row.detail)
    if ratio is None:
        return Outcome(Verdict.UNUSABLE, "the ratio to the reference has no interval: raise --repetitions")
    text = f"time {percent(ratio.value)} against {row.reference} ({percent(ratio.low)} to {percent(ratio.high)})"
    beyond = replace(ratio, value=ratio.value - rule.limit, low=ratio.low - rule.limit, high=ratio.high - rule.limit)
    half = percent(rules.smallest_time(beyond, 0.0, tests), sign="")
    if beyond.value > 0 and rules.p_time(beyond, 0.0) <= rules.level(tests):
        return Outcome(Verdict.OUT_OF_BOUND, f"{text}, bound {rule}", smallest=half)
    if ratio.high <= rule.limit:
        return Outcome(Verdict.WITHIN_BOUND, f"{text}, bound {rule}", smallest=half)
    return Outcome(Verdict.UNUSABLE, f"{text}: too wide to decide on the bound {rule}", smallest=half)


def against_record(question: Question, recorded: Recorded, now: float) -> Outcome:
    """Whether the figure is what was recorded."""
    row, exact, then = question.row, question.member.exact, recorded.value
    if obstacle := rules.obstacle(question):
        kind = "input changed since" if obstacle.verdict is Verdict.INPUT_CHANGED else "not comparable with"
        return Outcome(obstacle.verdict, f"{kind} {recorded.file}, {obstacle.text}")
    outcome = rules.outcome(question, then, now)
    both = f"{shown(now, row.unit)}, recorded {shown(then, row.unit)}"
    if outcome.ground == rules.NOT_FINITE:
        undecided = outcome.verdict is Verdict.UNUSABLE
        return replace(outcome, reason="a figure that is not finite has no change" if undecided else both)
    if outcome.ground == rules.FIGURE:
        seen = "1 B" if exact else shown(outcome.floor, row.unit)
        ending = f": {now - then:+,.0f}" if exact else f", allowance {seen}"
        text = "equal to the record" if outcome.verdict is Verdict.SAME else both + ending
        return replace(outcome, reason=text, smallest=seen)
    if outcome.ground == rules.RATIO:
        return _time(question, outcome)
    if outcome.ground == rules.EDITED_RECORD:
        text = f"the recorded {shown(then, row.unit)} does not follow from its own losses: restore {recorded.file}"
        return replace(outcome, reason=f"{text} from version control, or record again")
    if outcome.change is not None:
        return _losses(question, outcome, outcome.change)
    text = "every token's loss bit-identical to the record"
    if outcome.verdict in MOVED:
        text = (
            f"{both}, from losses bit-identical to the record: what is made of them changed "
            "(windows, weights or aggregate)"
        )
    return replace(outcome, reason=text)


def _time(question: Question, outcome: Outcome) -> Outcome:
    change, limit, row = outcome.change, outcome.floor, question.row
    if change is None:
        whose = "this run's" if rules.log_ratio(row.detail) is None else "the recorded"
        return replace(outcome, reason=f"{whose} ratio to the reference has no interval: raise --repetitions")
    text = f"ratio to {row.reference} {percent(change.value)} against the record "
    text += f"({percent(change.low)} to {percent(change.high)})"
    if row.detail.get("crowded") or question.before.detail.get("crowded"):
        text += ": taken beside other work"
    elif outcome.verdict is Verdict.UNUSABLE:
        text += f": too wide to see a change of {percent(limit)}"
    elif outcome.verdict in MOVED:
        text += f", limit {percent(limit)}"
    seen = percent(rules.smallest_time(change, limit, question.tests), sign="")
    return replace(outcome, reason=text, smallest=seen)


def _losses(question: Question, outcome: Outcome, change: Estimate) -> Outcome:
    room = question.room
    seen = percent(min(room, rules.smallest_loss(change, outcome.floor, question.tests)), sign="")
    text = f"{signed(change.value)} against the record ({change.low:+.3g} to {change.high:+.3g})"
    if outcome.rms is None:
        text += f" by the two values, which are exact on these tokens; {absent(question)}"
    if outcome.ground == rules.THIS_TEXT:
        text += f": beyond {percent(room)} on this very text, where it is exact"
    if outcome.ground == rules.TOKENS:
        text += f"; a token moved by {outcome.rms:.3g} nat (root mean square), noise up to {outcome.rms_limit:.3g}"
    return replace(outcome, reason=text + blame(question, outcome.verdict), smallest=seen)


def absent(question: Question) -> str:
    """Which losses are not there to pair, and what mends it."""
    recorded = f"{Path(getattr(question.before, 'file', '')).parent}/"
    for place, side in ((recorded, question.before), ("this run's ", question.row)):
        shas = [side.nll, *([side.detail.get("reference_nll", "")] if question.member.paired else [])]
        for sha in shas:
            if question.losses(sha) is None:
                return f"{place}nll/{sha[:BRIEF]}*.npz is {ABSENT}" if sha else "no losses were kept: record again"
    return "losses are not finite"


def blame(question: Question, verdict: Verdict | None) -> str:
    """Whether the unquantized reference moved too: then it was not the quantizer; '' where nothing can be said."""
    row = question.row
    if row.method == row.reference:
        itself = f"; the unquantized reference itself moved: it was no quantizer{movers(question)}"
        return itself if verdict in MOVED else ""
    reference = rules.loss_change(question, of_reference=True)
    if reference is None or rules.by_tokens(question, reference).verdict not in MOVED:
        return ""
    text = f"; the unquantized reference itself moved by {signed(reference.mean.value)}"
    own = rules.loss_change(question)
    if own is None or rules.by_tokens(question, own, reference).verdict in MOVED:
        return text
    return f"{text} and the loss against it did not: it was not the quantizer{movers(question)}"


def movers(question: Question) -> str:
    """What differs between the environments of record and row, and so may have moved the reference."""
    before, now = getattr(question.before, "environment", None), question.environment
    lines = difference(before, now) if isinstance(before, Environment) and now else []
    names = ", ".join(line.partition(":")[0] for line in lines)
    return f" (what differs: {names})" if names else ", and nothing that the environment records differs"


def shown(value: float, unit: str) -> str:
    """A value with its unit: '12,345,678 B (11.77 MiB)', '23.4 ms', '30.8852 ppl'."""
    if not math.isfinite(value):
        return f"{value} {unit}"
    if unit == "B":
        return f"{value:,.0f} B ({value / MIB:.2f} MiB)"
    if unit == "s":
        return f"{1e3 * value:.4g} ms"
    return f"{value:.6g} {unit}"


def signed(nats: float) -> str:
    """A change of a logarithm: '+0.00123 nat (+0.123%)'."""
    return f"{nats:+.3g} nat ({percent(nats)})"


def command(row: Row, *flags: str) -> str:
    """The command line that measures this one case again, with `flags`; it works in any repository."""
    limit = token_limit(row.protocol_id).removeprefix("first ")
    options = {
        "models": row.model,
        # beside another model's its own is planned
        "methods": row.method.partition("=")[0] if other_model(row.method) else row.method,
        "metrics": row.metric,
        "datasets": row.dataset,
        "protocols": row.protocol,
        "device": row.device,
        "reference": row.reference if row.reference != "fp32" else "",
        "max-tokens": limit if limit != "all" else "",
    }
    if row.case.family == "invariant":  # planned by their mark, on a layer and on the tiny models
        flags = ("-m", "invariant", *flags)
        options = {name: options[name] for name in ("methods", "device", "reference")}
    given = [word for name, value in options.items() if value for word in (f"--harness-{name}", listed([value]))]
    words = ["pytest", "--pyargs", "harness.cases", *flags, *given]
    if SELECTABLE.fullmatch(row.case.id):  # the reference is planned beside the method: leave its record alone
        words += ["-k", row.case.id]
    return shlex.join(words)


def message(row: Row, recorded: Recorded | None, environment: Environment) -> str:
    """A failure's report: the case, what was recorded and measured, how they differ, and the command to run."""
    lines = [("reason", row.reason)]
    if recorded is not None:
        when = f", recorded {recorded.recorded}" if recorded.recorded else ""
        times = f", {recorded.repeats} repetitions" if recorded.repeats > 1 else ""
        marked = ", out of its bound then" if recorded.detail.get(OUT_OF_BOUND) else ""
        lines.append(("baseline", f"{shown(recorded.value, row.unit)} ({recorded.file}{when}{times}{marked})"))
    if row.value is not None:
        lines.append(("measured", shown(row.value, row.unit)))
    change = row.detail.get("change")  # this and what follows as the judge left it in the row
    if isinstance(change, dict):
        value, low, high = (decode_number(change[name]) for name in ("value", "low", "high"))
        lines.append(("difference", f"{signed(value)}, 95% interval {low:+.3g} to {high:+.3g}"))
        if change.get("rms") is not None:
            rms, limit = decode_number(change["rms"]), decode_number(change["rms_limit"])
            lines.append(("tokens", f"moved by {rms:.3g} nat (root mean square), noise up to {limit:.3g}"))
    elif recorded is not None and row.value is not None:
        plain = row.value - recorded.value
        lines.append(("difference", f"{plain:+,.0f} B" if row.unit == "B" else f"{plain:+.6g} {row.unit}"))
    if row.detail.get("smallest"):
        lines.append(("could see", f"{row.detail['smallest']}: the smallest effect"))
    if row.detail.get("bound"):
        lines.append(("bound", str(row.detail["bound"])))
    if recorded is not None:
        changed = difference(recorded.environment, environment) or ["no difference to the record's"]
        lines += [("environment", changed[0]), *(("", text) for text in changed[1:])]
    if row.verdict in AGAIN:
        lines += [("measure", command(row)), ("record", command(row, "--regen-all"))]
    else:
        lines.append(("run", command(row)))
    return "\n".join([f"{row.verdict}: {row.case.id}", *(f"  {name:<{LABEL_WIDTH}}{text}" for name, text in lines)])
