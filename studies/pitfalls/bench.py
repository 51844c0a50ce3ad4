"""What a control is shown on: one checkpoint and one text, with a right way to score."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from harness.core import catalog
from harness.core.contracts import Checkpoint, TokenPlan, Window
from harness.core.specification import parse
from harness.core.stats import Estimate, paired_delta
from harness.inputs.models import checkpoints
from harness.inputs.texts import protocols
from harness.inputs.texts.corpora import Corpus
from harness.methods.quantizing.arguments import resolve
from harness.metrics.measuring import engine
from harness.published.pitfalls import Figures

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Shown:
    """The same figures under the fault and under the right version, and others that explain them."""

    fault: Figures
    right: Figures
    beside: Figures = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Bench:
    """A model and a text.

    Attributes:
        checkpoint: the unquantized model.
        corpus: the text.
        width: tokens a window.
        max_tokens: tokens of the text that are read.
        characters: that `texts-cut` leaves of a text.
        candidate: method of `better-than-reference`.
    """

    checkpoint: Checkpoint
    corpus: Corpus
    width: int = 512
    max_tokens: int = 2048
    characters: int = 512  # the cut of report 402d78b58c8735bf
    candidate: str = "linear-int4:block=4096"

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer."""
        return checkpoints.tokenizer(self.checkpoint)

    def open(self, method: str = "fp32") -> nn.Module:
        """The model under a method, loaded anew on the CPU."""
        specification = parse(method)
        chosen = catalog.methods()[specification.name]
        return chosen.load(self.checkpoint, resolve(specification, chosen, "cpu"), "cpu")

    @functools.cached_property
    def plan(self) -> TokenPlan:
        """The text in disjoint windows."""
        protocol = protocols.parse(parse(f"chunk:{self.width}"))
        return protocols.plan(self.corpus, protocol, self.tokenizer, context=self.width, max_tokens=self.max_tokens)

    @functools.cached_property
    def reference_nll(self) -> NDArray[np.float32]:
        """(scored tokens,) nats of the plan under fp32."""
        return self.nll(self.open())

    def nll(self, model: nn.Module, windows: Sequence[Window] | None = None) -> NDArray[np.float32]:
        """(scored tokens,) nats of these windows, or of the plan's."""
        return engine.score(model, self.plan.windows if windows is None else windows, device="cpu")

    def delta(self, model: nn.Module) -> Estimate:
        """Change of the mean NLL against fp32 on the plan, nats, with its 95% interval over windows."""
        return paired_delta(self.nll(model), self.reference_nll, protocols.window_slices(self.plan))

    def texts(self, split: Callable[[str], Sequence[str]] = lambda line: [line]) -> list[str]:
        """The text's lines, or what `split` makes of each, up to `max_tokens` tokens in all; blank ones dropped."""
        found: list[str] = []
        room = self.max_tokens
        for line in self.corpus.joined("sentence").texts:
            for text in split(line):
                room -= len(protocols.encode(self.tokenizer, text))
                if room < 0:
                    return found
                if text.strip():
                    found.append(text)
        return found

    def window(self, text: str) -> Window:
        """A text alone, cut at the width, all but its first token scored."""
        ids = protocols.encode(self.tokenizer, text)[: self.width]
        return Window(ids, max(len(ids) - 1, 0))


def mean(nll: NDArray[np.floating[Any]]) -> float:
    """Nats a token, in float64."""
    return math.fsum(nll.tolist()) / len(nll)
