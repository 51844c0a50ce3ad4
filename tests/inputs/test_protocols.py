import hashlib
import re
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.core.contracts import TokenPlan, Window
from harness.core.errors import BadSpecification, HarnessError, TextTooShort, UnknownName
from harness.core.specification import parse
from harness.inputs.texts import protocols
from harness.inputs.texts.corpora import Corpus

BOS, EOS = 1, 2


class Words:
    """A word is a token: its id is 10 plus the number it spells. Answers like a fast tokenizer of transformers."""

    is_fast = True

    def __init__(self, adds_bos: bool = False, bos: int | None = BOS, eos: int | None = EOS) -> None:
        self.adds_bos, self.bos_token_id, self.eos_token_id = adds_bos, bos, eos

    def __call__(self, text: str, *, add_special_tokens: bool = True, **wanted: Any) -> dict[str, Any]:
        found = list(re.finditer(r"\S+", text))
        ids = [10 + int(match[0]) if match[0].isdigit() else 9 for match in found]
        lead = [self.bos_token_id] if add_special_tokens and self.adds_bos else []
        return {"input_ids": lead + ids, "offset_mapping": [match.span() for match in found]}

    def get_vocab(self) -> dict[str, int]:
        return {str(number): 10 + number for number in range(100)}


def numbers(count: int, start: int = 0) -> str:
    return " ".join(str(number) for number in range(start, start + count))


def corpus(*documents: str, layout: str = "file") -> Corpus:
    return Corpus("sample", documents, layout, "ab" * 32)


def planned(
    name: str, text: Corpus, tokenizer: Any = None, *, context: int = 1000, max_tokens: int | None = None
) -> TokenPlan:
    return protocols.plan(
        text, protocols.parse(parse(name)), tokenizer or Words(), context=context, max_tokens=max_tokens
    )


def shown(plan: TokenPlan) -> list[tuple[list[int], int]]:
    return [(window.ids.tolist(), window.scored) for window in plan.windows]


def test_chunk_by_hand() -> None:
    plan = planned("chunk:3", corpus(numbers(7)))
    assert shown(plan) == [([10, 11, 12], 2), ([13, 14, 15], 2), ([16], 0)]
    assert (plan.protocol, plan.tokens, plan.aggregate) == ("chunk:3", 7, "token")


def test_chunk_with_bos_scores_every_text_token() -> None:
    plan = planned("chunk:3", corpus(numbers(5)), Words(adds_bos=True))
    assert shown(plan) == [([BOS, 10, 11], 2), ([BOS, 12, 13], 2), ([BOS, 14], 1)]
    assert plan.tokens == 5
    assert "bos=1 (id 1) before every window" in plan.protocol_id


def test_stride_by_hand() -> None:
    assert shown(planned("stride:4:2", corpus(numbers(7)))) == [
        ([10, 11, 12, 13], 3),
        ([12, 13, 14, 15], 2),
        ([14, 15, 16], 1),
    ]


def test_stride_of_the_width_is_chunk() -> None:
    text = corpus(numbers(11))
    assert shown(planned("stride:4:4", text)) == shown(planned("chunk:4", text))


def test_stride_has_bos_once() -> None:
    plan = planned("stride:3:2", corpus(numbers(4)), Words(adds_bos=True))
    assert shown(plan) == [([BOS, 10, 11], 2), ([11, 12, 13], 2)]


def test_gptq_drops_the_tail_and_averages_windows() -> None:
    plan = planned("gptq:3", corpus(numbers(8)))
    assert shown(plan) == [([10, 11, 12], 2), ([13, 14, 15], 2)]
    assert plan.aggregate == "window"
    with_bos = planned("gptq:3", corpus(numbers(5)), Words(adds_bos=True))
    assert shown(with_bos) == [([BOS, 10, 11], 2), ([12, 13, 14], 2)]


def test_half_scores_255_of_512() -> None:
    plan = planned("half:512", corpus(numbers(1100)))
    assert [window.scored for window in plan.windows] == [255, 255]
    assert shown(planned("half:5", corpus(numbers(6)))) == [([10, 11, 12, 13, 14], 2)]


def test_half_overwrites_the_first_token_of_a_window_with_bos() -> None:
    plan = planned("half:4", corpus(numbers(8)), Words(adds_bos=True))  # fed: BOS 10 11 12 | 13 14 15 16 | 17
    assert shown(plan) == [([BOS, 10, 11, 12], 1), ([BOS, 14, 15, 16], 1)]
    assert plan.token_hash == planned("half:4", corpus(numbers(8))).token_hash  # of the text, not of what overwrote it


def test_rolling_by_hand() -> None:
    plan = planned("rolling:3", corpus(numbers(7)))
    assert shown(plan) == [([BOS, 10, 11, 12], 3), ([12, 13, 14, 15], 3), ([13, 14, 15, 16], 1)]
    assert shown(planned("rolling:5", corpus(numbers(2)))) == [([BOS, 10, 11], 2)]


def test_rolling_prefix_is_bos_else_eos_else_an_error() -> None:
    assert planned("rolling:3", corpus("5"), Words(bos=None)).windows[0].ids.tolist() == [EOS, 15]
    assert "prefix 2 before every document" in planned("rolling:3", corpus("5"), Words(bos=None)).protocol_id
    with pytest.raises(HarnessError, match="BOS or EOS token, and this one has neither"):
        planned("rolling:3", corpus("5"), Words(bos=None, eos=None))


def test_rolling_takes_documents_one_by_one() -> None:
    plan = planned("rolling:2", corpus("0 1 2", "3", layout="rows"))
    assert shown(plan) == [([BOS, 10, 11], 2), ([10, 11, 12], 1), ([BOS, 13], 1)]


def test_sentence_stands_each_line_alone_and_counts_those_without_a_score() -> None:
    plan = planned("sentence", corpus("0 1 2\n\n3\n4 5\n"))
    assert shown(plan) == [([10, 11, 12], 2), ([], 0), ([13], 0), ([14, 15], 1)]
    with_bos = planned("sentence", corpus("0 1\n\n3"), Words(adds_bos=True))
    assert shown(with_bos) == [([BOS, 10, 11], 2), ([BOS], 0), ([BOS, 13], 1)]


def test_sentence_longer_than_the_context_goes_in_pieces() -> None:
    assert shown(planned("sentence", corpus(numbers(5)), context=3)) == [([10, 11, 12], 2), ([13, 14], 1)]


@pytest.mark.parametrize("name", ["chunk", "stride", "gptq", "rolling", "half"])
def test_width_is_capped_by_the_context_and_the_names_show_it(name: str) -> None:
    plan = planned(f"{name}:512", corpus(numbers(100)), context=16)
    assert plan.protocol == ("stride:16:8" if name == "stride" else f"{name}:16")
    assert " of 16" in plan.protocol_id
    assert max(len(window.ids) - 1 for window in plan.windows) <= 16  # what is fed


@pytest.mark.parametrize(
    ("asked", "run"),
    [
        ("chunk:2048", "chunk:256"),
        ("stride:2048:1024", "stride:256:128"),
        ("stride:2048:1", "stride:256:1"),
        ("stride:512:512", "stride:256:256"),
        ("stride:256:64", "stride:256:64"),
        ("sentence", "sentence"),
    ],
)
def test_a_window_that_shrinks_keeps_its_share_of_overlap(asked: str, run: str) -> None:
    assert str(protocols.parse(parse(asked)).within(256)) == run
    text = corpus(numbers(1000))
    one, other = planned(asked, text, context=256), planned(run, text, context=256)
    assert (one.protocol, one.protocol_id) == (run, other.protocol_id)
    assert shown(one) == shown(other)


def test_limit_cuts_the_joined_text() -> None:
    plan = planned("chunk:3", corpus(numbers(50)), max_tokens=4)
    assert shown(plan) == [([10, 11, 12], 2), ([13], 0)]
    assert "the first 4," in plan.protocol_id
    whole = planned("chunk:3", corpus(numbers(4)), max_tokens=4)  # a limit that cuts nothing is no limit
    assert whole.protocol_id == planned("chunk:3", corpus(numbers(4))).protocol_id


def test_limit_takes_documents_until_it_is_reached() -> None:
    plan = planned("sentence", corpus("0 1 2\n3 4 5\n6 7"), max_tokens=5)
    assert shown(plan) == [([10, 11, 12], 2), ([13, 14], 1)]
    assert plan.tokens == 5


def test_token_hash_is_of_the_text_ids_as_little_endian_int32() -> None:
    expected = hashlib.sha256(b"\x0a\0\0\0\x0b\0\0\0\x0c\0\0\0").hexdigest()
    assert planned("chunk:2", corpus(numbers(3))).token_hash == expected
    assert planned("rolling:2", corpus(numbers(3)), Words(adds_bos=True)).token_hash == expected


def test_protocol_ids_differ_wherever_the_number_may() -> None:
    text = corpus(numbers(40))
    other = Corpus("sample", text.documents, "file", "cd" * 32)
    ids = [
        *(planned(name, text).protocol_id for name in ("chunk:8", "chunk:9", "gptq:8", "half:8", "rolling:8")),
        *(planned(name, text).protocol_id for name in ("stride:8:4", "stride:8:3", "sentence")),
        planned("chunk:8", text, Words(adds_bos=True)).protocol_id,
        planned("chunk:8", text, max_tokens=20).protocol_id,
        planned("chunk:8", other).protocol_id,
    ]
    assert len(set(ids)) == len(ids)


def test_rolling_normalisers_count_words_as_split_and_bytes_in_utf8() -> None:
    plan = planned("rolling:4", corpus(" 1 2\n3 ", "käse", layout="rows"))
    assert plan.normalisers == {"word": 5 + 1, "byte": 7 + 5}  # the empty strings before and after count
    assert planned("chunk:4", corpus("1 2 3")).normalisers == {}


def test_normalisers_of_a_cut_document_cover_what_is_fed() -> None:
    plan = planned("rolling:4", corpus("11 22 33 44"), max_tokens=2)
    assert plan.normalisers == {"word": 2, "byte": len("11 22")}
    slow = Words()
    slow.is_fast = False  # no offsets
    assert planned("rolling:4", corpus("11 22 33 44"), slow, max_tokens=2).normalisers == {}
    assert planned("rolling:4", corpus("11 22 33 44"), slow).normalisers == {"word": 4, "byte": 11}


@pytest.mark.parametrize(
    ("name", "documents"),
    [("chunk:8", "1"), ("gptq:8", "1 2 3"), ("half:8", "1 2 3"), ("stride:8:4", "1"), ("sentence", "1\n2\n3")],
)
def test_a_text_that_scores_nothing_is_too_short(name: str, documents: str) -> None:
    with pytest.raises(TextTooShort) as caught:
        planned(name, corpus(documents))
    message = str(caught.value)
    assert "'sample'" in message
    assert name in message
    assert "\n" not in message
    assert "--max-tokens" not in message


def test_too_short_by_limit_says_so() -> None:
    with pytest.raises(TextTooShort, match="raise --max-tokens"):
        planned("gptq:8", corpus(numbers(100)), max_tokens=4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chunk:x", "write chunk:W"),
        ("chunk:0", "write chunk:W"),
        ("chunk:1", "W must be at least 2"),
        ("half:2", "W must be at least 3"),
        ("chunk:8:8", "write chunk:W"),
        ("stride:8:9", "S must not exceed W"),
        ("stride:8:0", "write stride:W:S"),
        ("sentence:8", "write sentence"),
        ("gptq:width=3", "write gptq:W"),
    ],
)
def test_bad_protocols(text: str, message: str) -> None:
    with pytest.raises(BadSpecification, match=message):
        protocols.parse(parse(text))


def test_unknown_protocol_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"did you mean 'chunk'\? \(known: chunk, gptq, half"):
        protocols.parse(parse("chunks:512"))


@pytest.mark.parametrize(
    ("text", "name"),
    [("chunk", "chunk:512"), ("gptq", "gptq:2048"), ("stride:100", "stride:100:50"), ("sentence", "sentence")],
)
def test_defaults(text: str, name: str) -> None:
    assert str(protocols.parse(parse(text))) == name


def test_a_context_too_short_for_the_protocol_is_refused() -> None:
    with pytest.raises(BadSpecification, match="context of 1 tokens"):
        planned("chunk:8", corpus(numbers(9)), context=1)


def test_bos_rule_refuses_what_it_does_not_know() -> None:
    class Two(Words):
        def __call__(self, text: str, *, add_special_tokens: bool = True, **wanted: Any) -> dict[str, Any]:
            ids = super().__call__(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [7, 8, *ids] if add_special_tokens else ids}

    with pytest.raises(HarnessError, match="no rule for such a BOS"):
        protocols.leading_token(Two(), "1 2")


def test_bos_is_found_before_a_trailing_eos() -> None:
    class Both(Words):
        def __call__(self, text: str, *, add_special_tokens: bool = True, **wanted: Any) -> dict[str, Any]:
            ids = super().__call__(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [BOS, *ids, EOS] if add_special_tokens else ids}

    assert protocols.leading_token(Both(), "1 2") == BOS
    assert protocols.leading_token(Words(), "1 2") is None


def test_bos_is_read_from_the_measured_text() -> None:
    """A vocabulary without a token for any letter of a usual word, as those of DNA are."""

    class Bases(Words):
        def __call__(self, text: str, *, add_special_tokens: bool = True, **wanted: Any) -> dict[str, Any]:
            ids = [10 + "ACGT".index(letter) for letter in text if letter in "ACGT"]
            return {"input_ids": [BOS] * (add_special_tokens and self.adds_bos) + ids}

    for text in ("ACGT" * 5, " " * 2000 + "ACGT" * 5):  # where its beginning has no token, more is read
        assert shown(planned("chunk:8", corpus(text), Bases(adds_bos=True)))[0] == ([BOS, *(10, 11, 12, 13) * 2][:8], 7)
        assert shown(planned("chunk:8", corpus(text), Bases()))[0][0][0] == 10
    assert protocols.leading_token(Bases(adds_bos=True), "harness") is None  # nothing to put it before


def plan_of(scored: list[int], aggregate: str) -> TokenPlan:
    made = tuple(Window(np.arange(count + 1), count) for count in scored)
    return TokenPlan("p", "p", "h", sum(scored), made, aggregate)


def test_aggregates_by_hand() -> None:
    nll = np.log(np.array([2, 2, 8, 4], dtype=np.float32))
    assert protocols.aggregate(nll, plan_of([2, 0, 1, 1], "token")) == pytest.approx(128 ** (1 / 4), rel=1e-6)
    assert protocols.aggregate(nll, plan_of([2, 0, 1, 1], "window")) == pytest.approx(64 ** (1 / 3), rel=1e-6)
    assert protocols.window_slices(plan_of([2, 0, 1, 1], "token")) == [slice(0, 2), slice(2, 3), slice(3, 4)]


def test_a_loss_that_is_not_finite_is_never_averaged_away() -> None:
    for rule in ("token", "window"):
        assert protocols.aggregate(np.array([1, np.inf, 1], dtype=np.float32), plan_of([1, 2], rule)) == np.inf
        assert np.isnan(protocols.aggregate(np.array([1, np.nan, np.inf], dtype=np.float32), plan_of([1, 2], rule)))
    assert protocols.aggregate(np.array([800], dtype=np.float32), plan_of([1], "token")) == np.inf


def test_sums_are_in_double_precision() -> None:
    nll = np.full(3_000_001, 0.1, dtype=np.float32)
    assert protocols.mean_nll(nll, plan_of([len(nll)], "token")) == pytest.approx(float(np.float32(0.1)), abs=1e-12)


@given(count=st.integers(1, 200), width=st.integers(1, 40))
def test_rolling_scores_every_token_exactly_once_after_what_precedes_it(count: int, width: int) -> None:
    ids = np.arange(100, 100 + count)
    line = [BOS, *ids.tolist()]
    made = protocols.rolling(ids, width, BOS)
    assert [token for window in made for token in window.ids[-window.scored :].tolist()] == ids.tolist()
    for window in made:
        fed = window.ids.tolist()
        assert len(fed) - 1 <= width
        start = line.index(fed[0])
        assert line[start : start + len(fed)] == fed  # contiguous
    if count >= width:
        assert all(len(window.ids) == width + 1 for window in made)


@given(count=st.integers(1, 200), width=st.integers(2, 40), bos=st.sampled_from([None, BOS]))
def test_chunk_keeps_every_token_and_scores_all_but_one_a_window(count: int, width: int, bos: int | None) -> None:
    ids = np.arange(100, 100 + count)
    made = protocols.chunk(ids, width, bos)
    led = bos is not None
    assert [token for window in made for token in window.ids[led:].tolist()] == ids.tolist()
    assert all(len(window.ids) == width for window in made[:-1])
    assert sum(window.scored for window in made) == (count if led else count - len(made))


@given(count=st.integers(2, 200), width=st.integers(2, 40), data=st.data())
def test_stride_scores_every_token_but_those_without_a_context_once(count: int, width: int, data: Any) -> None:
    step = data.draw(st.integers(1, width - 1))
    made = protocols.stride(np.arange(count), width, step)
    assert [token for window in made for token in window.ids[len(window.ids) - window.scored :].tolist()] == list(
        range(1, count)
    )


@given(count=st.integers(0, 300), width=st.integers(3, 40))
def test_gptq_and_half_hold_whole_windows_only(count: int, width: int) -> None:
    ids = np.arange(count)
    for made in (protocols.gptq(ids, width), protocols.half(ids, width, None)):
        assert len(made) == count // width
        assert all(len(window.ids) == width for window in made)


def test_half_leaves_the_plan_of_others_alone() -> None:
    ids = np.arange(100, 108)
    protocols.half(ids, 4, BOS)
    assert ids.tolist() == list(range(100, 108))


def test_without_torch() -> None:
    import subprocess

    names = "sys, harness.inputs.texts.protocols, harness.inputs.texts.corpora, harness.metrics.perplexity"
    code = f"import {names}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
