"""Text that is safe in markdown, HTML and a terminal alike, in lines, spans and tables."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from tabulate import tabulate

from harness.core.text import visible

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


def bullets(head: str, lines: Iterable[str]) -> str:
    """A sentence with a list below it; both are markdown already."""
    return f"{head}\n\n" + "\n".join(f"- {line}" for line in lines)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], *, words: Collection[int] = (0, -1)) -> str:
    """An aligned table; columns in `words` read from the left, the others are figures. Cells are markdown already."""
    left = {index % len(headers) for index in words}
    align = tuple("left" if index in left else "right" for index in range(len(headers)))
    # 'pipe' is the code hosts' format with the alignment of columns written into its rule
    return tabulate(rows, headers, tablefmt="pipe", colalign=align, disable_numparse=True)
