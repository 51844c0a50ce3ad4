from __future__ import annotations

import dataclasses
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from msgspec.structs import replace
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

from harness import published
from harness.core.errors import BadFile, MissingAsset
from harness.core.options import Declared, Options, build
from harness.core.specification import Specification, parse, parse_models
from harness.inputs.models import checkpoints, names
from harness.inputs.texts import corpora
from harness.published import Claim, Finding, Judgement, Publication
from harness.published.claims import SHIPPED
from harness.published.origins import OwnCodes, Scoring
from harness.published.settling import (
    Reader,
    documents_of,
    figures,
    ids_of,
    settle,
    text_of,
    weights_for,
    write_codes,
)
from harness.published.settling import losses as token_losses

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


def sentence_losses(folder: Path) -> list[torch.Tensor]:
    """Losses of each line alone, in nats."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for line in LINES:
        fed = torch.tensor([WORDS.index(word) for word in line.split()])
        if len(fed) > 1:
            with torch.inference_mode():
                logits = model(fed[None]).logits[0, :-1]
            found.append(torch.nn.functional.cross_entropy(logits, fed[1:], reduction="none"))
    return found


def by_rule(folder: Path, published: float, rule: Scoring, **changes: object) -> Judgement:
    """A claim by its own rule on LINES, as `pytest -m published` settles it."""
    (folder / "lines.txt").write_text("\n".join(LINES) + "\n")
    claim = judgement(folder, published=f"{published:.6f}", rule=rule, text_protocol="", **changes)
    return settle(claim, options(folder), weights(folder))


def rule(folder: Path, **changes: object) -> Scoring:
    return structs.replace(
        Scoring("program", "lines", dataset=f"text:{folder / 'lines.txt'}"),
        **changes,
    )


def faults(folder: Path) -> dict[str, tuple[Scoring, float]]:
    """Each rule with what it prints, by hand."""
    losses = sentence_losses(folder)  # of three lines: one token alone scores nothing
    means = torch.stack([piece.mean() for piece in losses])
    fed = torch.tensor([len(piece) + 1 for piece in losses], dtype=torch.float32)
    pair = torch.cat(losses[:2])
    batches = [losses[0].sum() / len(pair), losses[1].sum() / len(pair), losses[2].sum() / len(losses[2])]
    return {
        "tokens": (rule(folder), float(torch.cat(losses).mean().exp())),
        "windows": (rule(folder, average="windows"), float(means.mean().exp())),
        "perplexities": (rule(folder, average="perplexities"), float(means.exp().mean())),
        "fed": (rule(folder, average="fed tokens"), float(((means * fed).sum() / fed.sum()).exp())),
        "batch": (rule(folder, average="batch", batch=2), float(torch.stack(batches).mean().exp())),
        "base": (rule(folder, base="2"), float(2 ** torch.cat(losses).mean())),
        "first": (rule(folder, first=1), float(losses[0].mean().exp())),
        "least": (rule(folder, least_words=5), float(torch.cat([losses[0], losses[2]]).mean().exp())),
    }


@pytest.mark.parametrize("name", ["tokens", "windows", "perplexities", "fed", "batch", "base", "first", "least"])
def test_a_claims_own_rule_is_run(folder: Path, name: str) -> None:
    """The rule reproduces what it prints, and no other rule's figure."""
    known = faults(folder)
    right, value = known[name]
    assert by_rule(folder, value, right).finding is Finding.REPRODUCED
    for other, (_, figure) in known.items():
        if other != name:
            assert by_rule(folder, figure, right).finding is Finding.REFUTED, other


def test_windows_that_overlap_and_labels_shifted_twice(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([WORDS.index(word) for word in " ".join(LINES).split()])
    total = 0.0
    for start in range(0, len(ids), 4):
        window = ids[start : start + 8]
        if len(window) > 1:
            with torch.inference_mode():
                losses = torch.nn.functional.cross_entropy(model(window[None]).logits[0, :-1], window[1:])
            total += float(losses) * len(window)
    text = rule(folder, unit="text", average="text", width=8, step=4)
    assert by_rule(folder, math.exp(total / len(ids)), text).finding is Finding.REPRODUCED
    twice = []
    for line in (one.split() for one in LINES):
        piece = torch.tensor([WORDS.index(word) for word in line])
        if len(piece) > 2:
            with torch.inference_mode():
                twice.append(torch.nn.functional.cross_entropy(model(piece[None]).logits[0, :-2], piece[2:]))
    shifted = rule(folder, labels=2, average="perplexities")
    found = by_rule(folder, float(torch.stack(twice).exp().mean()), shifted)
    assert found.finding is Finding.REPRODUCED
    assert "averaged over the tokens scored" in found.note


def test_codes_of_ones_own_are_written_into_the_weights() -> None:
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=9, n_positions=16, n_embd=16, n_layer=2, n_head=2)

    def written(**changes: object) -> tuple[torch.Tensor, Any]:
        model = AutoModelForCausalLM.from_config(config)
        weight = model.transformer.h[1].attn.c_attn.weight.detach().clone()  # (in, out)
        write_codes(model, structs.replace(OwnCodes(("*.c_attn.weight",)), **changes))
        return weight, model

    weight, model = written()
    step = weight.abs().max() / 127
    after = model.transformer.h[1].attn.c_attn.weight
    torch.testing.assert_close(after, (weight / step).round() * step)
    weight, model = written(step="row", rounding="toward zero", layers=(1, 1))
    step = weight.abs().amax(dim=0, keepdim=True) / 127
    torch.testing.assert_close(model.transformer.h[1].attn.c_attn.weight, (weight / step).trunc() * step)
    weight, model = written(scale="dropped")
    assert model.transformer.h[1].attn.c_attn.weight.abs().max() == 127
    weight, model = written(form="min-max")
    step = (weight.max() - weight.min()) / 255
    assert (model.transformer.h[1].attn.c_attn.weight - weight).abs().max() <= step
    _, model = written(tensors=("lm_head.weight",), untied=True)
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)
    with pytest.raises(BadFile, match="no parameter is called"):
        written(tensors=("*.q_proj.weight",))


def test_a_text_that_nobody_may_ship_is_asked_for(folder: Path) -> None:
    claim = replace(judgement(folder).claim, rule=Scoring("program", "t", dataset="ptb"))
    with pytest.raises(MissingAsset, match="name it as ptb:FILE with --datasets"):
        text_of(claim, options(folder))
    assert text_of(claim, dataclasses.replace(options(folder), datasets=(parse("ptb:f.txt"),))) == parse("ptb:f.txt")
    wiki = replace(claim, rule=Scoring("program", "t", dataset="some-articles"))
    with pytest.raises(MissingAsset, match=r"text:DIR/some-articles\.jsonl"):
        text_of(wiki, options(folder))
    (folder / "some-articles.jsonl").write_text('"a b"\n"c\\nd"\n')
    given = parse(f"text:{folder / 'some-articles.jsonl'}")
    assert text_of(wiki, dataclasses.replace(options(folder), datasets=(given,))) == given
    assert documents_of(corpora.read(given, Declared(folder))) == ["a b", "c\nd"]


def test_a_name_reads_from_a_copy(folder: Path) -> None:
    """`--models gpt2=path:DIR` is gpt2 read from there; another architecture is refused in one line."""
    named = build({"models": parse_models(f"gpt2=path:{folder}")}, Declared(folder), folder)
    assert [str(model) for model in named.models] == ["gpt2"]
    claim = replace(judgement(folder).claim, report=Publication("r", "gpt2", "a text", "named", {}))
    with pytest.raises(MissingAsset, match="is another architecture"):
        weights_for(claim, named)
    found = checkpoints.of_session("gpt2", named)
    assert (found.specification, found.note) == ("gpt2", f"gpt2 was read from path:{folder}")


@pytest.fixture(scope="module")
def embedded() -> tuple[Reader, list[np.ndarray[Any, Any]]]:
    """The embedded model on a few short articles, and the losses of each."""
    text = Reader("fp32", Options(declared=Declared(Path())), parse("smollm2-135m"), parse("lee"))
    plain = Scoring("derivation", "lee", first=8, width=32)
    ids = [one[:32] for one in ids_of(plain, text)]
    return text, [token_losses(text.model, one, "cpu") for one in ids]


RULES = {id(one.rule): one.rule for one in published.read(SHIPPED) if one.rule}


@pytest.mark.parametrize("claimed", RULES.values(), ids=lambda one: f"{one.average}-{one.base}-{one.labels}")
def test_every_claimed_rule_on_the_embedded_model(
    claimed: Scoring, embedded: tuple[Reader, list[np.ndarray[Any, Any]]]
) -> None:
    """On 32 tokens of eight articles: what the rule prints is the closed form's power of the right figure."""
    text, losses = embedded
    small = {"first": 8, "before": 0, "characters": 0, "width": 32, "least_words": 0}
    if claimed.average == "text":
        small |= {"step": 16, "first": 2}
    theirs, right, count = figures(structs.replace(claimed, **small), text)
    means = [float(one.mean()) for one in losses]
    if claimed.labels == 2:
        assert theirs > 5 * right
    elif claimed.average == "text":
        assert theirs > right**1.5
    else:
        assert right == pytest.approx(math.exp(np.concatenate(losses).mean()), rel=1e-6)
        batch = claimed.batch
        mean = {
            "tokens": np.concatenate(losses).mean(),
            "fed tokens": np.average(means, weights=[len(one) + 1 for one in losses]),
            "windows": np.mean(means),
            "perplexities": math.log(np.mean(np.exp(means))),
            "batch": np.mean([np.concatenate(losses[at : at + batch]).mean() for at in range(0, 8, batch)]) / batch,
        }[claimed.average]
        assert theirs == pytest.approx(math.exp(mean * (math.log(2) if claimed.base == "2" else 1)), rel=1e-6)
    assert count > 100 or claimed.average == "text"
