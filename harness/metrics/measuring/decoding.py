"""One token behind another, from whatever a model carries over: keys and values, recurrent states, or both.

Transformers' forwards give back what the next one is to be given, under one of STATES. A cache of keys and values alone
is cropped back to the prompt; any other (a recurrent state, a window that is full) is copied before it is written to.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from harness.core.errors import HarnessError

STATES = ("past_key_values", "cache_params", "state", "mems")  # the last three: Mamba, RWKV, XLNet


def last_alone(model: nn.Module) -> dict[str, int]:
    """The argument that asks for logits of the last position only, where the forward takes it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def carried(model: nn.Module, output: Any) -> dict[str, Any]:
    """What the next forward is given to go on behind this one, by its argument's name."""
    for name in STATES:
        state = getattr(output, name, None)
        if state is not None:
            return {name: state}
    raise HarnessError(
        f"{type(model).__name__} gives back no cache and no state to decode from: measure latency.forward instead"
    )


class Prompt:
    """A prompt that was read, and what is carried from it: `step` feeds one token, `rewind` undoes all steps."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        """Feed the prompt: (B, L) ids."""
        self.model, self.length, self.more = model, ids.shape[1], {"use_cache": True, **last_alone(model)}
        self.carried = carried(model, model(input_ids=ids, **self.more))
        self.before = None if self._croppable() else copy.deepcopy(self.carried)

    def step(self, token: Tensor) -> Any:
        """One forward of (B, 1) ids behind the prompt."""
        output = self.model(input_ids=token, **self.carried, **self.more)
        if self.before is not None:
            self.carried = carried(self.model, output)
        return output

    def rewind(self) -> None:
        """Be as after the prompt."""
        if self.before is not None:
            self.carried = copy.deepcopy(self.before)
            return
        cache = self.carried["past_key_values"]
        if grown := cache.get_seq_length() - self.length:
            cache.crop(-grown)
        if cache.get_seq_length() != self.length:
            raise RuntimeError(f"the cache holds {cache.get_seq_length()} tokens after cropping, not {self.length}")

    def _croppable(self) -> bool:
        """Whether cropping brings the cache back exactly: it holds every token's keys and values, and nothing else."""
        cache = self.carried.get("past_key_values")
        plain = type(cache).__name__ == "DynamicCache"  # a family's own cache (MiniMax) may refuse to be cropped
        layers = getattr(cache, "layers", ()) if plain else ()
        return bool(layers) and all(
            isinstance(getattr(layer, "keys", None), Tensor)
            and not hasattr(layer, "conv_states")
            and (getattr(layer, "sliding_window", None) or self.length + 2) > self.length + 1
            for layer in layers
        )


def greedy(model: Any, ids: Tensor, new: int) -> Tensor:
    """The likeliest continuation, token by token, past any end of text; ids stay on the device: (B, new)."""
    more = {"use_cache": True, **last_alone(model)}
    output = model(input_ids=ids, **more)
    tokens = [output.logits[:, -1].argmax(-1, keepdim=True)]  # (B, 1) each
    while len(tokens) < new:
        output = model(input_ids=tokens[-1], **carried(model, output), **more)
        tokens.append(output.logits[:, -1].argmax(-1, keepdim=True))
    return torch.cat(tokens, dim=1)
