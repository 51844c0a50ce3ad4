"""Values as strict JSON: numbers that it has no digits for, digests of canonical text, and files of strangers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

CHECK = "check"  # the key of a digest beside what it was made of


def parse_json(text: str | bytes) -> Any:
    """`json.loads` for files that a stranger may have written: nesting beyond reason is a ValueError too."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def encode(value: Any) -> Any:
    """Make a value strict JSON: non-finite floats as 'nan', 'inf', '-inf'; tuples as lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return value


def decode_number(value: Any) -> Any:
    """Undo `encode` for one number."""
    return float(value) if isinstance(value, str) and value in {"nan", "inf", "-inf"} else value


def sha256_text(text: str | bytes) -> str:
    """16 hex digits of a text's sha256."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:16]


def digest(value: Any) -> str:
    """sha256 (hex) of a JSON value in canonical form."""
    text = json.dumps(encode(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def checksum(value: Any) -> str:
    """16 hex digits for what a file of JSON or YAML says, however it is laid out; '' where it is nested too deep."""
    try:
        return sha256_text(json.dumps(encode(value), sort_keys=True, separators=(",", ":"), default=str))
    except RecursionError:
        return ""


def sealed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts with a digest of themselves, by which whoever reads them knows that nothing changed since."""
    return {**unsealed(facts), CHECK: checksum(unsealed(facts))}


def broken(facts: Mapping[str, Any]) -> bool:
    """Whether facts carry a digest and are no longer those that it was made of; older files carry none."""
    return CHECK in facts and facts[CHECK] != checksum(unsealed(facts))


def unsealed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts alone."""
    return {key: value for key, value in facts.items() if key != CHECK}


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested mapping as dotted names and text, for a table or a difference."""
    flat: dict[str, str] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            flat |= flatten(item, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = ", ".join(map(str, item)) if isinstance(item, (list, tuple)) else str(item)
    return flat
