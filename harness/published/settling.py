"""Perplexities that weights settle: a claimed protocol run on the model, where its weights can be had.

Where a report leaves its protocol or text unsaid, the model is read in every way that its words allow (`Claim.tried`).

'sentences': the text is named and consists of sentences, the protocol is not said. Each sentence alone, without and
with a leading token, averaged over tokens, over sentences' mean NLL or over sentences' perplexities; and all of them
as one text in windows. A reading within `NEAR` of the figure reproduces it, else it is not derivable from these.

'cut texts': the protocol is said (each text cut to its first characters, alone, sum / count), the articles are not.
It runs on articles that can be had, beside ours: what a figure of that kind looks like, which settles nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.core import catalog
from harness.core.errors import MissingAsset
from harness.core.options import Options
from harness.core.specification import Specification, parse
from harness.core.stats import spans
from harness.inputs.models import names
from harness.inputs.texts import corpora, protocols
from harness.published.claims import Claim
from harness.published.judging import Finding, Judgement

if TYPE_CHECKING:
    from harness.core.contracts import Checkpoint, TokenPlan, Window

SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
EMPTY_ROW = " \n"  # how the port reads an empty row; other rows keep their own line ends
NEAR = 0.002  # relative: libraries and kernels move a perplexity in the fourth digit
WIDTHS = (512, 1024, 2048)  # of windows over one text, as common recipes have them
CHARACTERS = 512  # that a text is cut to


def weights_for(claim: Claim, options: Options) -> Specification | None:
    """The session's model that a claim speaks of: by its name, else by its architecture (a local copy, another name).

    HarnessError where one is named as a folder or file that cannot be had.
    """
    wanted = claim.report.model
    if any(str(model) == wanted for model in options.models):
        return parse(wanted)
    others = (model for model in options.models if str(model) not in names.KNOWN)
    return next((model for model in others if shape_of(model, options) == shape_of(parse(wanted), options)), None)


def shape_of(model: Specification, options: Options) -> tuple[object, ...]:
    """What tells architectures apart: model type, widths, depth, vocabulary, positions."""
    from harness.inputs.models import checkpoints

    if str(model) in names.KNOWN:
        config: Any = names.config_of(str(model))
    else:
        config = checkpoints.read_config(_checkpoint(model, options))
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
        self.options, self.device = options, "cpu" if options.device == "auto" else options.device
        self.tokenizer = checkpoints.tokenizer(checkpoint)
        self.context: int = checkpoints.read_config(checkpoint).max_position_embeddings  # tokens
        method = catalog.methods()[wanted.name]
        arguments = replace(resolve(wanted, method, self.device), declared=options.declared)
        self.model = method.load(checkpoint, arguments, self.device)
        self.corpus = corpora.read(text, options.declared)

    def plan(self, corpus: corpora.Corpus, protocol: str) -> TokenPlan:
        """The windows of a text under a protocol of ours."""
        form, limit = protocols.parse(parse(protocol)), self.options.max_tokens
        return protocols.plan(corpus, form, self.tokenizer, context=self.context, max_tokens=limit)

    def nll(self, windows: Sequence[Window], batch_size: int = 1) -> Any:
        """(tokens,) nats in float64."""
        from harness.metrics.measuring import engine

        nll = engine.score(self.model, windows, device=self.device, batch_size=batch_size)
        return nll.astype(np.float64)


def settle(judgement: Judgement, options: Options, weights: Specification) -> Judgement:
    """Measure a claim that needs weights (HarnessError as of `Reader`): reproduced or refuted, in its own reading."""
    claim = judgement.claim
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
    """Whether a measured value prints as the claim does, or lies within its stated slack."""
    if claim.slack:
        return abs(Decimal(value) - claim.value) <= Decimal(claim.slack)
    return claim.printed(Decimal(value)) == claim.value


def as_port(corpus: corpora.Corpus) -> corpora.Corpus:
    """The rows put together as the port of llama.cpp's tool does."""
    rows = "".join(EMPTY_ROW if not row.strip() else row for row in corpus.documents)
    return replace(corpus, documents=(rows,), layout="file")


def led_by(plan: TokenPlan, token: int) -> TokenPlan:
    """The plan with every window's first token overwritten."""
    windows = (replace(window, ids=np.array([token, *window.ids[1:]], window.ids.dtype)) for window in plan.windows)
    return replace(plan, windows=tuple(windows))


def tried(judgement: Judgement, options: Options, weights: Specification) -> Judgement:
    """The judgement with what every reading gives (HarnessError as of `Reader`).

    It is 'reproduced' or 'not derivable' where the text is named.
    """
    claim, text = judgement.claim, text_of(judgement.claim, options)
    values = readings(claim.tried, Reader(claim.specification, options, weights, text))
    listed = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
    if claim.tried == "cut texts":
        return replace(judgement, note=f"on {text}, not the report's articles: {listed}; {judgement.note}")
    name, value = min(values.items(), key=lambda item: abs(item[1] - float(claim.value)))
    near = abs(value / float(claim.value) - 1) <= NEAR
    finding = Finding.REPRODUCED if near else Finding.NOT_DERIVABLE
    said = f"{name} gives {value:.3f}" if near else f"no reading gives it within {NEAR:.1%}"
    return replace(judgement, finding=finding, ours=Decimal(value), note=f"{said}; read as: {listed}; {judgement.note}")


def text_of(claim: Claim, options: Options) -> Specification:
    """The session's own file where the claim's text has no source that can be fetched."""
    if claim.dataset != "ptb":
        return parse(claim.dataset)
    given = next((dataset for dataset in options.datasets if dataset.name == "ptb"), None)
    if given is None:
        raise MissingAsset(f"{corpora.PTB_ADVICE} with --datasets")
    return given


def readings(tried: str, text: Reader) -> Mapping[str, float]:
    """Perplexity by what was done, of a method on a text, in the ways of one word of `Claim.tried`."""

    def whole(width: int) -> float:
        return float(np.exp(text.nll(text.plan(text.corpus, f"chunk:{width}").windows).mean()))

    if tried == "cut texts":
        cut = text.nll(text.plan(cut_pages(text.corpus), "sentence").windows)
        return {
            f"its protocol (pages cut to {CHARACTERS} characters, alone)": float(np.exp(cut.mean())),
            f"ours (chunk:{WIDTHS[0]})": whole(WIDTHS[0]),
        }
    sentences = text.plan(text.corpus, "sentence").windows
    alone = [window for window in sentences if window.scored]
    lead = np.array([protocols.prefix_token(text.tokenizer)])  # behind it all of a sentence's own tokens are scored
    led = [replace(one, ids=np.concatenate([lead, one.ids]), scored=len(one.ids)) for one in sentences if len(one.ids)]
    values = averages("each sentence alone", alone, text.nll(alone))
    values |= averages("each sentence behind a leading token", led, text.nll(led))
    return values | {f"one text, chunk:{width}": whole(width) for width in WIDTHS if width <= text.context}


def averages(name: str, windows: Sequence[Window], nll: Any) -> dict[str, float]:
    """The three averages over windows: (tokens,) nats -> perplexities."""
    means = np.array([nll[span].mean() for span in spans(window.scored for window in windows)])  # (windows,)
    return {
        f"{name}, over tokens": float(np.exp(nll.mean())),
        f"{name}, over mean losses": float(np.exp(means.mean())),
        f"{name}, over perplexities": float(np.exp(means).mean()),
    }


def cut_pages(corpus: corpora.Corpus) -> corpora.Corpus:
    """WikiText's pages, each cut to its first characters; other texts by their documents."""
    pages = corpora.wikitext_pages(corpus.documents) if corpus.layout == "wikitext" else corpus.documents
    cut = tuple(" ".join(page[:CHARACTERS].split()) for page in pages)
    return replace(corpus, documents=("\n".join(cut),), layout="file")
