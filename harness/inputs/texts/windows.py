"""The windows of the six perplexity protocols: token ids in, `Window`s out. numpy only.

A window's ids (L,) hold what is fed and, last, the last token scored: the model reads ids[:-1]. So rolling windows of
W hold W + 1 ids and feed W tokens, like lm-evaluation-harness. A window may score nothing (a tail of one token, an
empty document): it stands in the plan, is counted, and is never run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.core.contracts import Window

Ids = NDArray[np.int64]  # (T,) token ids of one text


def led(ids: Ids, bos: int | None) -> Ids:
    """The ids with BOS before them, if there is one."""
    return ids if bos is None else np.concatenate([np.array([bos], dtype=np.int64), ids])


def all_but_first(ids: Ids) -> Window:
    """A window that scores every token but its first."""
    return Window(ids, max(len(ids) - 1, 0))


def chunk(ids: Ids, width: int, bos: int | None) -> list[Window]:
    """Disjoint windows of `width` tokens, tail kept; BOS, where there is one, begins each and counts in its width."""
    room = width - (bos is not None)
    return [all_but_first(led(ids[start : start + room], bos)) for start in range(0, len(ids), room)]


def stride(ids: Ids, width: int, step: int) -> list[Window]:
    """Windows from 0, step, 2 step, ... to the first that reaches the end; each scores what none before it reached."""
    windows: list[Window] = []
    previous_end = 0
    for start in range(0, len(ids), step):
        end = min(start + width, len(ids))
        windows.append(Window(ids[start:end], min(end - previous_end, end - start - 1)))
        previous_end = end
        if end == len(ids):
            break
    return windows


def gptq(ids: Ids, width: int) -> list[Window]:
    """Disjoint windows of `width`, tail dropped, all but the first token scored."""
    return [all_but_first(ids[end - width : end]) for end in range(width, len(ids) + 1, width)]


def half(ids: Ids, width: int, bos: int | None) -> list[Window]:
    """Disjoint windows of `width`, tail dropped; the last width - width // 2 - 1 tokens scored.

    BOS, where there is one, overwrites the first token of every window.
    """
    windows = []
    for end in range(width, len(ids) + 1, width):
        fed = ids[end - width : end].copy()
        if bos is not None:
            fed[0] = bos
        windows.append(Window(fed, width - width // 2 - 1))
    return windows


def rolling(ids: Ids, width: int, prefix: int) -> list[Window]:
    """Windows that feed `width` tokens and score every token once; the last is extended to the left to full width."""
    line = led(ids, prefix)  # line[i] precedes ids[i]
    windows = []
    for start in range(0, len(ids), width):
        end = min(start + width, len(ids))
        begin = start if end - start == width else max(end - width, 0)
        windows.append(Window(line[begin : end + 1], end - start))
    return windows


def sentence(documents: Sequence[Ids], width: int, bos: int | None) -> list[Window]:
    """Each document alone, all but its first token scored; one longer than `width` goes in pieces, as `chunk` has it.

    An empty document is a window that scores nothing.
    """
    windows: list[Window] = []
    for ids in documents:
        windows += chunk(ids, width, bos) or [Window(led(ids, bos), 0)]
    return windows


@dataclass(frozen=True)
class Form:
    """One protocol's rules. `build` takes (documents, width, step, bos or prefix id)."""

    build: Callable[[Sequence[Ids], int, int, int | None], list[Window]]
    windows: str
    scored: str
    bos: str  # where a BOS stands that the tokenizer adds; "" for a rule of its own
    least_width: int  # below it a window scores nothing
    width: int | None = 512  # default
    bos_once: bool = False  # BOS belongs to the text, before it is cut into windows
    aggregate: str = "token"


FORMS = {
    "chunk": Form(
        lambda documents, width, step, bos: chunk(documents[0], width, bos),
        "disjoint of {width}, tail kept",
        "all but the first token of a window",
        "before every window",
        2,
    ),
    "stride": Form(
        lambda documents, width, step, bos: stride(documents[0], width, step),
        "of {width}, one every {step}",
        "the tokens that no earlier window reached",
        "once before the text",
        2,
        bos_once=True,
    ),
    "gptq": Form(
        lambda documents, width, step, bos: gptq(documents[0], width),
        "disjoint of {width}, tail dropped",
        "all but the first token of a window",
        "once before the text",
        2,
        width=2048,
        bos_once=True,
        aggregate="window",
    ),
    "rolling": Form(
        lambda documents, width, step, prefix: [
            window for ids in documents for window in rolling(ids, width, prefix or 0)
        ],
        "disjoint of {width} fed tokens, each document by itself, the last extended to the left",
        "every token once",
        "",
        1,
    ),
    "half": Form(
        lambda documents, width, step, bos: half(documents[0], width, bos),
        "disjoint of {width}, tail dropped",
        "the last W - W/2 - 1 tokens of a window",
        "once before the text and over the first token of every window",
        3,
        bos_once=True,
    ),
    "sentence": Form(
        lambda documents, width, step, bos: sentence(documents, width, bos),
        "each document alone, in pieces of {width} where it is longer",
        "all but the first token of a document or piece",
        "before every document and piece",
        2,
        width=None,
    ),
}
