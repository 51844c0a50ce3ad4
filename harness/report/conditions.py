"""Under what the figures of a report were taken: environments, texts and their protocols, weights, how time was taken.

A fact that every row shares is told once, in a line. Of one measured case everything that is known is told in groups of
names and values, in plain words.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from harness.core.environment import Environment
from harness.core.records import Case, Row
from harness.core.specification import other_model
from harness.core.text import NOTHING, exp, milliseconds, number, plural, ratio
from harness.core.values import flatten
from harness.judge.verdicts import shown
from harness.report.account import LEFT, MISSING, SPEED, change, grouped, kind
from harness.report.markup import code, escape, table
from harness.report.tables import detail, interval, time_ratio

BRIEF = 12  # characters of a hash that tell it from another in a line; the whole of it is in measurements.jsonl
LONG = 400  # characters of one value; measurements.jsonl has the rest
TOLD = frozenset({"change", "bound", "floor", "smallest", "model_note"})  # of a row's detail: they have their own words
Facts = Mapping[str, str]
WAITING = {  # OMP_WAIT_POLICY -> what threads do between operations
    "": "wait as a plain script's do (OMP_WAIT_POLICY is not set)",
    "passive": "sleep between operations (OMP_WAIT_POLICY=passive)",
    "active": "spin between operations (OMP_WAIT_POLICY=active)",
}


def conditions(
    rows: Sequence[Row], known: Mapping[str, Mapping[str, Any]], *, clashes_only: bool = False
) -> tuple[str, ...]:
    """Markdown: a list of environments, protocols, weights and how time was taken; then where environments differ.

    Args:
        rows: complete.
        known: environments by id.
        clashes_only: name only those texts of which one name stands for two token plans.
    """
    used = Counter(row.environment for row in rows if row.value is not None and row.environment)
    worlds = {name: flatten(known[name]) for name in used if name in known}
    lines = [f"{code(name)} is not in environments.json." for name in used if name not in known]
    lines += [*shared(worlds, used), *protocols(rows, clashes_only=clashes_only), *weights(rows), *timing(rows)]
    return "\n".join(f"- {line}" for line in lines), differing(worlds)


def names_of(worlds: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Every field that some environment has, in the order of `Environment`."""
    order = [item.name for item in fields(Environment)]  # a file's keys come back sorted: the same order always
    there = {name for world in worlds.values() for name in world}
    return [name for name in order if name in there] + sorted(there.difference(order))


def alike(name: str, worlds: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether a field has one value in all of them."""
    return len({world.get(name, "") for world in worlds.values()}) == 1


def shared(worlds: Mapping[str, Mapping[str, str]], used: Mapping[str, int]) -> list[str]:
    """One line of what every environment has in common; [] without any."""
    if not worlds:
        return []
    first = next(iter(worlds.values()))
    names = [name for name in names_of(worlds) if first.get(name) and alike(name, worlds)]
    facts = ", ".join(f"{escape(name)} {escape(first[name])}" for name in names)
    told = ", ".join(f"{code(name)} ({plural(used[name], 'row')})" for name in worlds)
    return [f"Environment{'s' * (len(worlds) > 1)} {told}" + (f": {facts}" if facts else "")]


def differing(worlds: Mapping[str, Mapping[str, str]]) -> str:
    """The fields that are not the same everywhere, side by side; '' where all are."""
    names = [name for name in names_of(worlds) if not alike(name, worlds)]
    lines = [[escape(name), *(escape(of.get(name, "")) or NOTHING for of in worlds.values())] for name in names]
    return table(["differs", *map(code, worlds)], lines, words=range(len(worlds) + 1)) if lines else ""


def protocols(rows: Sequence[Row], *, clashes_only: bool = False) -> list[str]:
    """Protocol ids and token hashes; two under one short name are said to be two (and, if asked, no other is said)."""
    read = [row for row in rows if row.protocol_id or row.token_hash]
    texts = grouped(read, lambda row: (row.model, row.dataset, row.protocol))
    groups = {place: grouped(own, lambda row: (row.protocol_id, row.token_hash)) for place, own in texts.items()}
    lines = []
    if clashes_only and (left := sum(len(found) == 1 for found in groups.values())):
        told = "ids and token hashes in measurements.jsonl."
        lines.append(f"{plural(left, 'text')} of a model under a protocol: {told}")
        groups = {place: found for place, found in groups.items() if len(found) > 1}
    for (model, dataset, protocol), found in groups.items():
        name = f"{code(dataset)} under {code(protocol)} for {code(model)}"
        if len(found) > 1:
            lines.append(f"**{name} stands for {len(found)} different token plans, which do not compare:**")
        for (protocol_id, token_hash), served in found.items():
            tokens = next((row.detail["tokens"] for row in served if isinstance(row.detail.get("tokens"), int)), None)
            count = f", {plural(tokens, 'token')}" if tokens is not None else ""
            lines.append(f"{name}: {escape(protocol_id)}; token ids sha256 {code(token_hash)}{count}")
    return lines


def weights(rows: Iterable[Row]) -> list[str]:
    """The weights of each model, by commit or content, and its identity where it is known."""
    named = ((other_model(row.method) or row.model, row.revision, row.identity) for row in rows if row.revision)
    return [
        f"Weights of {code(model)}: {code(revision)}" + (f", identity {code(identity[:BRIEF])}" if identity else "")
        for model, revision, identity in dict.fromkeys(named)
    ]


def timed_work(row: Row) -> str:
    """What was timed: 'a prompt of 128 tokens, 1 token behind it, batch 4'; '' where the row does not say."""
    prompt, new, batch = (row.detail.get(name) for name in ("prompt_tokens", "new_tokens", "batch"))
    if not isinstance(prompt, int):
        return ""
    behind = f", {plural(new, 'token')} behind it" if isinstance(new, int) and new else ""
    return f"a prompt of {plural(prompt, 'token')}{behind}, batch {batch if isinstance(batch, int) else 1}"


def timing(rows: Iterable[Row]) -> list[str]:
    """How times were taken: each one's work, then blocks, threads and how they wait; [] where none was taken."""
    timed = [row for row in rows if kind(row.case) == SPEED and row.value is not None]
    if not timed:
        return []
    works = dict.fromkeys(f"{code(row.metric)} {work}" for row in timed if (work := timed_work(row)))
    blocks = [row.detail["blocks"] for row in timed if isinstance(row.detail.get("blocks"), int)] or [
        row.count for row in timed
    ]
    span = f"{min(blocks)}" if min(blocks) == max(blocks) else f"{min(blocks)} to {max(blocks)}"
    told = [*works, f"{span} blocks in turn with the reference"]
    if threads := dict.fromkeys(escape(str(row.detail["threads"])) for row in timed if row.detail.get("threads")):
        told.append(f"{', '.join(threads)} threads")
        policies = dict.fromkeys(str(row.detail.get("wait_policy", "")) for row in timed)
        told[-1] += ", which " + " or ".join(WAITING.get(policy.lower(), escape(policy)) for policy in policies)
    return [f"Times: {'; '.join(told)}"]


def where(case: Case) -> str:
    """Where a figure stands, in plain words: model, method, text, metric."""
    return ", ".join(filter(None, (case.model, case.method, case.dataset, case.protocol, case.metric)))


def figure(row: Row) -> str:
    """A case's figure in one line: of a time its ratio, since its milliseconds compare with nothing."""
    if row.value is None:
        return LEFT if row.left_out else MISSING
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
        parts += [f"batch {known['batch']}"] if known.get("batch") else []
        parts += [plural(known.get("blocks", row.count), "block") + " of method and reference in turn"]
        parts += [plural(known["threads"], "thread")] if known.get("threads") else []
        parts += [f"waiting threads are {known['wait_policy']}"] if known.get("wait_policy") else []
        return ", ".join(map(str, parts))
    return f"{row.dataset}, {row.protocol}: {row.protocol_id}" if row.dataset and row.protocol_id else ""
