"""Ratios of times: to the reference, and to the unquantized model in the dtype in which a method itself runs.

On a card methods run in fp16 beside a reference in fp32, so that a ratio of their times holds dtype and quantization
together. Where the unquantized model was timed in that dtype too, the ratio to it is the quotient of both ratios to the
reference: ln(a / b) = ln(a / r) - ln(b / r), with r timed beside each in interleaved blocks of its own process. The
interval joins theirs by the square root of the sum of squares (MOVER: Zou and Donner 2008), the two being independent.
"""

from __future__ import annotations

import math
import re

from harness.core.records import Row
from harness.core.text import NOTHING, exp, ratio
from harness.core.values import decode_number
from harness.report.markup import code, escape
from harness.report.matrix import Section, Text

DTYPE = re.compile(r":dtype=(\w+)")  # as a method id writes it


def detail(row: Row | None, name: str) -> float | None:
    """A number of a row's detail, None where there is none."""
    value = decode_number(row.detail.get(name)) if row is not None else None
    return float(value) if isinstance(value, (int, float)) else None


def to_reference(row: Row | None) -> str:
    """Time over the reference's, with its interval; for the reference itself its A/A comparison."""
    found = _shown(_logs(row))
    if row is None or row.method != row.reference or row.value is None:
        return found
    return "1" if found == NOTHING else f"A/A {found}"


def to_plain(row: Row | None, plain: Row | None) -> str:
    """Time over that of the unquantized model in the same dtype, from both ratios to the reference."""
    if row is None or plain is None or row.value is None or dtype(row) != dtype(plain):
        return NOTHING
    if row.method == plain.method:
        return "1"
    ours, theirs = _logs(row), _logs(plain)
    if ours is None or theirs is None:
        return NOTHING
    value = ours[0] - theirs[0]
    below = math.hypot(ours[0] - ours[1], theirs[2] - theirs[0])
    above = math.hypot(ours[2] - ours[0], theirs[0] - theirs[1])
    return _shown((value, value - below, value + above))


def dtype(row: Row | None) -> str:
    """The dtype in which a row's method ran, '' where it does not say."""
    found = DTYPE.search(row.method_id) if row is not None else None
    return found[1] if found else ""


def mixed(section: Section, metric: str, text: Text) -> list[str]:
    """The dtypes, other than the reference's, in which methods ran that are more than a cast to it."""
    rows = [row for method in section.methods if (row := section.row(method, metric, text))]
    ids = (str(row.detail.get("reference_id", "")) for row in rows)
    told = next((found[1] for name in ids if (found := DTYPE.search(name))), section.reference)
    reference = dtype(section.row(section.reference, metric, text)) or told
    return list(dict.fromkeys(name for row in rows if (name := dtype(row)) not in ("", reference, row.method)))


def plains(section: Section, metric: str, text: Text) -> list[str]:
    """Of those dtypes the ones in which the unquantized model was timed too."""
    return [name for name in mixed(section, metric, text) if _logs(section.row(name, metric, text))]


def heading(section: Section, metric: str, text: Text) -> str:
    """Of the column of ratios: the reference by its name where methods ran in another dtype."""
    return f"ratio to {escape(section.reference) if mixed(section, metric, text) else 'reference'} [95%]"


def note(section: Section, metric: str, text: Text) -> str:
    """What a reader must know of ratios across dtypes; '' where there are none."""
    names, there = mixed(section, metric, text), plains(section, metric, text)
    if not names:
        return ""
    reference, absent = code(section.reference), [code(name) for name in names if name not in there]
    told = [f"Methods ran in {' and '.join(names)}: the ratio to {reference} is of dtype and quantization together."]
    if there:
        told.append(
            f"The ratio to {' and to '.join(map(code, there))} is of quantization alone: the quotient of two ratios to "
            f"{reference}, each timed in a process of its own; its interval joins theirs."
        )
    if absent:
        told.append(f"Measure {' and '.join(absent)} too for a ratio within one dtype.")
    return " ".join(told)


def _logs(row: Row | None) -> tuple[float, float, float] | None:
    """The log of a row's time over the reference's with its interval, infinite where that is not usable."""
    value, low, high = (detail(row, name) for name in ("log_ratio", "log_ratio_low", "log_ratio_high"))
    if row is None or value is None or not math.isfinite(value):
        return None
    if low is None or high is None or row.detail.get("log_ratio_usable") is False:
        return value, -math.inf, math.inf
    return value, low, high


def _shown(found: tuple[float, float, float] | None) -> str:
    return ratio(*map(exp, found or (None, None, None)))
