"""Faults in what is scored and how it is averaged."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import cross_entropy

from harness.core.contracts import Window
from harness.core.stats import Estimate, paired_delta
from harness.inputs.texts import protocols
from harness.published.origins import Scoring, printed
from harness.published.origins import windows as windows_of
from harness.published.pitfalls import averaged, perplexity
from studies.pitfalls.bench import Bench, Shown, mean

SHORT = 64  # tokens of a window where BOS is missed: the shorter, the larger its share in what a token can look at
BATCH = 4  # sentences, as in report 1e290afccbc8fef6
BASES: tuple[Literal["2", "e"], ...] = ("2", "e")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def offset_nll(model: nn.Module, windows: Sequence[Window], offset: int) -> NDArray[np.float32]:
    """NLL of each window's ids under the logits `offset` places before them: 1 is right, 0 not shifted, 2 twice."""
    found = []
    with torch.inference_mode():
        for window in windows:
            ids = torch.from_numpy(window.ids)[None]  # (1, L)
            logits = model(input_ids=ids, use_cache=False).logits[0].float()  # (L, V)
            found.append(cross_entropy(logits[: len(logits) - offset], ids[0, offset:], reduction="none"))
    return torch.cat(found).numpy()


def labels_not_shifted(bench: Bench) -> Shown:
    """The logits of a position are scored against its own token instead of the next.

    A causal model has read that token and predicts what follows it, so it is marked down for being right.
    """
    return _at_offset(bench, 0)


def labels_shifted_twice(bench: Bench) -> Shown:
    """Labels are cut by hand, ids[1:] under ids[:-1], and given to a loss of the library, which shifts them again.

    Every position is then asked for the token after the next. The figure grows to thousands, and a coarser method,
    whose distributions are flatter, does better.
    """
    return _at_offset(bench, 2)


def _at_offset(bench: Bench, offset: int) -> Shown:
    model = bench.open()
    windows = [window for window in bench.plan.windows if window.scored > 1]
    fault, right = offset_nll(model, windows, offset), offset_nll(model, windows, 1)

    def figures(nll: NDArray[np.float32]) -> dict[str, float]:
        return {
            "perplexity": perplexity(nll),
            "mean NLL, nat": mean(nll),
            "reference perplexity": perplexity(right),
        }

    return Shown(figures(fault), figures(right))


def losses(bench: Bench, model: nn.Module, windows: Sequence[Window]) -> list[NDArray[np.float64]]:
    """Each window's losses, nats."""
    nll = bench.nll(model, windows).astype(np.float64)
    return np.split(nll, np.cumsum([window.scored for window in windows])[:-1])


def windows_scored_twice(bench: Bench) -> Shown:
    """Windows overlap by half, each is scored whole, and the sum is divided by the text's length.

    Nearly every token is scored twice and counted once, so the exponent is nearly twice the mean NLL and the figure
    nearly the square. The right version divides the same sum by what it is a sum over, the windows' lengths.
    """
    model, width = bench.open(), bench.width // 2
    ids = np.concatenate([window.ids for window in bench.plan.windows])
    rule = Scoring(
        "derivation", "this text", unit="text", average="text", width=width, step=width // 2, tokens=len(ids)
    )
    places = windows_of(rule, len(ids), width)
    windows = [Window(ids[start:end], max(end - start - 1, 0)) for start, end in places]
    windows = [window for window in windows if window.scored]
    found = losses(bench, model, windows)
    means = np.array([one.mean() for one in found])
    lengths = np.array([len(window.ids) for window in windows])
    right = float(np.exp(np.average(means, weights=lengths)))
    fault = printed(rule, found, lengths.tolist(), len(ids))

    def figures(value: float) -> dict[str, float]:
        return {"perplexity": value, "sum / count": right, "windows": len(windows), "tokens of the text": len(ids)}

    power = lengths.sum() / len(ids)
    beside = {"the power": float(power), "right figure to that power": float(right**power)}
    return Shown(figures(fault), figures(right), beside, f"windows of {width}, one every {width // 2}")


def batch_denominator(bench: Bench) -> Shown:
    """A mask of a batch is flattened before it is summed: a sentence's NLL is divided by the tokens of all its batch.

    With four sentences a batch every exponent is a fourth of what it should be, so the figure is the fourth root, and
    so is every ratio to the reference: a method that costs 39% seems to cost 8.5%.
    """
    model = bench.open()
    windows = [window for window in map(bench.window, bench.texts()) if window.scored]
    windows = windows[: len(windows) // BATCH * BATCH]
    found = losses(bench, model, windows)
    batches = [np.concatenate(found[start : start + BATCH]).mean() for start in range(0, len(found), BATCH)]
    right = float(np.exp(np.mean(batches)))
    rule = Scoring("derivation", "this text", average="batch", batch=BATCH)

    def figures(value: float) -> dict[str, float]:
        return {"perplexity": value, "sum / count": right, "sentences a batch": BATCH, "sentences": len(windows)}

    beside = {"right figure to the power 1/4": right ** (1 / BATCH)}
    return Shown(figures(printed(rule, found, [])), figures(right), beside)


def wrong_base(bench: Bench) -> Shown:
    """The mean NLL is in nats, and 2 is raised to it; 2 belongs to bits.

    The figure is the right one to the power ln 2 = 0.693, and every ratio shrinks with it.
    """
    windows = [window for window in bench.plan.windows if window.scored]
    found = losses(bench, bench.open(), windows)
    two, e = (printed(Scoring("derivation", "this text", base=base), found, []) for base in BASES)

    def figures(value: float) -> dict[str, float]:
        return {"perplexity": value, "sum / count": e}

    return Shown(figures(two), figures(e), {"right figure to the power ln 2": e ** math.log(2)})


def reference_on_another_slice(bench: Bench) -> Shown:
    """The reference is read on the first rows only, the candidate on all.

    Texts differ by more than methods do. The ratio of two slices says which slice is harder, and int8 can come out
    better or worse than its reference by as much.
    """
    reference, candidate = bench.open(), bench.open("absmax-int8")
    windows = [window for window in map(bench.window, bench.texts()) if window.scored]
    few = windows[: max(1, len(windows) // 8)]
    ours, theirs, first = bench.nll(candidate, windows), bench.nll(reference, windows), bench.nll(reference, few)

    def figures(nll: NDArray[np.float32]) -> dict[str, float]:
        return {
            "perplexity over its reference": perplexity(ours) / perplexity(nll),
            "reference perplexity": perplexity(nll),
            "perplexity": perplexity(ours),
            "tokens of the reference": len(nll),
            "tokens of the candidate": len(ours),
        }

    return Shown(figures(first), figures(theirs), note=f"`absmax-int8`; {len(few)} of {len(windows)} texts")


def padded_nll(
    model: nn.Module, windows: Sequence[Window], width: int, padding_id: int, *, masked: bool = True
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """NLL of every position of texts padded on the right to `width`, padding scored like text.

    Args:
        model: causal.
        windows: one a text.
        width: tokens a row.
        padding_id: fed and scored behind each text.
        masked: hand the model an attention mask, as one should; the labels are wrong all the same.

    Returns:
        (texts * (width - 1),) nats, and which of them are padding.
    """
    rows, padding = [], []
    with torch.inference_mode():
        for window in windows:
            fed = torch.full((1, width), padding_id)
            fed[0, : len(window.ids)] = torch.from_numpy(window.ids)
            mask = (torch.arange(width) < len(window.ids)).long()[None]  # (1, L)
            given = {"attention_mask": mask} if masked else {}
            logits = model(input_ids=fed, use_cache=False, **given).logits[0, :-1].float()  # (L - 1, V)
            rows.append(cross_entropy(logits, fed[0, 1:], reduction="none"))
            padding.append(mask[0, 1:] == 0)
    return torch.cat(rows).numpy(), torch.cat(padding).numpy()


def padding_scored(bench: Bench) -> Shown:
    """Texts are padded with the end token to one length, and the labels are the padded ids themselves.

    The figure is then mostly how surprised the model is by its end token in the middle of nowhere, and depends on
    the padded length more than on the model. The right version scores the same texts and no padding.
    """
    model = bench.open()
    windows = [window for window in map(bench.window, bench.texts()) if window.scored]
    right = bench.nll(model, windows)
    padding_id = bench.tokenizer.eos_token_id
    fault, padding = padded_nll(model, windows, bench.width, padding_id)
    unmasked, _ = padded_nll(model, windows, bench.width, padding_id, masked=False)
    reference = perplexity(right)

    def figures(nll: NDArray[np.float32], share: float) -> dict[str, float]:
        return {"perplexity": perplexity(nll), "padding scored, %": share, "reference perplexity": reference}

    beside = {
        "perplexity of the text positions among them": perplexity(fault[~padding]),
        "perplexity of the padding among them": perplexity(fault[padding]),
        "perplexity without an attention mask": perplexity(unmasked),
    }
    return Shown(figures(fault, 100 * float(padding.mean())), figures(right, 0.0), beside)


def texts_cut(bench: Bench) -> Shown:
    """Each text is cut to its first characters and scored alone.

    What is left of a text is its beginning, which has the least context and so the highest NLL; the rest, which the
    model would read with ease, is never seen. A width in characters also means another length under every tokenizer.
    """
    model = bench.open()
    texts = bench.texts()
    whole = [window for window in map(bench.window, texts) if window.scored]
    cut = [window for window in (bench.window(text[: bench.characters]) for text in texts) if window.scored]
    right, fault = bench.nll(model, whole), bench.nll(model, cut)

    def figures(nll: NDArray[np.float32]) -> dict[str, float]:
        return {
            "perplexity": perplexity(nll),
            "whole texts": perplexity(right),
            "tokens scored": len(nll),
            "share of the text read, %": 100 * len(nll) / len(right),
        }

    beside = {f"one stream, windows of {bench.width}": perplexity(bench.reference_nll)}
    return Shown(figures(fault), figures(right), beside, f"cut at {bench.characters} characters")


def sentences(line: str) -> list[str]:
    """A line's sentences, cut behind '.', '!' and '?'; a line without them is one."""
    return SENTENCE_END.split(line)


def sentence_average(bench: Bench) -> Shown:
    """A perplexity is taken of each sentence, and the plain mean of them is printed.

    exp is convex, so the mean of exp lies above exp of the mean, and one short odd sentence outweighs pages. The right
    version adds up the same tokens' NLL and divides once.
    """
    model = bench.open()
    windows = [window for window in map(bench.window, bench.texts(sentences)) if window.scored]
    nll = bench.nll(model, windows).astype(np.float64)
    counts = [window.scored for window in windows]
    pieces = np.split(nll, np.cumsum(counts)[:-1])
    means = np.array([piece.mean() for piece in pieces])  # (sentences,)
    right = perplexity(nll)

    def figures(value: float) -> dict[str, float]:
        return {"perplexity": value, "sum / count": right, "sentences": len(pieces), "tokens scored": len(nll)}

    beside = {
        "exp of the mean of sentence means": float(np.exp(means.mean())),
        "largest perplexity of a sentence": float(np.exp(means.max())),
        "tokens scored in that sentence": len(pieces[int(means.argmax())]),
    }
    return Shown(figures(averaged(nll, counts)), figures(right), beside)


def missing_bos(bench: Bench) -> Shown:
    """Windows begin with whatever token the cut fell on, where the model was trained to see its BOS first.

    Trained models park the attention that has nothing to do on the first token (attention sinks: Xiao et al. 2023,
    arXiv 2309.17453). A window without BOS lends it a word. The right version puts the model's BOS before each window
    and scores the same tokens. What it costs shrinks with the window, which the figures beside show.
    """
    model, bos = bench.open(), bench.tokenizer.bos_token_id
    adds = protocols.leading_token(bench.tokenizer, "".join(bench.corpus.documents)) is not None

    def at(width: int) -> tuple[NDArray[np.float32], NDArray[np.float32], Estimate]:
        plan = replace(bench, width=width).plan
        windows = [window for window in plan.windows if window.scored]
        led = [Window(np.concatenate([[bos], window.ids]), window.scored) for window in windows]
        without, right = bench.nll(model, windows), bench.nll(model, led)
        ends = np.cumsum([0, *(window.scored for window in windows)]).tolist()
        return without, right, paired_delta(without, right, [slice(*pair) for pair in itertools.pairwise(ends)])

    without, right, estimate = at(SHORT)

    def figures(nll: NDArray[np.float32]) -> dict[str, float]:
        return {"perplexity": perplexity(nll), "with BOS": perplexity(right), "tokens scored": len(nll)}

    beside = {"change without BOS, nat": estimate.value, "low": estimate.low, "high": estimate.high}
    beside |= {f"change in windows of {width}, nat": at(width)[2].value for width in (SHORT // 2, 2 * SHORT, 8 * SHORT)}
    beside["its tokenizer adds a BOS by itself (1 yes, 0 no)"] = float(adds)
    return Shown(figures(without), figures(right), beside, f"windows of {SHORT} tokens")


def better_than_reference(bench: Bench) -> Shown:
    """A protocol that asks for the wrong token rewards a model for knowing less.

    Coarse weights flatten the distribution, and where the label is wrong (here: not shifted) a flatter one is
    surprised less. Under the right labels the same model is worse, by an interval that excludes 0.
    """
    reference, candidate = bench.open(), bench.open(bench.candidate)
    windows = [window for window in bench.plan.windows if window.scored > 1]

    def figures(offset: int) -> dict[str, float]:
        theirs, ours = offset_nll(reference, windows, offset), offset_nll(candidate, windows, offset)
        ends = np.cumsum([0, *(len(window.ids) - offset for window in windows)]).tolist()
        estimate = paired_delta(ours, theirs, [slice(*pair) for pair in itertools.pairwise(ends)])
        return {
            "delta, nat": estimate.value,
            "low": estimate.low,
            "high": estimate.high,
            "perplexity": perplexity(ours),
            "reference perplexity": perplexity(theirs),
        }

    return Shown(figures(0), figures(1), note=f"`{bench.candidate}`, {len(windows)} windows of {bench.width}")
