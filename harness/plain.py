"""Text of strangers as plain text: what a terminal or a renderer would obey is shown by its code."""

from __future__ import annotations

import re
import unicodedata

RISKY = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}  # control, format (bidi, zero width), private, surrogate, separators


def visible(text: str) -> str:
    r"""Replace what a terminal or a renderer would obey by its code: escapes as \x1b, overrides as \u202e."""
    if text.isascii() and text.isprintable():
        return text
    folded = re.sub(r"\r\n|[\n\r\t]", " ", text)
    return "".join(_code_point(char) if unicodedata.category(char) in RISKY else char for char in folded)


def _code_point(char: str) -> str:
    number = ord(char)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
