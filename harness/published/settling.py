"""Perplexities that weights settle: a claimed rule run on the model, where its weights can be had.

A rule (`origins.Scoring`) runs as its program ran it, faults and all: pieces of text, windows, what is scored, how it
is averaged, and codes written into the weights where no method of ours makes them. What it gives stands beside the
right average of the same losses. The digits are theirs, the last bits of a sum are a machine's: within `NEAR` of the
printed figure it is reproduced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import structs

from harness.core import catalog
from harness.core.errors import BadFile, MissingAsset, TextTooShort
from harness.core.options import Options
from harness.core.specification import Specification, parse
from harness.inputs.models import names
from harness.inputs.texts import corpora, protocols
from harness.published import origins
from harness.published.claims import Claim, TensorGroup
from harness.published.counting import config_of, covers
from harness.published.judging import Finding, Judgement
from harness.published.origins import OwnCodes, Scoring

if TYPE_CHECKING:
    from harness.core.contracts import Checkpoint, TokenPlan, Window

SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
EMPTY_ROW = " \n"  # how the port reads an empty row; other rows keep their own line ends
NEAR = Decimal("1e-4")  # relative: libraries and kernels move a perplexity in the fifth digit
FILES = (".txt", ".jsonl")  # of a text that a reader brings: a document a line, plain or as a JSON string
INT8, UINT8 = 127, 255


def weights_for(claim: Claim, options: Options) -> Specification | None:
    """The session's model that a claim speaks of: by its name, else by its architecture (a local copy, another name).

    HarnessError where one is named as a folder or file that cannot be had, or as another architecture.
    """
    wanted = claim.report.model
    named = next((model for model in options.models if str(model) == wanted), None)
    known = claim.report.architecture or wanted in names.ARCHITECTURES
    if named is not None:
        if named.source and known and shape_of(parse(named.source), options) != shape_claimed(claim):
            raise MissingAsset(f"{wanted}={named.source} is another architecture: name a copy of {wanted}")
        return named
    if not known and not wanted.startswith("path:"):
        return None
    ours = shape_claimed(claim) if known else shape_of(parse(wanted), options)
    others = (model for model in options.models if str(model) not in names.KNOWN)
    return next((model for model in others if shape_of(model, options) == ours), None)


def shape_claimed(claim: Claim) -> tuple[object, ...]:
    """`shape_of` the model that a report speaks of."""
    return _shape(config_of(claim.report.model, claim.report.architecture))


def shape_of(model: Specification, options: Options) -> tuple[object, ...]:
    """What tells architectures apart: model type, widths, depth, vocabulary, positions."""
    from harness.inputs.models import checkpoints

    if str(model) in names.ARCHITECTURES:
        return _shape(names.config_of(str(model)))
    return _shape(checkpoints.read_config(_checkpoint(model, options)))


def _shape(config: Any) -> tuple[object, ...]:
    return config.model_type, *(getattr(config, name, None) for name in SHAPE)


def _checkpoint(model: Specification, options: Options) -> Checkpoint:
    from harness.inputs.models import checkpoints

    return checkpoints.materialise(
        model, options.declared, allow_pickle=options.allow_pickle, trust_remote_code=options.trust_remote_code
    )


class Reader:
    """A method's model on a text of a claim; HarnessError, one line that says how, where either cannot be had."""

    def __init__(self, specification: str, options: Options, weights: Specification, text: Specification) -> None:
        from harness.inputs.models import checkpoints
        from harness.methods.quantizing.arguments import resolve

        allowed = {"allow_pickle": options.allow_pickle, "trust_remote_code": options.trust_remote_code}
        names.locate(weights, options.declared, **allowed)
        corpora.check(text, options.declared)
        checkpoint, wanted = _checkpoint(weights, options), parse(specification)
        self.device = "cpu" if options.device == "auto" else options.device
        self.tokenizer = checkpoints.tokenizer(checkpoint)
        self.context: int = checkpoints.read_config(checkpoint).max_position_embeddings  # tokens
        method = catalog.methods()[wanted.name]
        arguments = replace(resolve(wanted, method, self.device), declared=options.declared)
        self.model = method.load(checkpoint, arguments, self.device)
        self.corpus = corpora.read(text, options.declared)

    def plan(self, corpus: corpora.Corpus, protocol: str) -> TokenPlan:
        """The windows of a text under a protocol of ours: of all of it, whatever the session's --max-tokens."""
        form = protocols.parse(parse(protocol))
        return protocols.plan(corpus, form, self.tokenizer, context=self.context, max_tokens=None)

    def nll(self, windows: Sequence[Window], batch_size: int = 1) -> Any:
        """(tokens,) nats in float64."""
        from harness.metrics.measuring import engine

        nll = engine.score(self.model, windows, device=self.device, batch_size=batch_size)
        return nll.astype(np.float64)


def settle(judgement: Judgement, options: Options, weights: Specification) -> Judgement:
    """Measure a claim that needs weights (HarnessError as of `Reader`): reproduced or refuted, in its own reading."""
    claim = judgement.claim
    if claim.rule is not None:
        return by_rule(judgement, claim.rule, options, weights)
    text = Reader("fp32", options, weights, parse(claim.dataset))

    def value(corpus: corpora.Corpus, port: bool) -> float:
        plan = text.plan(corpus, claim.text_protocol)
        plan = led_by(plan, protocols.prefix_token(text.tokenizer)) if port else plan
        nll = text.nll(plan.windows, options.batch_size)
        if claim.metric.endswith("_word"):
            return float(np.exp(nll.sum() / plan.normalisers["word"]))
        return protocols.aggregate(nll, plan)

    ours = theirs = value(text.corpus, False)
    if claim.reading == "port":
        theirs = value(as_port(text.corpus), True)
    note = f"measured {theirs:.4f} as the source reads the text"
    if ours != theirs:
        note += f", {ours:.4f} as our {claim.text_protocol} does"
    finding = Finding.REPRODUCED if within(claim, theirs) else Finding.REFUTED
    return replace(judgement, finding=finding, ours=Decimal(theirs), note=f"{note}; {judgement.note}")


def within(claim: Claim, value: float) -> bool:
    """Whether a value prints as the claim does, or lies within its slack or, by its own rule, within `NEAR` of it."""
    off = abs(Decimal(value) - claim.value)
    if claim.slack:
        return off <= Decimal(claim.slack)
    near = claim.rule is not None and off <= NEAR * claim.value
    return near or claim.printed(Decimal(value)) == claim.value


def by_rule(judgement: Judgement, rule: Scoring, options: Options, weights: Specification) -> Judgement:
    """Run a claim's own rule on weights and text: reproduced, or refuted with what the rule gives."""
    claim = judgement.claim
    method = "fp32" if claim.codes else claim.specification
    if not method:
        raise MissingAsset(f"{claim.id}: no method of ours makes its weights")
    text = Reader(method, options, weights, text_of(claim, options))
    if claim.codes:
        write_codes(text.model, claim.codes)
    theirs, right, count = figures(rule, text)
    true = f", {right:.4f} averaged over the tokens scored" if abs(right / theirs - 1) > float(NEAR) else ""
    note = f"measured {theirs:.6f} by its own rule{true}, {count:,} tokens"
    finding = Finding.REPRODUCED if within(claim, theirs) else Finding.REFUTED
    return replace(judgement, finding=finding, ours=Decimal(theirs), note=f"{note}; {judgement.note}")


def figures(rule: Scoring, text: Reader) -> tuple[float, float, int]:
    """What a rule prints of a model on a text, what right labels and the plain average give, and the tokens scored."""
    pieces, width = ids_of(rule, text), min(rule.width or text.context, text.context)
    tokens = sum(map(len, pieces))
    if rule.unit == "document":  # what a program cuts off is not read
        cut = [piece[:width] for piece in pieces]
    else:
        cut = [piece[start:end] for piece in pieces for start, end in origins.windows(rule, len(piece), width)]
    fed = [ids for ids in cut if len(ids) > rule.labels]
    found = [losses(text.model, ids, text.device, rule.labels) for ids in fed]
    if not found:
        raise TextTooShort(f"nothing of {rule.text} is left to score")
    right = replace_rule(rule)
    plain = found if rule.labels == 1 else [losses(text.model, ids, text.device) for ids in fed]
    counts = [len(ids) for ids in fed]
    theirs = origins.printed(rule, found, counts, tokens)
    return theirs, origins.printed(right, plain, counts, tokens), sum(map(len, found))


def replace_rule(rule: Scoring) -> Scoring:
    """The same text and windows with the right labels, base and average."""
    return structs.replace(rule, labels=1, base="e", average="tokens", batch=1)


def ids_of(rule: Scoring, text: Reader) -> list[Any]:
    """Token ids of each piece of text that a rule reads, (tokens,) each; no BOS, since no program here puts one."""
    documents = documents_of(text.corpus)
    documents = documents[: rule.before or None]
    if rule.strip:
        documents = [document.strip() for document in documents]
    if not rule.blank:
        documents = [document for document in documents if document.strip()]
    documents = [document for document in documents if len(document.split()) >= rule.least_words]
    documents = [document[: rule.characters or None] for document in documents[: rule.first or None]]
    if rule.unit == "text":
        documents = ["\n".join(documents)]
    ids = (protocols.encode(text.tokenizer, document) for document in documents)
    return [one for one in ids if len(one)]


def documents_of(corpus: corpora.Corpus) -> list[str]:
    """The rows of a text; of a plain file its lines."""
    if corpus.layout != "file":
        return list(corpus.documents)
    return "".join(corpus.documents).removesuffix("\n").split("\n")


def losses(model: Any, ids: Any, device: str, ahead: int = 1) -> Any:
    """(tokens - ahead,) nats in float64 of one window: each token under the logits `ahead` places before it."""
    import torch
    from torch.nn.functional import cross_entropy

    fed = torch.from_numpy(np.ascontiguousarray(ids))[None].to(device)  # (1, L)
    with torch.inference_mode():
        logits = model(input_ids=fed, use_cache=False).logits[0, : len(ids) - ahead].float()  # (L - ahead, V)
        return cross_entropy(logits, fed[0, ahead:], reduction="none").double().cpu().numpy()


def write_codes(model: Any, codes: OwnCodes) -> None:
    """Put what a program's own codes stand for into the weights of an fp32 model, in place."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    if codes.untied:
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    group, taken = TensorGroup(codes.tensors, 8, codes.layers), 0
    for name, parameter in model.named_parameters():
        if not covers(group, name):
            continue
        taken += 1
        weight = parameter.detach().float()
        across = 0 if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) else 1  # what a row runs over
        by_row = codes.step == "row" and weight.dim() == 2
        low = weight.amin(dim=across, keepdim=True) if by_row else weight.min()
        high = weight.amax(dim=across, keepdim=True) if by_row else weight.max()
        spread = torch.maximum(high, -low) if codes.form == "absmax" else high - low
        scale = (spread / (INT8 if codes.form == "absmax" else UINT8)).clamp(min=torch.finfo(torch.float32).tiny)
        zero = (-low / scale).round().clamp(0, UINT8) if codes.form == "min-max" else torch.zeros_like(scale)
        steps = weight / scale + zero
        kept = steps.trunc() if codes.rounding == "toward zero" else steps.round()
        least, most = (0, UINT8) if codes.form == "min-max" else (-INT8 - 1, INT8)
        kept = kept.clamp(least, most) - zero
        parameter.data.copy_(kept if codes.scale == "dropped" else kept * scale)
    if not taken:
        raise BadFile(f"no parameter is called {' or '.join(codes.tensors)}")


def as_port(corpus: corpora.Corpus) -> corpora.Corpus:
    """The rows put together as the port of llama.cpp's tool does."""
    rows = "".join(EMPTY_ROW if not row.strip() else row for row in corpus.documents)
    return replace(corpus, documents=(rows,), layout="file")


def led_by(plan: TokenPlan, token: int) -> TokenPlan:
    """The plan with every window's first token overwritten."""
    windows = (replace(window, ids=np.array([token, *window.ids[1:]], window.ids.dtype)) for window in plan.windows)
    return replace(plan, windows=tuple(windows))


def text_of(claim: Claim, options: Options) -> Specification:
    """The session's own file where the claim's text has no source that can be fetched: ptb:FILE, or its name as TXT."""
    name = claim.rule.dataset if claim.rule else claim.dataset
    if not name:
        raise MissingAsset(f"{claim.id}: its text is not at hand")
    if name == "ptb":
        given = next((dataset for dataset in options.datasets if dataset.name == "ptb"), None)
        if given is None:
            raise MissingAsset(f"{corpora.PTB_ADVICE} with --datasets")
        return given
    if name in corpora.DATASETS or ":" in name:
        return parse(name)
    wanted = {f"{name}{ending}" for ending in FILES}
    for dataset in options.datasets:
        if dataset.name == "text" and dataset.words[0].rpartition("/")[2] in wanted:
            return dataset
    raise MissingAsset(f"{claim.id}: its text is {name}: add --datasets text:DIR/{name}.jsonl, a document a line")
