"""One architecture: built small, saved, measured by the harness's own group and beside it by a plain loop.

Everything here runs in a child process of the zoo's, so that a crash is one row.
"""

from __future__ import annotations

import copy
import functools
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from harness.core.contracts import Scope
from harness.core.errors import HarnessError
from harness.core.options import Declared
from harness.core.records import Case
from harness.core.specification import parse
from harness.inputs.models import checkpoints
from harness.inputs.models.context import context_of
from harness.inputs.texts import corpora, protocols, synthetic
from harness.methods.quantizing import bnb
from harness.methods.quantizing.weight_method import weight_method
from harness.metrics.measuring import engine
from harness.metrics.measuring.decoding import Prompt
from harness.run.group import Group
from harness.run.measure import options_of
from harness.run.messages import Job
from studies.zoo import small

WIDTH, TOKENS = 48, 400  # of a window, and of the text
LENGTHS = (40, 9, 33, 47, 3, 17, 40, 40, 28, 2, 12)  # of the windows that are scored together
BATCHES = (3, 7, 0)  # beside 1; 0 is auto
OURS, FOUR_BITS, LIBRARY = "absmax-int8", "nf4", ("bnb-int8", "bnb-nf4")
METHODS = ("fp32", OURS, FOUR_BITS, *LIBRARY)
EXACT = ("memory.parameters", "memory.footprint", "memory.storage")
SCALE = 1.0  # of a matrix's weights times the root of its inputs: predictions that tell tokens apart
PROMPT = 12
SPECIALS = ("<pad>", "<eos>")
CLOSE = 1e-6  # relative, of a perplexity to the plain loop's
MEAN, TOKEN = 1e-5, 1e-4  # nats, between batches
STEP = 1e-3  # of the largest logit, between a step behind a cache and the whole forward

NOTHING = weight_method(
    name="nothing",
    summary="stores weights as they are",
    bits=32,
    quantize=lambda weight, **values: {"whole": weight.clone()},
    dequantize=lambda tensors, shape, **values: tensors["whole"],
)


@dataclass
class Found:
    """What came of one architecture; every field is JSON."""

    family: str
    architecture: str
    parameters: int = 0
    attention: str = ""
    plain: float | None = None  # perplexity of the plain loop
    why: str = ""  # where it could not be built, or its plain loop fails, or is no likelihood
    causal: bool = True
    perplexity: dict[str, float | None] = field(default_factory=dict)  # by method
    refused: dict[str, str] = field(default_factory=dict)  # by method, in the harness's one line
    faults: dict[str, str] = field(default_factory=dict)  # what differs, by check
    notes: dict[str, str] = field(default_factory=dict)  # known limits, by check


def examine(family: str, tell: Callable[[dict[str, Any]], None]) -> None:
    """Everything about one family; `tell` gets what is known so far, so that a crash leaves it."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = Found(family, small.families()[family])
    with tempfile.TemporaryDirectory(prefix="zoo-") as temporary, checkpoints.quiet(), bnb.quiet():
        bench = Bench(Path(temporary, "model"), Path(temporary, "report"))
        steps: tuple[Callable[[Found, Bench], None], ...] = (build, plainly, measured, alone, decoded, kept)
        for step in steps:
            try:
                step(found, bench)
            except Exception as error:  # a library's, of whatever kind: it becomes the row's words
                if step in (build, plainly):
                    found.why = f"{'cannot be built' if step is build else 'its plain loop fails'}: {words(error)}"
                else:
                    found.faults[step.__name__] = words(error)
            tell(vars(found))
            if found.why:
                return


def words(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


def build(found: Found, bench: Bench) -> None:
    """The model with weights that tell tokens apart, and a tokenizer, in a plain folder."""
    config = small.configuration(found.family)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    found.parameters = sum(each.numel() for each in model.parameters())
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D):
                inputs = module.weight.shape[0] if isinstance(module, Conv1D) else module.weight.shape[1]
                module.weight.normal_(0, SCALE * inputs**-0.5)
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0, 0.6)
    model.save_pretrained(bench.folder)
    tokenizer().save_pretrained(bench.folder)


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, which every family's own class of tokenizers reads alike; no text has a special id."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=small.VOCABULARY, special_tokens=[*SPECIALS], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([" ".join(synthetic.WORDS)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", bos_token="<eos>", eos_token="<eos>")


@dataclass(frozen=True)
class Bench:
    """A small model's folder, and what was loaded of it: by anybody, and by the harness's groups."""

    folder: Path
    report: Path

    @property
    def model(self) -> str:
        """Its specification."""
        return f"path:{self.folder}"

    @functools.cached_property
    def plain(self) -> Any:
        """The model as anybody loads it."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    @functools.cached_property
    def ids(self) -> NDArray[np.int64]:
        """The text's ids: (TOKENS,)."""
        text = corpora.read(parse("synthetic"), Declared(Path())).joined("chunk").texts[0]
        return protocols.encode(AutoTokenizer.from_pretrained(self.folder), text)[:TOKENS]

    @functools.lru_cache(maxsize=8)  # noqa: B019  a bench lives as long as its process
    def group(self, method: str) -> Group:
        """The harness's own group of a method, as its process would hold it."""
        asked = {"models": self.model, "datasets": "synthetic", "max_tokens": TOKENS, "device": "cpu"}
        options = options_of({**asked, "report_dir": str(self.report)})
        return Group(Job(options, self.model, method, "cpu", "fp32", 1, self.report / "log"), None)


def plainly(found: Found, bench: Bench) -> None:
    """The perplexity of a loop of six lines, and whether a later token moves an earlier prediction."""
    model, ids = bench.plain, torch.from_numpy(bench.ids)
    found.attention = getattr(model.config, "_attn_implementation", "") or ""
    total, count = 0.0, 0
    width = min(WIDTH, context_of(model.config) or WIDTH)
    with torch.inference_mode():
        for start in range(0, len(ids), width):
            x = ids[None, start : start + width]
            if x.shape[1] > 1:
                logits = model(input_ids=x).logits[0, :-1].double()
                total += float(nn.functional.cross_entropy(logits, x[0, 1:], reduction="sum"))
                count += x.shape[1] - 1
        first = ids[None, :20].clone()
        other = first.clone()
        other[0, 10:] = len(SPECIALS) + (other[0, 10:] + 1) % (small.VOCABULARY - len(SPECIALS))
        before, after = (model(input_ids=each).logits[0, :10] for each in (first, other))
    found.causal = bool((before - after).abs().max() <= 1e-3 * before.abs().max())
    found.plain = math.exp(total / count)
    if not math.isfinite(found.plain):
        raise ValueError(f"its perplexity is {found.plain}")


def measured(found: Found, bench: Bench) -> None:
    """Perplexity and bytes of every method through the harness."""
    width = f"chunk:{WIDTH}"
    for method in METHODS:
        try:
            one = bench.group(method)
            case = Case(bench.model, method, "synthetic", width, "perplexity", "cpu")
            for name in EXACT:
                bytes_ = one.measure(case._replace(dataset="", protocol="", metric=name))
                if not bytes_.detail.get("predicted_equal"):
                    found.faults[f"{method} {name}"] = (
                        f"{bytes_.detail.get('predicted')} predicted, {bytes_.value:.0f} held"
                    )
            row = one.measure(case)
            found.perplexity[method] = row.value
        except HarnessError as error:
            found.refused[method] = str(error)
        except Exception as error:  # a library's, or a bug: the other methods are measured all the same
            found.faults[method] = words(error)
    ours, plain = found.perplexity.get("fp32"), found.plain
    if ours is not None and plain is not None and not abs(ours / plain - 1) <= CLOSE:
        found.faults["perplexity"] = f"{ours:.8g} against {plain:.8g} by the plain loop"


def alone(found: Found, bench: Bench) -> None:
    """Windows of many lengths together as alone, and a method that changes nothing bit for bit as the reference."""
    if not found.causal:
        return
    windows, start = [], 0
    for length in LENGTHS:
        windows.append(protocols.all_but_first(bench.ids[start : start + length]))
        start += length
    reference = bench.group("fp32")
    model = reference.model
    single = engine.score(model, windows, device="cpu").astype(np.float64)
    for size in BATCHES:
        together = engine.score(model, windows, device="cpu", batch_size=size)
        mean, worst = abs(float((together - single).mean())), float(np.abs(together - single).max())
        if not (mean <= MEAN and worst <= TOKEN):
            found.faults[f"batch {size or 'auto'}"] = f"{mean:.1e} nat in the mean, {worst:.1e} a token"
    try:
        nothing = NOTHING.load(reference.checkpoint, replace(reference.arguments, scope=Scope()), "cpu")
    except HarnessError as error:
        found.notes["nothing"] = str(error)
        return
    same = engine.score(nothing, windows, device="cpu")
    lying = engine.score(copy.deepcopy(model), windows, device="cpu")  # as memory is given out, not as the file lies
    if not np.array_equal(same, lying):
        found.faults["nothing"] = f"{float(np.abs(same - lying).max()):.1e} nat from the reference"


def decoded(found: Found, bench: Bench) -> None:
    """A step behind a prompt against the whole forward, twice, so that a rewound state is seen to be one."""
    if not found.causal:
        return
    model, ids = bench.plain, torch.from_numpy(bench.ids[None, : PROMPT + 1])
    with torch.inference_mode():
        whole = model(input_ids=ids, use_cache=False).logits[:, -1]
        try:
            prompt = Prompt(model, ids[:, :-1])
        except HarnessError as error:
            found.notes["decode"] = str(error)
            return
        for _ in range(2):
            prompt.rewind()
            step = prompt.step(ids[:, -1:]).logits[:, -1]
            off = float((step - whole).abs().max() / whole.abs().max())
            if not off <= STEP:
                found.faults["decode"] = f"a step is off by {off:.1e} of the largest logit"


def kept(found: Found, bench: Bench) -> None:
    """What a state_dict (ours) or save_pretrained (bitsandbytes) keeps gives the same logits when it is loaded."""
    ids = torch.from_numpy(bench.ids[None, :WIDTH])
    for method in METHODS[1:]:
        if found.perplexity.get(method) is None:  # refused, or it failed
            continue
        one = bench.group(method)
        with torch.inference_mode():
            again: Any
            if one.method.reloads:
                state = {name: tensor.clone() for name, tensor in one.model.state_dict().items()}
                again = one.method.load(one.checkpoint, one.arguments, "cpu")
                for tensor in again.state_dict().values():
                    tensor.zero_()
                again.load_state_dict(state)
            else:
                with tempfile.TemporaryDirectory(prefix="zoo-kept-") as saved:
                    made: Any = one.method.load(one.checkpoint, one.arguments, "cpu")  # before any forward
                    made.save_pretrained(saved)
                    again = AutoModelForCausalLM.from_pretrained(
                        saved, dtype=torch.float32, device_map={"": "cpu"}
                    ).eval()
            wanted, got = (each(input_ids=ids, use_cache=False).logits for each in (one.model, again))
        if not torch.equal(wanted, got):
            off = float((wanted - got).abs().max() / wanted.abs().max())
            found.faults[f"{method} saved"] = f"loaded again, logits are off by {off:.1e} of the largest"
