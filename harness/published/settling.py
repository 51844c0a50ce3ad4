"""Claims that weights settle: the claimed protocol run on the model, where its weights can be had."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.core.options import Options
from harness.core.specification import Specification, parse
from harness.inputs.models import names
from harness.inputs.texts import corpora, protocols
from harness.published.claims import Claim
from harness.published.judging import Finding, Judgement

if TYPE_CHECKING:  # annotations only
    from harness.core.contracts import Checkpoint, TokenPlan

SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
EMPTY_ROW = " \n"  # how the port reads an empty row; other rows keep their own line ends


def weights_for(claim: Claim, options: Options) -> Specification | None:
    """The session's model that a claim speaks of: by its name, else by its architecture (a local copy, another name).

    Raises:
        HarnessError: a model that is named as a folder or file and cannot be had.
    """
    wanted = claim.report.model
    if any(str(model) == wanted for model in options.models):
        return parse(wanted)
    others = (model for model in options.models if str(model) not in names.KNOWN)
    return next((model for model in others if shape_of(model, options) == shape_of(parse(wanted), options)), None)


def shape_of(model: Specification, options: Options) -> tuple[object, ...]:
    """What tells architectures apart: model type, widths, depth, vocabulary, positions."""
    from harness.inputs.models import architectures, checkpoints

    if str(model) in names.KNOWN:
        config: Any = architectures.config_of(str(model))
    else:
        config = checkpoints.read_config(_checkpoint(model, options))
    return config.model_type, *(getattr(config, name, None) for name in SHAPE)


def _checkpoint(model: Specification, options: Options) -> Checkpoint:
    from harness.inputs.models import checkpoints

    return checkpoints.materialise(
        model, options.declared, allow_pickle=options.allow_pickle, trust_remote_code=options.trust_remote_code
    )


def settle(judgement: Judgement, options: Options, weights: Specification) -> Judgement:
    """Measure a claim that needs weights; the verdict is 'reproduced' or 'refuted', by the claim's own reading.

    Raises:
        HarnessError: weights or text cannot be had; one line that says how.
    """
    claim = judgement.claim
    given = {"allow_pickle": options.allow_pickle, "trust_remote_code": options.trust_remote_code}
    names.check(weights, options.declared, **given)
    corpora.check(parse(claim.dataset), options.declared)
    ours, theirs = measured(claim, options, weights)
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


def measured(claim: Claim, options: Options, weights: Specification) -> tuple[float, float]:
    """Perplexity under our protocol, and under the source's own reading where that differs (else the same twice)."""
    from harness.inputs.models import checkpoints
    from harness.metrics.measuring import engine

    device = "cpu" if options.device == "auto" else options.device
    checkpoint = _checkpoint(weights, options)
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
