"""Perplexities whose protocol or text a report leaves unsaid: the model read in every way that its words allow.

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

from harness.core.errors import MissingAsset
from harness.core.options import Options
from harness.core.specification import Specification, parse
from harness.inputs.models import names
from harness.inputs.texts import corpora, joining, protocols
from harness.published.claims import Claim
from harness.published.judging import Finding, Judgement

if TYPE_CHECKING:  # annotations only
    from harness.core.contracts import Window

NEAR = 0.002  # relative: libraries and kernels move a perplexity in the fourth digit
WIDTHS = (512, 1024, 2048)  # of windows over one text, as common recipes have them
CHARACTERS = 512  # that a text is cut to


def tried(judgement: Judgement, options: Options, weights: Specification) -> Judgement:
    """The judgement with what every reading gives; 'reproduced' or 'not derivable' where the text is named.

    Raises:
        HarnessError: weights or text cannot be had; one line that says how.
    """
    claim = judgement.claim
    allowed = {"allow_pickle": options.allow_pickle, "trust_remote_code": options.trust_remote_code}
    names.check(weights, options.declared, **allowed)
    text = text_of(claim, options)
    corpora.check(text, options.declared)
    found = readings(claim, options, weights, text)
    told = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
    if claim.tried == "cut texts":
        return replace(judgement, note=f"on {text}, not the report's articles: {told}; {judgement.note}")
    name, value = min(found.items(), key=lambda item: abs(item[1] - float(claim.value)))
    near = abs(value / float(claim.value) - 1) <= NEAR
    finding = Finding.REPRODUCED if near else Finding.NOT_DERIVABLE
    said = f"{name} gives {value:.3f}" if near else f"no reading gives it within {NEAR:.1%}"
    return replace(judgement, finding=finding, ours=Decimal(value), note=f"{said}; read as: {told}; {judgement.note}")


def text_of(claim: Claim, options: Options) -> Specification:
    """The session's own file where the claim's text has no source that can be fetched."""
    if claim.dataset != "ptb":
        return parse(claim.dataset)
    given = next((dataset for dataset in options.datasets if dataset.name == "ptb"), None)
    if given is None:
        raise MissingAsset(f"{corpora.PTB_ADVICE} with --datasets")
    return given


def readings(claim: Claim, options: Options, weights: Specification, text: Specification) -> Mapping[str, float]:
    """Perplexity by what was done, of the claim's method on the text."""
    from harness.core import catalog
    from harness.inputs.models import checkpoints
    from harness.methods.quantizing.arguments import resolve
    from harness.metrics.measuring import engine

    device = "cpu" if options.device == "auto" else options.device
    checkpoint = checkpoints.materialise(
        weights, options.declared, allow_pickle=options.allow_pickle, trust_remote_code=options.trust_remote_code
    )
    tokenizer, config = checkpoints.tokenizer(checkpoint), checkpoints.read_config(checkpoint)
    corpus = corpora.read(text, options.declared)
    wanted = parse(claim.specification)
    method = catalog.methods()[wanted.name]
    model = method.load(checkpoint, resolve(wanted, method, device), device)

    def nll(windows: Sequence[Window]) -> Any:
        return engine.score(model, windows, device=device, batch_size=1).astype(np.float64)

    def windows(of: corpora.Corpus, protocol: str) -> tuple[Window, ...]:
        form, context = protocols.parse(parse(protocol)), config.max_position_embeddings
        return protocols.plan(of, form, tokenizer, context=context, max_tokens=options.max_tokens).windows

    if claim.tried == "cut texts":
        cut = windows(cut_pages(corpus), "sentence")
        whole = nll(windows(corpus, f"chunk:{WIDTHS[0]}"))
        return {
            f"its protocol (pages cut to {CHARACTERS} characters, alone)": float(np.exp(nll(cut).mean())),
            f"ours (chunk:{WIDTHS[0]})": float(np.exp(whole.mean())),
        }
    sentences = windows(corpus, "sentence")
    alone = [window for window in sentences if window.scored]
    found = averages("each sentence alone", alone, nll(alone))
    led = [behind(window, protocols.prefix_token(tokenizer)) for window in sentences if len(window.ids)]
    found |= averages("each sentence behind a leading token", led, nll(led))
    for width in (width for width in WIDTHS if width <= config.max_position_embeddings):
        found[f"one text, chunk:{width}"] = float(np.exp(nll(windows(corpus, f"chunk:{width}")).mean()))
    return found


def averages(name: str, windows: Sequence[Window], nll: Any) -> dict[str, float]:
    """The three averages over windows: (tokens,) nats -> perplexities."""
    ends = np.cumsum([window.scored for window in windows])[:-1]
    means = np.array([piece.mean() for piece in np.split(nll, ends)])  # (windows,)
    return {
        f"{name}, over tokens": float(np.exp(nll.mean())),
        f"{name}, over mean losses": float(np.exp(means.mean())),
        f"{name}, over perplexities": float(np.exp(means).mean()),
    }


def behind(window: Window, token: int) -> Window:
    """The window behind a token, all of its own tokens scored."""
    return replace(window, ids=np.concatenate([[token], window.ids]), scored=len(window.ids))


def cut_pages(corpus: corpora.Corpus) -> corpora.Corpus:
    """WikiText's pages, each cut to its first characters; other texts by their documents."""
    pages = joining.wikitext_pages(corpus.documents) if corpus.layout == "wikitext" else corpus.documents
    cut = tuple(" ".join(page[:CHARACTERS].split()) for page in pages)
    return replace(corpus, documents=("\n".join(cut),), layout="file")
