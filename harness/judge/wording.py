"""How a judged figure is said: values with their unit, the command that measures a case again, a failure's report."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence

from harness.core.environment import Environment, difference
from harness.core.records import Row, Verdict
from harness.core.text import MIB, percent
from harness.core.values import decode_number
from harness.judge.recorded import Recorded

LABEL_WIDTH = 12  # of a failure's report
SELECTABLE = re.compile(r"[\w:+./-]+")  # what pytest's -k reads as one word


def token_limit(protocol_id: str) -> str:
    """'all', or 'first 4096': how much of the text a protocol id says was read."""
    found = re.search(r"\btokens: (?:the )?(first \d+)", protocol_id)
    return found[1] if found else "all"


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
        "methods": row.method,
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
    given = [word for name, value in options.items() if value for word in (f"--harness-{name}", value)]
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
        lines.append(("baseline", f"{shown(recorded.value, row.unit)} ({recorded.file}{when}{times})"))
    if row.value is not None:
        lines.append(("measured", shown(row.value, row.unit)))
    lines += _difference(row, recorded)
    if recorded is not None:
        changed = difference(recorded.environment, environment)
        lines += _block("environment", changed or ["no difference to the record's"])
    if row.verdict in (Verdict.WORSE, Verdict.UNRECORDED, Verdict.NOT_COMPARABLE):
        lines += [("measure", command(row)), ("record", command(row, "--regen-all"))]
    else:
        lines.append(("run", command(row)))
    return "\n".join([f"{row.verdict}: {row.case.id}", *(f"  {name:<{LABEL_WIDTH}}{text}" for name, text in lines)])


def _block(name: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    return [(name if first == 0 else "", text) for first, text in enumerate(texts)]


def _difference(row: Row, recorded: Recorded | None) -> list[tuple[str, str]]:
    """The judged change with its interval and floor, and the bound, as the judge left them in the row."""
    lines = []
    change = row.detail.get("change")
    if isinstance(change, dict):
        value, low, high = (decode_number(change[name]) for name in ("value", "low", "high"))
        lines.append(("difference", f"{signed(value)}, 95% interval {low:+.3g} to {high:+.3g}"))
        lines.append(("floor", f"{decode_number(change['floor']):.3g} nat"))
    elif recorded is not None and row.value is not None:
        plain = row.value - recorded.value
        lines.append(("difference", f"{plain:+,.0f} B" if row.unit == "B" else f"{plain:+.6g} {row.unit}"))
    if row.detail.get("smallest"):
        lines.append(("could see", f"{row.detail['smallest']}: the smallest effect"))
    if row.detail.get("bound"):
        lines.append(("bound", str(row.detail["bound"])))
    return lines
