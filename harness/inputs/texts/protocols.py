"""Perplexity protocols: what is fed, what is scored, how it becomes one number, and the id that says so. numpy only.

The six protocols stand in the table `FORMS`. A window's ids (L,) hold what is fed and, last, the last token scored: the
model reads ids[:-1]. So rolling windows of W hold W + 1 ids and feed W tokens, like lm-evaluation-harness. A window may
score nothing (a tail of one token, an empty document): it stands in the plan, is counted, and is never run.

BOS: a tokenizer "adds one of itself" if it puts a token before the measured text. Then `chunk` and `sentence` begin
every window with it; `stride` and `gptq` have it once before the text; `half` has it there too and over the first token
of every window (llama.cpp); `rolling` begins each document with BOS, else EOS, whatever the tokenizer adds.

The token hash is over the planned ids of the text alone, after the limit, documents one after another: two tokenizers
that cut a text alike agree, whatever their BOS. The BOS rule and its id stand in the protocol id.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.core.contracts import TokenPlan, Window
from harness.core.errors import BadSpecification, HarnessError, TextTooShort, UnknownName, reading
from harness.core.specification import Specification
from harness.core.stats import spans
from harness.core.values import digest
from harness.inputs.texts.corpora import Corpus, Reading

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


@dataclass(frozen=True)
class Protocol:
    """A parsed protocol; `width` is None for `sentence` (the model's context), `step` is set for `stride` only."""

    name: str
    width: int | None = None
    step: int | None = None

    def __str__(self) -> str:
        """The short name, 'stride:512:256'."""
        return ":".join(str(part) for part in (self.name, self.width, self.step) if part is not None)

    def within(self, context: int) -> Protocol:
        """As a model runs it that reads `context` tokens at once: a narrower window keeps its share of overlap."""
        if self.width is None or self.width <= context:
            return self
        step = None if self.step is None else max(1, self.step * context // self.width)
        return Protocol(self.name, context, step)


AGGREGATES = {"token": "exp(sum NLL / count)", "window": "exp(mean over windows of the window's mean NLL)"}
WORD_SEPARATOR = r"\s+"  # lm-evaluation-harness splits at it; empty strings at the ends of a page count
NUMBER = re.compile(r"[1-9][0-9]*")
PROBED = 1000  # characters of a text that show what a tokenizer puts before it


def parse(specification: Specification) -> Protocol:
    """Read `chunk:512`, `stride:512:256`, ...; widths default to 512 (gptq 2048) and a step to half the width."""
    if specification.name not in FORMS:
        raise UnknownName("protocol", specification.name, FORMS)
    form, words = FORMS[specification.name], specification.words
    places = 0 if form.width is None else 2 if specification.name == "stride" else 1
    usage = specification.name + (":W:S" if places == 2 else ":W" if places else "")
    if specification.arguments or len(words) > places or not all(NUMBER.fullmatch(word) for word in words):
        raise BadSpecification(f"'{specification}' is no protocol: write {usage}" + (" in whole tokens" * bool(places)))
    width = int(words[0]) if words else form.width
    if width is None:
        return Protocol(specification.name)
    if width < form.least_width:
        raise BadSpecification(f"'{specification}' scores nothing: W must be at least {form.least_width}")
    if specification.name != "stride":
        return Protocol(specification.name, width)
    step = int(words[1]) if len(words) > 1 else width // 2
    if step > width:
        raise BadSpecification(f"'{specification}' leaves tokens out: S must not exceed W")
    return Protocol("stride", width, step)


def encode(tokenizer: Any, text: str) -> Ids:
    """Token ids of a text without special tokens: (T,); BadFile where the tokenizer cannot."""
    with reading(f"the tokenizer in {getattr(tokenizer, 'name_or_path', '')}"):
        return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)


@functools.lru_cache(maxsize=4)
def leading_token(tokenizer: Any, text: str) -> int | None:
    """The token that the tokenizer puts before this text of itself (BOS), or None; of the text its beginning is read.

    A probe word would not do: a tokenizer may have no token for any of its letters.
    """
    for size in (PROBED, len(text)):
        plain = list(tokenizer(text[:size], add_special_tokens=False, verbose=False)["input_ids"])
        full = list(tokenizer(text[:size], verbose=False)["input_ids"])
        if plain:
            break
    begins = [at for at in range(len(full) - len(plain) + 1) if full[at : at + len(plain)] == plain]
    if plain and (not begins or begins[0] > 1):
        shown = f"{full[:8]}, alone as {plain[:8]}"
        raise HarnessError(f"the tokenizer begins the text with {shown}: there is no rule for such a BOS")
    return int(full[0]) if plain and begins[0] else None


def prefix_token(tokenizer: Any) -> int:
    """The token that `rolling` puts before a document: BOS, else EOS."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise HarnessError("rolling needs a tokenizer with a BOS or EOS token, and this one has neither: use chunk:W")


@functools.lru_cache(maxsize=4)
def tokenizer_identity(tokenizer: Any) -> str:
    """12 hex digits over the vocabulary and, where it has them, merges or piece scores.

    Not over tokenizer.json as it lies: releases of the library write the same tokenizer differently.
    """
    parts: list[Any] = [sorted((piece, int(number)) for piece, number in tokenizer.get_vocab().items())]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        model = json.loads(backend.to_str())["model"]
        parts += [model.get("merges") or (), model["vocab"] if isinstance(model.get("vocab"), list) else ()]
    return digest(parts)[:12]


def planned(texts: Sequence[str], tokenizer: Any, limit: int) -> tuple[list[Ids], bool]:
    """Ids of the texts up to `limit` tokens in all, and whether the limit left anything out."""
    documents: list[Ids] = []
    room = limit
    for text in texts:
        if not room:
            return documents, True
        ids = encode(tokenizer, text)
        documents.append(ids[:room])
        if len(ids) > room:
            return documents, True
        room -= len(ids)
    return documents, False


def normalisers(reading: Reading, documents: Sequence[Ids], cut: bool, tokenizer: Any) -> dict[str, int]:
    """Words and bytes of the pages planned; of a page that the limit cut, those of the text as far as it is fed.

    Empty where the tokenizer cannot say how far that is (no offsets).
    """
    pages = list(reading.originals[: len(documents)])
    if cut and documents:
        text = reading.texts[len(documents) - 1]
        count = len(documents[-1])
        if not getattr(tokenizer, "is_fast", False):
            return {}
        encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        if count < len(offsets):
            pages[-1] = text[: offsets[count - 1][1]]
    words = sum(len(re.split(WORD_SEPARATOR, page)) for page in pages)
    return {"word": words, "byte": sum(len(page.encode()) for page in pages)}


def plan(corpus: Corpus, protocol: Protocol, tokenizer: Any, *, context: int, max_tokens: int | None) -> TokenPlan:
    """The windows of a text under a protocol and tokenizer; TextTooShort where no token would be scored.

    `context` is how many tokens the model can read at once: it caps the width, and the plan's `protocol` says so.
    `max_tokens`: read the first so many (document by document where those stand alone), None for all.
    """
    form, reading = FORMS[protocol.name], corpus.joined(protocol.name)
    if context < form.least_width:
        raise BadSpecification(f"{protocol} cannot score under a model's context of {context} tokens")
    used = protocol.within(context)
    width = used.width or context
    documents, cut = planned(reading.texts, tokenizer, max_tokens or sys.maxsize)
    first = next((text for text, ids in zip(reading.texts, documents, strict=False) if len(ids)), "")
    bos = prefix_token(tokenizer) if used.name == "rolling" else leading_token(tokenizer, first)
    fed = [led(documents[0], bos)] if form.bos_once else documents
    built = form.build(fed, width, used.step or width, bos)
    if not any(window.scored for window in built):
        raise TextTooShort(
            f"the text '{corpus.name}' gives {sum(map(len, documents)):,} tokens, of which {used} scores none: "
            f"take a longer text{', raise --max-tokens' if cut else ''} or choose a shorter window"
        )
    counts = normalisers(reading, documents, cut, tokenizer) if used.name == "rolling" else {}
    ids = np.concatenate(documents)
    split = f" {corpus.split}" if corpus.split else ""
    limit = f"the first {len(ids)}" if cut else "all"
    lead = "bos=0" if bos is None else f"bos=1 (id {bos}) {form.bos}"
    if used.name == "rolling":
        lead = f"prefix {bos} before every document"
    return TokenPlan(
        protocol=str(used),
        protocol_id="; ".join(
            (
                f"text: {corpus.name}{split}, revision {corpus.revision[:12]}, {reading.how}",
                f"tokens: {limit}, tokenizer {tokenizer_identity(tokenizer)}, {lead}",
                f"windows: {form.windows.format(width=width, step=used.step)}",
                f"scored: {form.scored}",
                f"aggregate: {AGGREGATES[form.aggregate]}",
                f"normaliser: {', '.join(('token', *counts))}",
            )
        ),
        token_hash=hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest(),
        tokens=len(ids),
        windows=tuple(built),
        aggregate=form.aggregate,
        normalisers=counts,
    )


def window_slices(plan: TokenPlan) -> list[slice]:
    """Where each window that scores anything lies in the flat array of scored tokens' NLL."""
    return spans(window.scored for window in plan.windows if window.scored)


def mean_nll(nll: NDArray[np.float32], plan: TokenPlan) -> float:
    """The mean NLL in nats by the plan's aggregate, summed in float64; not finite where any token's is not."""
    values = nll.astype(np.float64)
    if plan.aggregate == "window":
        return float(np.mean([values[place].mean() for place in window_slices(plan)]))
    return float(values.mean())


def aggregate(nll: NDArray[np.float32], plan: TokenPlan) -> float:
    """Perplexity a token from the NLL of the scored tokens (in window order, nats); inf or nan where any is."""
    with np.errstate(over="ignore"):  # exp of more than 709 nats is infinite, and says so
        return float(np.exp(mean_nll(nll, plan)))
