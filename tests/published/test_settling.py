from __future__ import annotations

import dataclasses
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from harness.core.errors import MissingAsset
from harness.core.options import Declared, Options
from harness.core.specification import Specification, parse
from harness.inputs.models import names
from harness.inputs.texts.corpora import Corpus
from harness.published import Claim, Finding, Judgement, Publication
from harness.published.settling import cut_pages, settle, text_of, tried, weights_for

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
    report = Publication("r", f"path:{folder}", "a text", "named", {})
    claim = Claim(report, "a", "m", "fp32", "perplexity", "1.00", "ppl")
    claim = replace(claim, dataset=f"text:{folder / 'text.txt'}", text_protocol=f"chunk:{WIDTH}")
    return Judgement(replace(claim, **changes), Finding.NEEDS_WEIGHTS, "why")


def options(folder: Path, *models: str) -> Options:
    return Options(declared=Declared(folder), models=tuple(parse(model) for model in models or ("smollm2-135m",)))


def weights(folder: Path) -> Specification:
    return parse(f"path:{folder}")


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
    settled = settle(judgement(folder, published=f"{right:.3f}"), options(folder), weights(folder))
    assert settled.finding is Finding.REPRODUCED
    assert float(settled.ours or 0) == pytest.approx(right, rel=1e-5)
    wrong = settle(judgement(folder, published=f"{right + 0.01:.3f}"), options(folder), weights(folder))
    assert wrong.finding is Finding.REFUTED
    loose = judgement(folder, published=f"{right + 0.01:.3f}", slack="0.02")
    assert settle(loose, options(folder), weights(folder)).finding is Finding.REPRODUCED


def test_the_sources_own_reading_decides(folder: Path) -> None:
    """The port overwrites the first token of every window; ours is told beside it."""
    ports, ours = by_hand(folder, lead=len(WORDS)), by_hand(folder)
    assert ports != pytest.approx(ours, rel=1e-4)
    settled = settle(judgement(folder, published=f"{ports:.3f}", reading="port"), options(folder), weights(folder))
    assert settled.finding is Finding.REPRODUCED
    assert settled.ours is not None
    assert abs(settled.ours - Decimal(ports)) < Decimal("0.001")
    assert f"{ours:.4f} as our chunk:{WIDTH}" in settled.note


def test_missing_text_is_one_line(folder: Path) -> None:
    with pytest.raises(MissingAsset) as caught:
        settle(judgement(folder, dataset=f"text:{folder / 'nothing.txt'}"), options(folder), weights(folder))
    assert "\n" not in str(caught.value)


def test_a_local_copy_is_known_by_its_shape(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = replace(judgement(folder).claim, report=Publication("r", "gpt2", "a text", "named", {}))
    local = f"path:{folder}"
    assert weights_for(claim, options(folder)) is None  # the session's default model is another
    assert weights_for(claim, options(folder, "olmo-1b", "gpt2")) == parse("gpt2")
    assert weights_for(claim, options(folder, local)) is None  # a GPT-2 of another size
    config = GPT2Config.from_pretrained(folder).to_dict()
    monkeypatch.setattr(names, "ARCHITECTURES", {"gpt2": config})
    assert weights_for(claim, options(folder, "tiny-gpt2", local)) == parse(local)


def test_a_folder_that_is_not_there_is_one_line(folder: Path) -> None:
    with pytest.raises(MissingAsset) as caught:
        weights_for(judgement(folder).claim, options(folder, "path:nowhere"))
    assert "\n" not in str(caught.value)


LINES = ("a b c d e", "f", "g h a b", "c c d e f g h a b")


def sentence_losses(folder: Path, lead: int | None = None) -> list[torch.Tensor]:
    """Losses of each line alone, in nats; behind `lead` every token of a line is scored."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for line in LINES:
        ids = torch.tensor([WORDS.index(word) for word in line.split()])
        fed = ids if lead is None else torch.cat([torch.tensor([lead]), ids])
        if len(fed) > 1:
            with torch.inference_mode():
                logits = model(fed[None]).logits[0, :-1]
            found.append(torch.nn.functional.cross_entropy(logits, fed[1:], reduction="none"))
    return found


def test_a_named_text_is_read_in_every_way(folder: Path) -> None:
    (folder / "lines.txt").write_text("\n".join(LINES) + "\n")
    losses = sentence_losses(folder)
    over_perplexities = float(torch.stack([piece.mean().exp() for piece in losses]).mean())
    changes = {"dataset": f"text:{folder / 'lines.txt'}", "text_protocol": "", "tried": "sentences"}
    changes |= {"specification": "fp32", "published": f"{over_perplexities:.4f}"}
    found = tried(judgement(folder, **changes), options(folder), weights(folder))
    assert found.finding is Finding.REPRODUCED
    assert "each sentence alone, over perplexities gives" in found.note
    led = float(torch.cat(sentence_losses(folder, lead=len(WORDS))).mean().exp())
    assert f"each sentence behind a leading token, over tokens {led:.3f}" in found.note
    means = torch.stack([piece.mean() for piece in losses])
    assert f"each sentence alone, over mean losses {float(means.mean().exp()):.3f}" in found.note
    other = tried(judgement(folder, **changes | {"published": "99.9"}), options(folder), weights(folder))
    assert other.finding is Finding.NOT_DERIVABLE
    assert "no reading gives it within 0.2%; read as: each sentence alone, over tokens" in other.note


def test_a_protocol_runs_on_articles_that_can_be_had(folder: Path) -> None:
    changes = {"text_protocol": "", "tried": "cut texts", "specification": "fp32"}
    found = tried(
        dataclasses.replace(judgement(folder, **changes), finding=Finding.UNDERSPECIFIED),
        options(folder),
        weights(folder),
    )
    assert found.finding is Finding.UNDERSPECIFIED  # other articles settle nothing
    assert "not the report's articles: its protocol (pages cut to 512 characters, alone)" in found.note


def test_pages_are_cut_by_characters() -> None:
    rows = (" = A = \n", " " + "x" * 600 + "\n", " = B = \n", " short \n")
    cut = cut_pages(Corpus("w", rows, "wikitext", "rev")).joined("sentence").texts
    assert cut == ("= A = " + "x" * 503, "= B = short")


def test_a_text_that_nobody_may_ship_is_asked_for(folder: Path) -> None:
    claim = replace(judgement(folder).claim, dataset="ptb", tried="sentences")
    with pytest.raises(MissingAsset, match="name it as ptb:FILE with --datasets"):
        text_of(claim, options(folder))
    assert text_of(claim, dataclasses.replace(options(folder), datasets=(parse("ptb:f.txt"),))) == parse("ptb:f.txt")
