"""Under what the figures of a report were taken: environments, texts and their protocols, weights, how time was taken.

A fact that every row shares is told once, in a line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from harness.core.environment import Environment
from harness.core.records import Row
from harness.core.text import NOTHING, plural
from harness.core.values import flatten
from harness.report.account import SPEED, grouped, kind
from harness.report.markup import code, escape, table

BRIEF = 12  # characters of a hash that tell it from another in a line; the whole of it is in measurements.jsonl
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
    known = dict.fromkeys((row.model, row.revision, row.identity) for row in rows if row.revision)
    return [
        f"Weights of {code(model)}: {code(revision)}" + (f", identity {code(identity[:BRIEF])}" if identity else "")
        for model, revision, identity in known
    ]


def timing(rows: Iterable[Row]) -> list[str]:
    """How times were taken: prompt, tokens behind it, batch, blocks, threads and how they wait; [] where none was."""
    timed = [row for row in rows if kind(row.case) == SPEED and row.value is not None]
    if not timed:
        return []
    works: dict[str, None] = {}
    for row in timed:
        prompt, new = (row.detail.get(name) for name in ("prompt_tokens", "new_tokens"))
        if isinstance(prompt, int):
            behind = f", {plural(new, 'token')} behind it" if isinstance(new, int) and new else ""
            works[f"{code(row.metric)} a prompt of {plural(prompt, 'token')}{behind}"] = None
    batches = dict.fromkeys(escape(str(row.detail.get("batch", 1))) for row in timed)
    blocks = [row.detail["blocks"] for row in timed if isinstance(row.detail.get("blocks"), int)] or [
        row.count for row in timed
    ]
    span = f"{min(blocks)}" if min(blocks) == max(blocks) else f"{min(blocks)} to {max(blocks)}"
    told = [*works, f"batch {', '.join(batches)}", f"{span} blocks in turn with the reference"]
    if threads := dict.fromkeys(escape(str(row.detail["threads"])) for row in timed if row.detail.get("threads")):
        told.append(f"{', '.join(threads)} threads")
        policies = dict.fromkeys(str(row.detail.get("wait_policy", "")) for row in timed)
        told[-1] += ", which " + " or ".join(WAITING.get(policy.lower(), escape(policy)) for policy in policies)
    return [f"Times: {'; '.join(told)}"]
