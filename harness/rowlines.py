"""What a line of measurements.jsonl must hold to be a row, and what it shares with the lines before it."""

from __future__ import annotations

import sys
from typing import Any

from harness.jsonvalues import decode_number

# fields whose few values stand in many rows
REPEATED = tuple(
    "model method metric device reference dataset protocol revision method_id protocol_id token_hash unit baseline "
    "environment reason".split()
)
TEXT, NONE = frozenset({str}), type(None)
KINDS: dict[str, frozenset[type]] = {  # of a row's fields in JSON; every other is text
    **dict.fromkeys(("value", "spread", "bits_per_weight"), frozenset({float, int, NONE})),
    **dict.fromkeys(("verdict_reference", "verdict_baseline"), frozenset({str, NONE})),
    **dict.fromkeys(("detail", "census"), frozenset({dict})),
    **dict.fromkeys(("count", "schema"), frozenset({int})),
    "seconds": frozenset({float, int}),
    "interval": frozenset({NONE}),
    "samples": frozenset(),
}
NUMBERS = frozenset({int, float})
LISTS = frozenset({"interval", "samples"})
MOST_KINDS = 1_000  # remembered; a session's rows have some ten
_sound_kinds: set[tuple[Any, ...]] = set()
NEEDED = frozenset({"model", "method", "metric", "device", "reference", "verdict"})


def require_types(data: dict[str, Any]) -> None:
    """ValueError with the first field of a row that is not what it should be: the line may be a stranger's."""
    if not data.keys() >= NEEDED:
        raise ValueError(f"it has no '{min(NEEDED - data.keys())}'")
    kinds = (*data, *map(type, data.values()))
    known = kinds in _sound_kinds  # the same fields of the same kinds were looked at: the lists are left
    plain = True
    for name in LISTS & data.keys() if known else data:
        if type(value := data[name]) not in KINDS.get(name, TEXT):
            if not _lists_or_words(name, value):
                raise ValueError(f"its '{name}' is no such thing as a {name}")
            plain &= name in LISTS
    if plain and not known and len(_sound_kinds) < MOST_KINDS:
        _sound_kinds.add(kinds)


def _lists_or_words(name: str, value: Any) -> bool:
    """Whether a field holds a list of numbers, or a number that JSON has no digits for."""
    if name in LISTS:
        numbers = type(value) is list and (NUMBERS.issuperset(map(type, value)) or all(map(_is_number, value)))
        return numbers and (name == "samples" or len(value) == 2)
    return float in KINDS.get(name, TEXT) and isinstance(decode_number(value), float)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) or isinstance(decode_number(value), float)


class Censuses:
    """The censuses of lines read so far: a group's rows hold one each, and it is most of their bytes."""

    def __init__(self) -> None:
        self.known: dict[tuple[Any, Any], Any] = {}  # the last one of each model under a method

    def share(self, data: dict[str, Any]) -> None:
        """Let a row's fields be the very objects of rows before it where they are equal."""
        intern = sys.intern
        for name in REPEATED:
            if value := data.get(name):
                data[name] = intern(value)
        if census := data.get("census"):
            place = (data.get("model"), data.get("method_id"))
            known = self.known.get(place)
            if known is census or known == census:
                data["census"] = known
            else:
                self.known[place] = census
