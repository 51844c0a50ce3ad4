"""How each kind of dataset reaches each protocol: which documents, how they are joined. One table, `LAYOUTS`.

An over-long text is cut by the protocol (`--max-tokens`, windows); a text of which nothing can be scored is
`TextTooShort`, except that under `sentence` single documents may be empty or hold one token: they are counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

JOINED = frozenset({"chunk", "stride", "gptq", "half"})  # protocols that read one running text


@dataclass(frozen=True)
class Reading:
    """What one protocol reads of a dataset.

    texts: tokenized one by one. originals: of the same length, the texts whose words and bytes normalise a figure.
    how: the words that stand in the protocol id.
    """

    texts: tuple[str, ...]
    originals: tuple[str, ...]
    how: str


@dataclass(frozen=True)
class Layout:
    """The three ways to read a dataset's documents: as one running text, page by page, sentence by sentence."""

    joined: Callable[[Sequence[str]], Reading]
    rolling: Callable[[Sequence[str]], Reading]
    sentence: Callable[[Sequence[str]], Reading]

    def read(self, documents: Sequence[str], protocol_name: str) -> Reading:
        """The reading for a protocol's name."""
        way = "joined" if protocol_name in JOINED else protocol_name
        reading: Reading = {"joined": self.joined, "rolling": self.rolling, "sentence": self.sentence}[way](documents)
        return reading


def join(separator: str, what: str) -> Callable[[Sequence[str]], Reading]:
    """One text: the documents with a separator between them."""

    def read(documents: Sequence[str]) -> Reading:
        text = separator.join(documents)
        return Reading((text,), (text,), f"{what} joined by {separator!r}")

    return read


def whole(documents: Sequence[str]) -> Reading:
    """The file as it is."""
    return Reading(tuple(documents), tuple(documents), "the file as it is")


def each(what: str) -> Callable[[Sequence[str]], Reading]:
    """Every document by itself, without its line end."""

    def read(documents: Sequence[str]) -> Reading:
        texts = tuple(document.removesuffix("\n") for document in documents)
        return Reading(texts, texts, f"each {what} by itself")

    return read


def file_lines(documents: Sequence[str]) -> Reading:
    """Every line of a file by itself; only line feeds end a line, and the last need not."""
    lines = tuple("".join(documents).removesuffix("\n").split("\n"))
    return Reading(lines, lines, "each line by itself")


TITLE = re.compile(r"\s*= (?!= ).*(?<! =) =\s*")  # ' = Title = ', not the ' = = Section = = ' of a part


def wikitext_pages(rows: Sequence[str]) -> tuple[str, ...]:
    """The pages of WikiText, cut before each title line (62 in WikiText-2's test split).

    The Hub stores a blank line, which is one space in the original file, as an empty row: the space is put back.
    Lines before the first title, if blank, are no page.
    """
    pages: list[list[str]] = [[]]
    for row in rows:
        line = row.removesuffix("\n") or " "
        if TITLE.fullmatch(line):
            pages.append([])
        pages[-1].append(line)
    pages[-1].append("")  # the file's last line ends like every other
    return tuple("\n".join(page) for page in pages if "".join(page).strip())


# What lm-evaluation-harness undoes of WikiText's tokenization, in its order: literal pairs, then what stands in pairs
# of brackets or quotes loses the blanks at its ends, then literal pairs again.
BEFORE_PAIRS = (
    ("s '", "s'"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
PAIRS = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))
AFTER_PAIRS = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenize_wikitext(page: str) -> str:
    """A WikiText page as running text, by the rules of lm-evaluation-harness's wikitext task.

    Its rule for "' 5" is left out: it is written with slashes inside the pattern and matches nothing.
    """
    for tokenized, plain in BEFORE_PAIRS:
        page = page.replace(tokenized, plain)
    for opening, closing in PAIRS:
        first, last = re.escape(opening), re.escape(closing)
        page = re.sub(rf"{first}\s*([^{last}]*?)\s*{last}", rf"{opening}\1{closing}", page)
    for tokenized, plain in AFTER_PAIRS:
        page = page.replace(tokenized, plain)
    return page


def detokenized_pages(rows: Sequence[str]) -> Reading:
    """WikiText's pages as lm-evaluation-harness reads them; words and bytes are counted in the original page."""
    pages = wikitext_pages(rows)
    return Reading(tuple(map(detokenize_wikitext, pages)), pages, "each page by itself, detokenized")


LAYOUTS: Mapping[str, Layout] = {
    "file": Layout(joined=whole, rolling=whole, sentence=file_lines),
    "lines": Layout(joined=join("\n", "lines"), rolling=join("\n", "lines"), sentence=each("line")),
    "wikitext": Layout(joined=join("\n\n", "rows"), rolling=detokenized_pages, sentence=each("row")),
    "rows": Layout(joined=join("\n\n", "rows"), rolling=each("row"), sentence=each("row")),
}
