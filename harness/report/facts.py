"""Everything that is known of a measured case, in words: groups of names and values for the HTML report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from harness.core.records import Case, Row
from harness.core.text import NOTHING, exp, milliseconds, number, plural, ratio
from harness.core.values import flatten
from harness.judge.verdicts import shown
from harness.report.account import change
from harness.report.tables import MISSING, detail, interval, time_ratio

LONG = 400  # characters of one value; measurements.jsonl has the rest
TOLD = frozenset({"change", "bound", "floor", "smallest", "model_note"})  # of a row's detail: they have their own words
Facts = Mapping[str, str]


def where(case: Case) -> str:
    """Where a figure stands, in plain words: model, method, text, metric."""
    return ", ".join(filter(None, (case.model, case.method, case.dataset, case.protocol, case.metric)))


def figure(row: Row) -> str:
    """A case's figure in one line: of a time its ratio, since its milliseconds compare with nothing."""
    if row.value is None:
        return MISSING
    if found := time_ratio(row):
        low, high = (exp(end) if math.isfinite(end) else None for end in (found.low, found.high))
        return f"× {ratio(exp(found.value), low, high)} of the reference's time"
    low, high = interval(row)
    return shown(row.value, row.unit) + ("" if low is None else f" [{number(low)}, {number(high)}]")


def facts_of(row: Row, environments: Mapping[str, Mapping[str, Any]]) -> dict[str, Facts]:
    """Groups of facts by their heading; what is not known is left out."""
    more = flatten({name: value for name, value in row.detail.items() if name not in TOLD})
    if row.samples:
        more["samples"] = ", ".join(f"{sample:.6g}" for sample in row.samples)
    groups = {
        "Verdict": _verdict(row),
        "Figure": _figure(row) if row.value is not None else {},
        "Text and tokens": {
            "text": row.dataset,
            "protocol": row.protocol,
            "read as": row.protocol_id,
            "token ids, sha256": row.token_hash,
            "losses, sha256": row.nll,
        },
        "Model and method": {
            "model": row.model,
            "note": str(row.detail.get("model_note", "")),
            "revision": row.revision,
            "identity": row.identity,
            "method": row.method_id or row.method,
            "reference": row.reference,
            "device": row.device,
        },
        "As measured": more,
        "What was quantized": flatten(row.census),
        f"Environment {row.environment}".strip(): flatten(environments.get(row.environment, {})),
    }
    known = {head: {name: cut(value) for name, value in own.items() if value} for head, own in groups.items()}
    return {head: own for head, own in known.items() if own}


def _verdict(row: Row) -> Facts:
    return {
        "against the reference": str(row.verdict_reference or ""),
        "against the record": str(row.verdict_baseline or ""),
        "bound": str(row.detail.get("bound", "")),
        "change against the record [95%]": change(row).replace(NOTHING, ""),
        "smallest effect that could be seen": str(row.detail.get("smallest", "")),
        "looked up in": row.baseline,
    }


def _figure(row: Row) -> Facts:
    beside, value = detail(row, "reference_p50"), row.value if row.value is not None else math.nan
    name = "median (of its own moment: compare the ratio)" if row.case.family == "latency" else "value"
    return {
        name: shown(value, row.unit),
        "the reference's median, timed in turn with it": "" if beside is None else f"{milliseconds(beside)} ms",
        "95% interval": "" if row.interval is None else f"{number(row.interval[0])} to {number(row.interval[1])}",
        "spread": "" if row.spread is None else shown(row.spread, row.unit),
        "observations": f"{row.count:,}",
        "bits per weight": "" if row.bits_per_weight is None else number(row.bits_per_weight),
        "seconds to measure": number(row.seconds, 3),
    }


def cut(value: str) -> str:
    """A value that fits a page."""
    if len(value) <= LONG:
        return value
    return f"{value[:LONG]} … ({plural(len(value), 'character')}, whole in measurements.jsonl)"


def protocol_of(row: Row) -> str:
    """How a text was read, or a time taken; '' where a figure needs neither."""
    if row.case.family == "latency" and row.value is not None:
        known = row.detail
        parts = [row.metric]
        parts += [f"prompt of {plural(known['prompt_tokens'], 'token')}"] if known.get("prompt_tokens") else []
        parts += [f"{plural(known['new_tokens'], 'token')} behind it"] if known.get("new_tokens") else []
        parts += [plural(known.get("blocks", row.count), "block") + " of method and reference in turn"]
        parts += [plural(known["threads"], "thread")] if known.get("threads") else []
        parts += [f"waiting threads are {known['wait_policy']}"] if known.get("wait_policy") else []
        return ", ".join(map(str, parts))
    return f"{row.dataset}, {row.protocol}: {row.protocol_id}" if row.dataset and row.protocol_id else ""
