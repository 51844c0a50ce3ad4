"""Calibration texts: what a calibrated method may look at, and how it is named.

By default the model writes its own: windows drawn token by token from its own distribution with a seed, which needs no
data, suits any vocabulary, and cannot be the text that is measured on. Any known or declared dataset without arguments
can be named instead; a plan that measures on it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.contracts import Arguments, Parameter
from harness.errors import BadSpecification, HarnessError
from harness.specifications import Specification

if TYPE_CHECKING:  # annotations only
    from torch import Tensor

    from harness.contracts import Checkpoint

OWN = "model"  # the text that the model writes
PARAMETERS: Mapping[str, Parameter] = {
    "text": Parameter(str, OWN, f"calibration text: '{OWN}' draws it from the model, else the name of a dataset"),
    "windows": Parameter(int, 32, "windows of calibration text"),
    "length": Parameter(int, 256, "tokens a window"),
    "seed": Parameter(int, 0, "of the draw: of the model's text, or of where windows start in a dataset"),
}


def refuse_evaluation_text(arguments: Arguments, datasets: Sequence[Specification], method: str) -> None:
    """BadSpecification where a method would be calibrated on a text that it is measured on."""
    text = str(arguments.values.get("text", ""))
    if text in map(str, datasets):
        raise BadSpecification(f"{method} would be calibrated on '{text}', on which it is measured: name another text")


def refuse_same_content(facts: Mapping[str, Any], revision: str, method: str) -> None:
    """HarnessError where the calibration text is the measured one under another name."""
    if revision and facts.get("text_revision") == revision:
        raise HarnessError(
            f"{method} was calibrated on '{facts['text']}', which is the very text that it is measured on"
        )


def windows(model: Any, checkpoint: Checkpoint, arguments: Arguments) -> tuple[list[Tensor], dict[str, Any]]:
    """Token ids, (1, length) each, and what a measurement records of them: text, seed, count, tokens, sha256."""
    import hashlib

    import numpy as np

    values = arguments.values
    count, seed = int(values["windows"]), int(values["seed"])
    context = getattr(model.config, "max_position_embeddings", None) or int(values["length"])
    length = min(int(values["length"]), int(context) - 1)  # one token is fed to begin with
    if count < 1 or length < 2:
        raise BadSpecification("a calibration needs at least one window of two tokens")
    text = str(values["text"])
    revision = ""
    if text == OWN:
        found = drawn(model, count, length, seed)
    else:
        found, revision = cut(text, checkpoint, count, length, seed, model)
    ids = np.concatenate([window.cpu().numpy().ravel() for window in found]).astype("<i4")
    sha = hashlib.sha256(ids.tobytes()).hexdigest()
    facts = {"text": text, "seed": seed, "windows": count, "tokens_a_window": length, "token_sha256": sha}
    facts |= {"text_revision": revision} if revision else {}
    return found, facts


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


def cut(text: str, checkpoint: Checkpoint, count: int, length: int, seed: int, model: Any) -> tuple[list[Tensor], str]:
    """Windows of a dataset, their starts drawn with the seed, and the dataset's revision."""
    from pathlib import Path

    import torch

    from harness import checkpoints, corpora
    from harness.settings import read_declared

    _, declared = read_declared(Path.cwd())
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
