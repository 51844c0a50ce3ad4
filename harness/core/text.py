"""Numbers as words, with the digits they deserve: for verdicts and reports alike. No torch.

Text from outside as plain text: what a terminal or a renderer would obey is shown by its code.
"""

from __future__ import annotations

import math
import re
import unicodedata

MIB = 2**20  # bytes; tables are in MiB and say so
NOTHING = "–"  # not planned, or not applicable
LARGEST = 700.0  # nats; exp of 710 is beyond a double


def number(value: float | None, digits: int = 4) -> str:
    """`digits` significant digits, never fewer than the whole part; huge and tiny as powers of ten."""
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("infinite" if value > 0 else "-infinite")
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if not -4 <= exponent < 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def perplexity(value: float | None) -> str:
    """Three decimals up to a thousand (libraries' noise starts at the fourth digit), five digits beyond."""
    plain = value is not None and math.isfinite(value) and 0 < value < 1000
    return f"{value:.3f}" if plain else number(value, 5)


def ratio(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """A ratio with its interval: '1.0123 [1.0098, 1.0149]'."""
    centre = _factor(value)
    if value is None or low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return centre
    return f"{centre} [{_factor(low)}, {_factor(high)}]"


def _factor(value: float | None) -> str:
    return f"{value:.4f}" if value is not None and 0.01 <= value < 10 else number(value)


def mib(value: float | None) -> str:
    """Bytes as MiB = 2^20, two decimals."""
    return number(value) if value is None or not math.isfinite(value) else f"{value / MIB:,.2f}"


def milliseconds(value: float | None) -> str:
    """Seconds as milliseconds, three significant digits."""
    return number(value if value is None else value * 1000, 3)


def exp(value: float | None) -> float | None:
    """E to the value; infinite where a double cannot hold it."""
    if value is None or math.isnan(value):
        return value
    return math.inf if value > LARGEST else math.exp(value)


def plural(count: int, noun: str) -> str:
    """'1 row', '2 rows'."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def percent(nats: float, sign: str = "+") -> str:
    """A change of a logarithm in percent, '+0.123%'; without its plus where `sign` is ''."""
    return f"{100 * math.expm1(min(nats, LARGEST)):{sign}.3g}%"


RISKY = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}  # control, format (bidi, zero width), private, surrogate, separators


def visible(text: str) -> str:
    r"""Replace what a terminal or a renderer would obey by its code: escapes as \x1b, overrides as \u202e."""
    if text.isascii() and text.isprintable():
        return text
    folded = re.sub(r"\r\n|[\n\r\t]", " ", text)
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in RISKY else char for char in folded
    )
