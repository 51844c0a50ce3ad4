"""Claims that weights settle: the claimed protocol run on the model, where its weights can be had."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from harness import corpora, models, protocols
from harness.options import Options
from harness.published.claims import Claim
from harness.published.judging import Finding, Judgement
from harness.specifications import parse

if TYPE_CHECKING:  # annotations only
    from harness.contracts import TokenPlan

EMPTY_ROW = " \n"  # how the port reads an empty row; other rows keep their own line ends


def settle(judgement: Judgement, options: Options) -> Judgement:
    """Measure a claim that needs weights; the verdict is 'reproduced' or 'refuted', by the claim's own reading.

    Raises:
        HarnessError: weights or text cannot be had; one line that says how.
    """
    claim = judgement.claim
    corpora.check(parse(claim.dataset), options.declared)
    models.check(parse(claim.report.model), options.declared)
    ours, theirs = measured(claim, options)
    agrees = within(claim, theirs)
    note = f"measured {theirs:.4f} as the source reads the text"
    if ours != theirs:
        note += f", {ours:.4f} as our {claim.text_protocol} does"
    finding = Finding.REPRODUCED if agrees else Finding.REFUTED
    return replace(judgement, finding=finding, ours=Decimal(theirs), note=f"{note}; {judgement.note}")


def within(claim: Claim, value: float) -> bool:
    """Whether a measured value prints as the claim does, or lies within its stated slack."""
    if claim.slack:
        return abs(Decimal(value) - claim.value) <= Decimal(claim.slack)
    return claim.printed(Decimal(value)) == claim.value


def measured(claim: Claim, options: Options) -> tuple[float, float]:
    """Perplexity under our protocol, and under the source's own reading where that differs (else the same twice)."""
    from harness import checkpoints, engine

    device = "cpu" if options.device == "auto" else options.device
    checkpoint = checkpoints.materialise(
        parse(claim.report.model),
        options.declared,
        allow_pickle=options.allow_pickle,
        trust_remote_code=options.trust_remote_code,
    )
    tokenizer, config = checkpoints.tokenizer(checkpoint), checkpoints.read_config(checkpoint)
    corpus = corpora.read(parse(claim.dataset), options.declared)
    protocol = protocols.parse(parse(claim.text_protocol))
    model = checkpoints.open_model(checkpoint, "fp32", device)

    def value(text: corpora.Corpus, port: bool) -> float:
        context = config.max_position_embeddings
        plan = protocols.plan(text, protocol, tokenizer, context=context, max_tokens=options.max_tokens)
        plan = led_by(plan, protocols.prefix_token(tokenizer)) if port else plan
        nll = engine.score(model, plan.windows, device=device, batch_size=options.batch_size)
        if claim.metric.endswith("_word"):
            return float(np.exp(nll.astype(np.float64).sum() / plan.normalisers["word"]))
        return protocols.aggregate(nll, plan)

    ours = value(corpus, False)
    return ours, value(as_port(corpus), True) if claim.reading == "port" else ours


def as_port(corpus: corpora.Corpus) -> corpora.Corpus:
    """The rows put together as the port of llama.cpp's tool does."""
    rows = "".join(EMPTY_ROW if not row.strip() else row for row in corpus.documents)
    return replace(corpus, documents=(rows,), layout="file")


def led_by(plan: TokenPlan, token: int) -> TokenPlan:
    """The plan with every window's first token overwritten."""

    def lead(ids: Any) -> Any:
        led = ids.copy()
        led[0] = token
        return led

    return replace(plan, windows=tuple(replace(window, ids=lead(window.ids)) for window in plan.windows))
