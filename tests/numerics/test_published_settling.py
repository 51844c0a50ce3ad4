from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from harness.errors import MissingAsset
from harness.options import Declared, Options
from harness.published import Claim, Finding, Judgement, Report
from harness.published.settling import settle

WORDS = tuple("abcdefgh")
TEXT = "a b c d e f g h a c e g b d f h a a b b c c d d e e"
WIDTH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("model")
    vocabulary = {word: index for index, word in enumerate((*WORDS, "<end>"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(home)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=9, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=8, eos_token_id=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(home)
    (home / "text.txt").write_text(TEXT)
    return home


def judgement(folder: Path, **changes: object) -> Judgement:
    report = Report("r", f"path:{folder}", "a text", "named", {})
    claim = Claim(report, "a", "m", "fp32", "perplexity", "1.00", "ppl")
    claim = replace(claim, dataset=f"text:{folder / 'text.txt'}", text_protocol=f"chunk:{WIDTH}")
    return Judgement(replace(claim, **changes), Finding.NEEDS_WEIGHTS, "why")  # type: ignore[arg-type]


def options(folder: Path) -> Options:
    return Options(declared=Declared(folder))


def by_hand(folder: Path, lead: int | None = None) -> float:
    """exp(mean loss) of disjoint windows, all but the first token of each scored; `lead` overwrites that first."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([WORDS.index(word) for word in TEXT.split()])
    total, count = 0.0, 0
    for window in torch.split(ids, WIDTH):
        fed = window.clone()
        fed[0] = window[0] if lead is None else lead
        if len(window) > 1:
            with torch.inference_mode():
                losses = torch.nn.functional.cross_entropy(model(fed[None]).logits[0, :-1], fed[1:], reduction="sum")
            total, count = total + float(losses), count + len(window) - 1
    return float(torch.tensor(total / count).exp())


def test_weights_settle_a_claim(folder: Path) -> None:
    right = by_hand(folder)
    settled = settle(judgement(folder, published=f"{right:.3f}"), options(folder))
    assert settled.finding is Finding.REPRODUCED
    assert float(settled.ours or 0) == pytest.approx(right, rel=1e-5)
    wrong = settle(judgement(folder, published=f"{right + 0.01:.3f}"), options(folder))
    assert wrong.finding is Finding.REFUTED
    assert settle(judgement(folder, published=f"{right + 0.01:.3f}", slack="0.02"), options(folder)).finding is (
        Finding.REPRODUCED
    )


def test_the_sources_own_reading_decides(folder: Path) -> None:
    """The port overwrites the first token of every window; ours is told beside it."""
    ports, ours = by_hand(folder, lead=len(WORDS)), by_hand(folder)
    assert ports != pytest.approx(ours, rel=1e-4)
    settled = settle(judgement(folder, published=f"{ports:.3f}", reading="port"), options(folder))
    assert settled.finding is Finding.REPRODUCED
    assert settled.ours is not None
    assert abs(settled.ours - Decimal(ports)) < Decimal("0.001")
    assert f"{ours:.4f} as our chunk:{WIDTH}" in settled.note


def test_missing_text_is_one_line(folder: Path) -> None:
    with pytest.raises(MissingAsset) as caught:
        settle(judgement(folder, dataset=f"text:{folder / 'nothing.txt'}"), options(folder))
    assert "\n" not in str(caught.value)
