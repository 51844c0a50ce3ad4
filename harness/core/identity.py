"""What a measured model is, beside its name: weights, config, tokenizer, code, adapter. No torch.

An identity is a flat mapping of fact to text, in canonical form: what changes the computation and nothing else. A row
and a record name it by its digest; the facts themselves stand once in a report's identities.json and in
baselines/<model>/identities.yaml, so that a change is named fact by fact.

A value that the model's architecture takes by itself where none is stated ends in `DEFAULT`. It is shown, and does not
count: a config.json that was written anew with every default in it is the same input.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from harness.core.contracts import Checkpoint
from harness.core.values import digest

ABSENT = "absent"
DEFAULT = " (default)"
HASH = re.compile("[0-9a-f]{64}")
BRIEF = 12  # digits of a hash that tell it from another in a line


def identity_digest(facts: Mapping[str, str]) -> str:
    """64 hex digits for the facts, in whatever order they are given; defaults left out."""
    return digest({name: value for name, value in facts.items() if not value.endswith(DEFAULT)})


def identity_of(checkpoint: Checkpoint) -> str:
    """The digest of a checkpoint's facts; of its weights' revision where nobody looked at more."""
    return identity_digest(checkpoint.identity or {"weights": checkpoint.revision})


def changed_facts(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """One line a fact that differs: 'config.rope_theta: 10000 -> 11000', in order of their names.

    None where both sides compute alike: a default that one states and the other does not is no difference.
    """
    lines = []
    for name in sorted(before.keys() | now.keys()):
        values = before.get(name, ABSENT + DEFAULT), now.get(name, ABSENT + DEFAULT)
        old, new = (value.removesuffix(DEFAULT) for value in values)
        if old != new and not all(value.endswith(DEFAULT) for value in values):
            lines.append(f"{name}: {_brief(old)} -> {_brief(new)}")
    return lines


def _brief(value: str) -> str:
    return value[:BRIEF] if HASH.fullmatch(value) else value
