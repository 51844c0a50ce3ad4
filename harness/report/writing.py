"""Text that is safe in markdown, HTML and a terminal alike, and numbers with the digits they deserve."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence

from tabulate import tabulate

from harness.plain import visible

MIB = 2**20  # bytes; tables are in MiB and say so
NOTHING = "–"  # not planned, or not applicable
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .:=@,+/_*()-]*")  # harmless inside a code span: no pipe, backtick, HTML
SPECIAL = re.compile(r"[\\`*|\[\]~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")  # markdown, tables, math; x_y stays as it is
ENTITY = re.compile(r"&(?=#?\w+;)")


def escape(text: str) -> str:
    """Free text as one line of markdown that renders as itself, in a table cell too."""
    text = SPECIAL.sub(r"\\\g<0>", visible(text).strip())
    text = ENTITY.sub("&amp;", text).replace("<", "&lt;")
    return re.sub(r"^(?=[>#+=-])", r"\\", text)  # never a quote, heading, list or rule


def code(text: str) -> str:
    """A name: a code span where that is harmless, else escaped text."""
    return f"`{text}`" if PLAIN.fullmatch(text) and text == text.strip() else escape(text)


def code_block(text: str) -> str:
    """A command as an indented code block; indentation cannot be closed by what it holds."""
    return "\n".join("    " + visible(line) for line in text.splitlines())


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, words: Collection[int] = (0, -1)) -> str:
    """An aligned table; columns in `words` read from the left, the others are figures. Cells are markdown already."""
    left = {index % len(headers) for index in words}
    align = tuple("left" if index in left else "right" for index in range(len(headers)))
    # 'pipe' is the code hosts' format with the alignment of columns written into its rule
    return tabulate(rows, headers, tablefmt="pipe", colalign=align, disable_numparse=True)


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
    return math.inf if value > 700 else math.exp(value)  # exp(709.8) overflows a double


def plural(count: int, noun: str) -> str:
    """'1 row', '2 rows'."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
