"""Calibration texts: what a calibrated method may look at, and how it is named.

By default it is `lee-50`, news articles that are not among those of `lee`, where the model's tokenizer reads English,
and else a text that the model writes itself: windows drawn token by token from its own distribution with a seed. Any
known or declared dataset without arguments can be named instead. A text that is measured on, or that shares a line
with it, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.contracts import Arguments, Parameter
from harness.core.errors import BadSpecification, HarnessError
from harness.core.options import Declared
from harness.core.specification import Specification
from harness.inputs.models.context import context_of
from harness.inputs.texts import corpora

if TYPE_CHECKING:  # annotations only
    from torch import Tensor

    from harness.core.contracts import Checkpoint
    from harness.inputs.texts.corpora import Corpus

OWN = "model"  # the text that the model writes
AUTO, REAL = "auto", "lee-50"
PROBE = "Members of the council will meet again on Monday to decide where the money should go."
UNKNOWN = 0.05  # share of unknown tokens in the probe above which a tokenizer does not read English
SHORTEST = 40  # characters of a line that two texts may not share
PARAMETERS: Mapping[str, Parameter] = {
    "text": Parameter(
        str,
        AUTO,
        f"calibration text: a dataset's name, '{OWN}' (the model writes it), or '{AUTO}' ({REAL} where the tokenizer "
        f"reads English, else {OWN})",
    ),
    "windows": Parameter(int, 32, "windows of calibration text"),
    "length": Parameter(int, 256, "tokens a window"),
    "seed": Parameter(int, 0, "of the draw: of the model's text, or of where windows start in a dataset"),
}


def refuse_evaluation_text(arguments: Arguments, datasets: Sequence[Specification], method: str) -> None:
    """BadSpecification where a method would be calibrated on a text that it is measured on."""
    text = str(arguments.values.get("text", ""))
    text = REAL if text == AUTO else text
    if text in map(str, datasets):
        raise BadSpecification(f"{method} would be calibrated on '{text}', on which it is measured: name another text")


def refuse_shared_lines(facts: Mapping[str, Any], measured: Corpus, declared: Declared, method: str) -> None:
    """HarnessError where a line of the calibration text stands in the measured text, under whatever names."""
    text = facts["text"]
    if text == OWN:
        return
    if facts.get("text_revision") == measured.revision:
        raise HarnessError(f"{method} was calibrated on '{text}', which is the very text that it is measured on")
    if shared := lines(corpora.read(Specification(text), declared)) & lines(measured):
        which = f"{len(shared)} line{'s' * (len(shared) > 1)} ('{min(shared)[:SHORTEST]}...')"
        raise HarnessError(
            f"{method} was calibrated on '{text}', which shares {which} with '{measured.name}', on which it is "
            "measured: name another text"
        )


def lines(corpus: Corpus) -> set[str]:
    """A text's lines of some length, blanks around them aside."""
    stripped = (line.strip() for document in corpus.documents for line in document.splitlines())
    return {line for line in stripped if len(line) >= SHORTEST}


def chosen(text: str, checkpoint: Checkpoint) -> str:
    """The text behind 'auto'; any other as it is."""
    if text != AUTO:
        return text
    from harness.inputs.models import checkpoints

    tokenizer: Any = checkpoints.tokenizer(checkpoint)
    ids = tokenizer(PROBE, add_special_tokens=False).input_ids
    unknown = sum(token == tokenizer.unk_token_id for token in ids)
    return REAL if ids and unknown <= UNKNOWN * len(ids) else OWN


def windows(model: Any, checkpoint: Checkpoint, arguments: Arguments) -> tuple[list[Tensor], dict[str, Any]]:
    """Token ids, (1, length) each, and what a measurement records of them: text, seed, count, tokens, sha256."""
    import hashlib

    import numpy as np

    values = arguments.values
    count, seed = int(values["windows"]), int(values["seed"])
    context = context_of(model.config) or int(values["length"])
    length = min(int(values["length"]), context - 1)  # one token is fed to begin with
    if count < 1 or length < 2:
        raise BadSpecification("a calibration needs at least one window of two tokens")
    text = chosen(str(values["text"]), checkpoint)
    revision = ""
    if text == OWN:
        result = drawn(model, count, length, seed)
    else:
        declared = arguments.declared or Declared(Path())
        result, revision = cut(text, declared, checkpoint, count, length, seed, model)
    ids = np.concatenate([window.cpu().numpy().ravel() for window in result]).astype("<i4")
    sha = hashlib.sha256(ids.tobytes()).hexdigest()
    facts = {"text": text, "seed": seed, "windows": count, "tokens_a_window": length, "token_sha256": sha}
    facts |= {"text_revision": revision} if revision else {}
    return result, facts


def drawn(model: Any, count: int, length: int, seed: int) -> list[Tensor]:
    """Windows that the model writes, without the token it begins with: they start inside a text, as evaluations do."""
    import torch

    config = model.config
    first = next((token for token in (config.bos_token_id, config.eos_token_id) if isinstance(token, int)), 0)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = torch.full((count, 1), first)
    cache = None
    with torch.inference_mode():
        while ids.shape[1] <= length:
            output = model(input_ids=ids[:, -1:].to(device), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            chances = output.logits[:, -1].float().softmax(dim=-1).cpu()  # (count, vocabulary)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return list(torch.split(ids[:, 1:].to(device), 1))


def cut(
    text: str, declared: Declared, checkpoint: Checkpoint, count: int, length: int, seed: int, model: Any
) -> tuple[list[Tensor], str]:
    """Windows of a dataset, known or declared, their starts drawn with the seed, and the dataset's revision."""
    import torch

    from harness.inputs.models import checkpoints

    corpus = corpora.read(Specification(text), declared)
    reading = corpus.joined("chunk")
    tokenizer: Any = checkpoints.tokenizer(checkpoint)
    ids = torch.tensor(tokenizer(reading.texts[0], add_special_tokens=False, verbose=False).input_ids)
    if len(ids) <= length:
        raise BadSpecification(
            f"the calibration text '{text}' has {len(ids)} tokens, a window {length}: write length=N"
        )
    starts = torch.randint(0, len(ids) - length, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    device = next(model.parameters()).device
    return [ids[None, start : start + length].to(device) for start in starts], corpus.revision
