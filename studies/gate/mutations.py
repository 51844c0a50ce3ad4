"""Part 2 of the gate's bench: seeded faults, each a few lines, and what must come of each.

A fault is switched on for one session that is held against a right, recorded one. It names the case that must give it
away: methods, metric, verdict and words of the reason. No case of another method may move.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import yaml

from harness.core.contracts import Window
from harness.core.records import Verdict
from harness.inputs.models import checkpoints, sizes
from harness.inputs.texts import corpora, protocols
from harness.methods import linear_int4, nf4
from harness.methods.quantizing import bnb, stored
from harness.methods.quantizing.codes import Functions, Recipe, divide
from harness.metrics import perplexity
from harness.metrics.measuring import engine
from harness.run import group
from studies.gate import silence, small
from studies.gate.small import Bench

QUIET = frozenset({Verdict.SAME, Verdict.WITHIN_NOISE, Verdict.WITHIN_BOUND})
Switch = Callable[[], contextlib.AbstractContextManager[Any]]
OURS = ("absmax-int8", "nf4")
ALL = ("fp32", *OURS)
TOKENS = 2048  # 8 windows of 256: the fewest that decide anything


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: what is wrong.
        on: switches it on.
        methods: measured, the faulty first; the reference always is.
        guilty: methods whose cases may move; those that must are `guilty[0]`'s `metric`.
        metric: of the case that must give it away.
        verdict: of that case.
        words: in its reason.
        model: the tiny model.
        before: switches something on while the right session is recorded.
        files: what is done to the files of the bench between the two sessions; its model and text then lie there.
        first: the same before the right session.
        formerly: what the rules of before said of it, where they are known to have said something else.
    """

    name: str
    on: Switch
    methods: tuple[str, ...]
    metric: str
    verdict: Verdict
    words: str = ""
    guilty: tuple[str, ...] = ()
    model: str = "tiny-gpt2"
    protocol: str = "chunk:256"
    setup: tuple[tuple[str, Any], ...] = ()  # of both sessions' options
    changes: tuple[tuple[str, Any], ...] = ()  # of the faulty session's alone
    before: Switch | None = None
    files: Callable[[Bench], None] | None = None
    first: Callable[[Bench], None] | None = None
    formerly: str = ""

    @property
    def silent(self) -> bool:
        """Whether it is no fault at all: nothing may fail."""
        return self.verdict in QUIET

    @property
    def culprits(self) -> tuple[str, ...]:
        """Methods whose cases may move."""
        return self.guilty or self.methods[:1]


def tampered(method: str, act: Callable[[dict[str, Any], stored.StoredWeight], None]) -> Switch:
    """What a weight method stored is changed after it was made; `act` gets its buffers and the store."""

    def init(self: Any, module: Any, recipe: Any, tables: Any, *key: str) -> None:
        right(self, module, recipe, tables, *key)
        if recipe.method == method and not self._buffers["codes"].is_meta:
            act(self._buffers, self)

    right = stored.StoredWeight.__init__
    return lambda: patch.object(stored.StoredWeight, "__init__", init)


def recipe(method: str, quantize: Any = None, dequantize: Any = None, **values: int) -> Switch:
    """A weight method with a wrong function, or wrong values, in place of its own, and no loops."""

    def init(self: Any, module: Any, given: Recipe, tables: Any, *key: str) -> None:
        if given.method == method:
            right = given.codes
            functions = quantize or right.encode, dequantize or right.decode
            codes = Functions(*functions, tables=right.tables, grain=right.grain)
            given = dataclasses.replace(given, codes=codes, values={**given.values, **values})
        kept(self, module, given, tables, *key)

    kept = stored.StoredWeight.__init__
    return lambda: patch.object(stored.StoredWeight, "__init__", init)


def wrong(target: Any, name: str, make: Callable[[Any], Any]) -> Switch:
    """A function of the harness replaced: right -> wrong."""
    return lambda: patch.object(target, name, make(getattr(target, name)))


def per_row(weight: Any, scale: Any, limit: int = 127, rounding: Any = torch.round) -> dict[str, Any]:
    """Symmetric int8 codes under a scale (out, 1)."""
    return {"codes": rounding(divide(weight, scale)).clamp_(-limit, limit).char(), "scale": scale}


def absmax(weight: Any) -> Any:
    """(out, 1) the right scale."""
    return weight.abs().amax(dim=1, keepdim=True) / 127


def by_input(weight: Any) -> dict[str, Any]:
    """Scales of the input channels, as a Conv1D taken without its transposition gives them."""
    scale = weight.abs().amax(dim=0) / 127  # (in,)
    rows = scale.repeat(-(-weight.shape[0] // len(scale)))[: weight.shape[0], None]  # (out, 1)
    return per_row(weight, rows)


def roll(scale: Any) -> None:
    """Each scale to its neighbour."""
    scale.copy_(scale.roll(1, 0))


def turn(packed: Any) -> None:
    """The two codes of a byte exchanged."""
    packed.copy_((packed >> 4) | (packed << 4))


def in_half(weight: Any) -> dict[str, Any]:
    """Scales in fp16."""
    right = per_row(weight, absmax(weight))
    return {**right, "scale": right["scale"].half()}


def first_zero(kept: dict[str, Any], store: Any) -> None:
    """The first quarter of a weight's blocks lose their scale."""
    kept["scale"][: len(kept["scale"]) // 4] = 0


def loaded(act: Callable[[Any], None], kind: str = "") -> Switch:
    """A bitsandbytes model changed after loading."""

    def make(right: Any) -> Any:
        def load(format: Any, *rest: Any) -> Any:
            model = right(format, *rest)
            act(model)
            return model

        return load

    def switch() -> Any:
        return _replaced_load(kind, make)

    return switch


@contextlib.contextmanager
def _replaced_load(name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """The load of one method of the catalogue replaced: right(checkpoint, arguments, device) -> model."""
    from harness.core import catalog

    known = catalog.methods()
    method = known[name]
    changed = {**known, name: dataclasses.replace(method, load=make(method.load))}
    with patch.object(catalog, "methods", lambda: changed):
        yield


def four_bit(model: Any) -> list[Any]:
    """The quantization states of a bitsandbytes model."""
    return [module.weight.quant_state for module in model.modules() if type(module).__name__ == "Linear4bit"]


def nested_ignored(model: Any) -> None:
    """The mean that double quantization takes off its scales is not put back."""
    for state in four_bit(model):
        state.offset = torch.zeros_like(state.offset)


def scb_changed(model: Any) -> None:
    """SCB of LLM.int8 modified while it is moved (transformers PR 41200)."""
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.weight.SCB.mul_(1.01)


def bias_lost(model: Any) -> None:
    """Linear biases are dropped."""
    for module in model.modules():
        if isinstance(module, stored.QuantizedLinear) and module.bias is not None:
            module.bias.data.zero_()


def swapped_layers(model: Any) -> None:
    """Layers 0 and 1 change places."""
    layers = model.transformer.h
    first, second = layers[0].mlp, layers[1].mlp
    layers[0].mlp, layers[1].mlp = second, first


def leaking(model: Any) -> None:
    """The unquantized weight stays beside its codes."""
    for module in model.modules():
        if isinstance(module, stored.QuantizedLinear):
            module.kept = torch.zeros(module.store.matrix)


def skipping(right: Any) -> Any:
    """`stored.apply` that leaves the first weight as it is."""

    def apply(model: Any, recipe: Any, names: Any, *, read: Any = None, **rest: Any) -> None:
        first, *others = names
        if read is not None:
            read(first)
        right(model, recipe, others, read=read, **rest)

    return apply


def and_head(right: Any) -> Any:
    """`stored.apply` that takes lm_head too."""

    def apply(model: Any, recipe: Any, names: Any, *, read: Any = None, **rest: Any) -> None:
        def known(name: str) -> None:
            if name != "lm_head":  # is there already: it was not to be quantized
                read(name)

        right(model, recipe, [*names, "lm_head"], read=known if read is not None else None, **rest)

    return apply


@contextlib.contextmanager
def silently_fewer() -> Iterator[None]:
    """The first layer is skipped, and the selection agrees that it should be."""
    from harness.methods.quantizing import arguments, weight_method

    right = arguments.select
    with patch.object(weight_method, "select", lambda model, scope: right(model, scope)[1:]):
        yield


def dropping(name: str) -> Callable[[Any], Any]:
    """A walk over tensors that does not see buffers of a name."""

    def make(right: Any) -> Any:
        def measure(model: Any) -> dict[str, int]:
            found = right(model)
            lost = sum(tensor.nbytes for key, tensor in model.named_buffers() if key.endswith(name))
            on_device = any(not tensor.is_meta for tensor in model.parameters())
            return {key: value - lost * on_device * (key == "memory.storage") for key, value in found.items()}

        return measure

    return make


def tied_twice(right: Any) -> Any:
    """Tied parameters counted as often as they are named."""

    def measure(model: Any) -> dict[str, int]:
        found = dict(right(model))
        every = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
        if every and not every[0].is_meta:
            found["memory.parameters"] = sum(parameter.nbytes for parameter in every)
        return found

    return measure


def scored_padding(right: Any) -> Any:
    """The last positions of a padded row are scored, whatever the window's length."""

    def batch_nll(model: Any, chosen: Any, device: str, split: bool) -> Any:
        longest = max(len(window.ids) for window in chosen)
        padded = [
            Window(np.concatenate([window.ids, np.full(longest - len(window.ids), engine.PADDING)]), window.scored)
            for window in chosen
        ]
        return right(model, padded, device, split)

    return batch_nll


def shifted_labels(right: Any) -> Any:
    """Each position is scored on the token it reads instead of the next."""

    def batch_nll(model: Any, chosen: Any, *rest: Any) -> Any:
        moved = [Window(np.concatenate([window.ids[:-1], window.ids[-2:-1]]), window.scored) for window in chosen]
        moved = [Window(np.concatenate([one.ids[1:], one.ids[-1:]]), one.scored) for one in moved]
        return right(model, moved, *rest)

    return batch_nll


def rolled(right: Any) -> Any:
    """A reference's losses left from another part of the text."""
    return lambda self: np.tile(right(self)[len(right(self)) // 2 :], 2)[: len(right(self))]


def another_split(right: Any) -> Any:
    """The text read from its second half."""

    def joined(self: Any, protocol: str) -> Any:
        reading = right(self, protocol)
        texts = tuple(text[len(text) // 2 :].partition(" ")[2] for text in reading.texts)
        return dataclasses.replace(reading, texts=texts)

    return joined


def another_tokenizer(right: Any) -> Any:
    """A tokenizer that lost a word to <unk>."""

    def encode(tokenizer: Any, text: str) -> Any:
        ids = right(tokenizer, text)
        return np.where(ids == 7, tokenizer.unk_token_id, ids)

    return encode


def overlap_lost(right: Any) -> Any:
    """Strided windows that see no context before what they score."""

    def stride(ids: Any, width: int, step: int) -> Any:
        made = right(ids, width, step)
        return [Window(window.ids[-window.scored - 1 :], window.scored) for window in made]

    return stride


def positions_lost(model: Any) -> None:
    """Every token is told that it is the first."""
    weight = model.transformer.wpe.weight
    weight.data = weight.data[:1].expand_as(weight).clone()


def opened(act: Callable[[Any], None], dtype: str = "fp32") -> Switch:
    """Every model that is opened in a dtype changed (what a new version of a library might do)."""

    def make(right: Any) -> Any:
        def open_model(checkpoint: Any, kind: str, *rest: Any, **more: Any) -> Any:
            model = right(checkpoint, kind, *rest, **more)
            act(model)
            return model

        return open_model

    return wrong(checkpoints, "open_model", make)


def half_weights(model: Any) -> None:
    """Weights through fp16 and back, less three bits (a loader that picked a half dtype)."""
    for parameter in model.parameters():
        if parameter.dtype is torch.float32:
            parameter.data = parameter.data.bfloat16().float()


def worse(name: str, on: Switch, method: str, metric: str = "divergence.kl", **more: Any) -> Fault:
    """A fault of one quantizer that its own case gives away against the record."""
    return Fault(name, on, (method, "fp16" if method == "nf4" else "nf4"), metric, Verdict.WORSE, **more)


def one_for_all(weight: Any) -> dict[str, Any]:
    """The largest scale for every channel."""
    return per_row(weight, absmax(weight).amax().expand(len(weight), 1).clone())


def swapped(kept: Any, shape: Any, block: int) -> Any:
    """NF4 with its codes 4 and 5 exchanged."""
    levels = kept["levels"][[0, 1, 2, 3, 5, 4, *range(6, 16)]]
    return nf4.CODES.decode({**kept, "levels": levels}, shape, block)


def mistyped(kept: Any, shape: Any, block: int) -> Any:
    """NF4 with one level typed 0.44 for 0.3379."""
    levels = kept["levels"].clone()
    levels[11] = 0.44
    return nf4.CODES.decode({**kept, "levels": levels}, shape, block)


def zero_at_seven(kept: Any, shape: Any, block: int) -> Any:
    """Symmetric int4 whose codes are read one level too high."""
    step = kept["scale"].repeat_interleave(block)[: shape[0] * shape[1]].view(shape)
    return linear_int4.CODES.decode(kept, shape, block) + step


def one_row_lost(kept: Any, shape: Any, block: int) -> Any:
    """NF4 whose first row comes out as not a number."""
    right = nf4.CODES.decode(kept, shape, block)
    return torch.cat([torch.full_like(right[:1], torch.nan), right[1:]])


def of_windows(nll: Any, plan: Any) -> float:
    """The exponential of the mean over windows of their means."""
    return float(np.exp(np.mean([nll[part].mean() for part in protocols.window_slices(plan)])))


def option(**changed: Any) -> Switch:
    """An option of bitsandbytes replaced."""
    return wrong(bnb, "options", lambda right: lambda *given: {**right(*given), **changed})


def fewer(ids: Any) -> Window:
    """A window that leaves its second token out as well."""
    return Window(ids, max(len(ids) - 2, 0))


def bos(token: int | None) -> Switch:
    """A tokenizer that puts this token, or none, before a text."""
    return wrong(protocols, "leading_token", lambda right: lambda tokenizer, text: token)


def instead(function: Any) -> Callable[[Any], Any]:
    """The wrong function for the right one."""
    return lambda right: function


def heavier(method: str, ratio: float) -> Switch:
    """Every token of a method loses more, by a ratio of perplexities."""

    def make(right: Any) -> Any:
        def score(self: Any, model: Any, kind: Any, *rest: Any, **more: Any) -> Any:
            nll = right(self, model, kind, *rest, **more)
            return nll + np.float32(math.log(ratio) * (kind.name == method))

        return score

    return wrong(group.Group, "score", make)


def losses_lost(bench: Bench) -> None:
    """The recorded losses are not there: ignored by git, pointers of LFS, or deleted."""
    for path in bench.options.baselines.glob("*/nll/*.npz"):
        path.unlink()


def value_edited(method: str, ratio: float) -> Callable[[Bench], None]:
    """A recorded perplexity of a method edited by hand."""

    def act(bench: Bench) -> None:
        for path in bench.options.baselines.glob(f"*/{method}@*.yaml"):
            document = yaml.safe_load(path.read_text())
            for entry in document["entries"]:
                entry["value"] *= ratio if entry["metric"] == "perplexity" else 1
            path.write_text(yaml.safe_dump(document, sort_keys=False))

    return act


def config_edited(name: str, factor: float) -> Callable[[Bench], None]:
    """A number in the model's config.json, wherever it stands there."""

    def walk(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: item * factor if key == name else walk(item) for key, item in value.items()}

    def act(bench: Bench) -> None:
        for path in bench.folder.glob("small-*/config.json"):
            path.write_text(json.dumps(walk(json.loads(path.read_text()))))

    return act


def files_rewritten(bench: Bench) -> None:
    """config.json and tokenizer.json as another release would write them."""
    for path in bench.folder.glob("small-*"):
        silence.rewrite(path)


def both(*acts: Callable[[Bench], None]) -> Callable[[Bench], None]:
    """One after another."""

    def act(bench: Bench) -> None:
        for one in acts:
            one(bench)

    return act


def words_changed(change: Callable[[str], str]) -> Callable[[Bench], None]:
    """The text's file written anew."""

    def act(bench: Bench) -> None:
        path = bench.folder / "words.txt"
        path.write_bytes(change(path.read_bytes().decode()).encode())

    return act


def word_lost(bench: Bench) -> None:
    """A word leaves the tokenizer's vocabulary: where the text has it, it is unknown."""
    for path in bench.folder.glob("small-*/tokenizer.json"):
        document = json.loads(path.read_text())
        words = document["model"]["vocab"]
        lost = next(iter(words))
        words[f"{lost}-lost"] = words.pop(lost)
        path.write_text(json.dumps(document))


INT8 = "absmax-int8"
WORSE, OUT, OTHER, MISSING = Verdict.WORSE, Verdict.OUT_OF_BOUND, Verdict.INPUT_CHANGED, Verdict.MISSING
BOTH, PAIR = ("nf4", INT8), (INT8, "fp16")
FP32_TOO: dict[str, Any] = {"guilty": ALL}
QUANTIZERS = (
    worse("scale off by 1%", tampered(INT8, lambda kept, _: kept["scale"].mul_(1.01)), INT8),
    worse("one scale a tensor instead of a channel", recipe(INT8, quantize=one_for_all), INT8),
    worse("scales of the input channels (Conv1D not transposed)", recipe(INT8, quantize=by_input), INT8),
    worse(
        "codes truncated instead of rounded",
        recipe(INT8, quantize=lambda weight: per_row(weight, absmax(weight), rounding=torch.trunc)),
        INT8,
    ),
    worse(
        "half of the int8 range used",
        recipe(INT8, quantize=lambda weight: per_row(weight, 2 * absmax(weight), 63)),
        INT8,
    ),
    worse("scales rolled by a channel", tampered(INT8, lambda kept, _: roll(kept["scale"])), INT8),
    worse(
        "zero point off by one",
        tampered("zeropoint-int8", lambda kept, _: kept["zero_point"].add_(1)),
        "zeropoint-int8",
    ),
    worse("one pair of code levels swapped", recipe("nf4", dequantize=swapped), "nf4"),
    worse("one code level mistyped", recipe("nf4", dequantize=mistyped), "nf4"),
    worse("absmax of the wrong block", tampered("nf4", lambda kept, _: roll(kept["scale"])), "nf4"),
    worse("scales of a quarter of the blocks lost", tampered("nf4", first_zero), "nf4"),
    worse("nibbles unpacked in the other order", tampered("fp4", lambda kept, _: turn(kept["codes"])), "fp4"),
    worse(
        "minimum of affine blocks off by a tenth",
        tampered("linear-int4-affine", lambda kept, _: kept["minimum"].mul_(0.9)),
        "linear-int4-affine",
    ),
    worse("int4 codes read one level too high", recipe("linear-int4", dequantize=zero_at_seven), "linear-int4"),
    worse("biases lost", loaded(bias_lost, INT8), INT8),
    worse("two layers' weights exchanged", loaded(swapped_layers, INT8), INT8, "perplexity"),
    worse("outlier threshold ignored", option(llm_int8_threshold=0.0), "bnb-int8:threshold=1.0"),
    worse("offset of nested absmax ignored", loaded(nested_ignored, "bnb-nf4-dq"), "bnb-nf4-dq"),
    worse("SCB changed by a move", loaded(scb_changed, "bnb-int8"), "bnb-int8"),
)
SHAPES = (
    Fault("blocks of 128 for 64", recipe("nf4", block=128), BOTH, "memory.storage", WORSE,
          "memory.storage on cpu"),
    Fault("scales stored in fp16", recipe(INT8, quantize=in_half), BOTH[::-1],
          "memory.storage", WORSE, "memory.storage on cpu"),
    Fault("one layer skipped", wrong(stored, "apply", skipping), PAIR, "perplexity", MISSING,
          "left 1 of 8 modules unquantized: transformer.h.0.attn.c_attn"),
    Fault("one layer skipped, and the selection with it", silently_fewer, PAIR, "perplexity", MISSING,
          "absmax-int8 reaches 87.5% of the matrices that its scope names"),
    Fault("lm_head quantized by mistake", wrong(stored, "apply", and_head), PAIR, "perplexity", MISSING,
          "quantized 1 modules it was not asked to: lm_head", model="tiny-olmo"),
    Fault("tied head counted twice", wrong(sizes, "measure", tied_twice), ("fp32", INT8), "memory.parameters", OUT,
          "predicted", guilty=("fp32", INT8)),
    Fault("quantization state left out of the bytes", wrong(sizes, "measure", dropping("scale")), PAIR,
          "memory.storage", OUT, "predicted"),
    Fault("fp32 weights kept beside their codes", loaded(leaking, INT8), BOTH[::-1], "memory.storage", OUT,
          "predicted"),
    Fault("double quantization not asked for", option(bnb_4bit_use_double_quant=False), ("bnb-nf4-dq", "nf4"),
          "memory.storage", WORSE, "memory.storage on cpu"),
    Fault("not a number in one row", recipe("nf4", dequantize=one_row_lost), BOTH, "perplexity", OUT,
          "non-finite loss"),
)  # fmt: skip
TEXTS = (
    Fault("tokenizer changed", wrong(protocols, "encode", another_tokenizer), ALL, "perplexity", OTHER, "token hash",
          **FP32_TOO),
    Fault("BOS added", bos(63), ALL, "perplexity", OTHER, "bos=", **FP32_TOO),
    Fault("BOS lost", bos(None), ALL, "perplexity", OTHER, "bos=", before=bos(63), **FP32_TOO),
    Fault("wrong split", wrong(corpora.Corpus, "joined", another_split), ALL, "perplexity", OTHER, "token hash",
          **FP32_TOO),
    Fault("text cut short by a token", contextlib.nullcontext, ALL, "perplexity", Verdict.UNRECORDED, "no record",
          changes=(("max_tokens", 2047),), **FP32_TOO),
    Fault("a token a window scored fewer", wrong(protocols, "all_but_first", instead(fewer)), ALL, "perplexity", OTHER,
          "count of tokens scored: 2040 -> 2032", **FP32_TOO),
)  # fmt: skip
MOVER = "the unquantized reference itself moved"
SCORING = (
    Fault("labels off by one", wrong(engine, "batch_nll", shifted_labels), ALL, "perplexity", WORSE, MOVER, **FP32_TOO),
    Fault("padding scored", wrong(engine, "batch_nll", scored_padding), ALL, "perplexity", WORSE, "",
          setup=(("max_tokens", 2100),), changes=(("batch_size", 9),), **FP32_TOO),
    Fault("context of strided windows lost", wrong(protocols, "stride", overlap_lost), ALL, "perplexity", WORSE, MOVER,
          protocol="stride:64:8", setup=(("max_tokens", 512),), **FP32_TOO),
    Fault("mean over windows for mean over tokens", wrong(perplexity, "aggregate", instead(of_windows)), ALL,
          "perplexity", WORSE, "from losses bit-identical to the record", setup=(("max_tokens", 2100),), **FP32_TOO),
    Fault("perplexity in base 2", wrong(perplexity, "aggregate", instead(lambda nll, plan: float(2 ** nll.mean()))),
          ALL, "perplexity", Verdict.BETTER, "from losses bit-identical to the record", **FP32_TOO),
    Fault("stale cached reference", wrong(group.Group, "reference_nll", rolled), BOTH, "perplexity.delta", WORSE, MOVER,
          **FP32_TOO),
    Fault("positions lost", opened(positions_lost), ALL, "perplexity", WORSE, "it was no quantizer",
          **FP32_TOO),
    Fault("weights through bf16 on the way", opened(half_weights), BOTH[::-1], "divergence.kl", WORSE, "", **FP32_TOO),
)  # fmt: skip
NOTHING = contextlib.nullcontext
RECORDS = (
    Fault("13.9% worse, recorded losses gone", heavier("nf4", 1.139), BOTH, "perplexity", WORSE, files=losses_lost,
          formerly="unusable, and the session passed"),
    Fault("13.9% worse, recorded losses gone and value edited", heavier("nf4", 1.139), BOTH, "perplexity", WORSE,
          files=both(losses_lost, value_edited("nf4", 1.139))),
    Fault("recorded value edited by 13.9%", NOTHING, BOTH, "perplexity", WORSE, files=value_edited("nf4", 1.139),
          formerly="better, and the session passed"),
)  # fmt: skip
INPUTS = (
    Fault("rope_theta a tenth lower", NOTHING, ALL, "perplexity", OTHER, "rope_theta", model="tiny-olmo",
          files=config_edited("rope_theta", 0.9), formerly="within noise, and the session passed", **FP32_TOO),
    Fault("epsilon 1e-4 for 1e-5", NOTHING, ALL, "perplexity", OTHER, "layer_norm_epsilon",
          files=config_edited("layer_norm_epsilon", 10.0), formerly="within noise, and the session passed", **FP32_TOO),
    Fault("text shifted by a word", NOTHING, ALL, "perplexity", OTHER, "",
          files=words_changed(lambda text: text.partition(" ")[2]), formerly="not comparable", **FP32_TOO),
    Fault("line ends of another system", NOTHING, ALL, "perplexity", OTHER, "",
          files=words_changed(lambda text: text.replace("\n", "\r\n")), formerly="not comparable", **FP32_TOO),
    Fault("text in lower case", NOTHING, ALL, "perplexity", OTHER, "", first=words_changed(str.title),
          files=words_changed(str.lower), formerly="not comparable", **FP32_TOO),
    Fault("a word lost from the tokenizer", NOTHING, ALL, "perplexity", OTHER, "", files=word_lost,
          formerly="not comparable", **FP32_TOO),
)  # fmt: skip
HARMLESS = (
    Fault("eager attention: no fault", lambda: patch.object(checkpoints, "ATTENTION", "eager"),
          ("bnb-int8", "bf16"), "perplexity", Verdict.WITHIN_NOISE, guilty=("bnb-int8", "bf16", "fp32")),
    Fault("config.json rewritten: no fault", NOTHING, BOTH, "perplexity", Verdict.SAME,
          files=files_rewritten),
)  # fmt: skip
FAULTS = (*QUANTIZERS, *SHAPES, *TEXTS, *SCORING, *RECORDS, *INPUTS, *HARMLESS)


@dataclass(frozen=True)
class Found:
    """What came of one fault."""

    verdict: Verdict | None
    reason: str
    fails: bool  # the session, as CI runs it
    innocent: tuple[str, ...]  # cases of other methods that moved, which none should
    others: tuple[str, ...]  # further cases of the culprits that moved

    def right(self, fault: Fault) -> bool:
        """Whether the right case gives it away with the right verdict and words, and nobody else is blamed."""
        seen = self.fails is not fault.silent or fault.verdict is Verdict.BETTER
        return self.verdict is fault.verdict and fault.words in self.reason and seen and not self.innocent


def run(fault: Fault) -> Found:
    """Record a right session, then hold the faulty one against it."""
    setup = {"max_tokens": TOKENS, **dict(fault.setup)}
    chosen = {"models": (fault.model,), "methods": fault.methods, "protocols": (fault.protocol,), **setup}
    with small.bench(**chosen) as bench:
        if fault.files:
            chosen["models"] = (fault.model.replace("tiny", "small"),)
            bench = silence.laid_out(bench.folder, **chosen)
        if fault.first:
            fault.first(bench)
        with fault.before() if fault.before else contextlib.nullcontext():
            bench.record(check=False)
        if fault.files:
            fault.files(bench)
        with fault.on():
            outcome = bench.session(**dict(fault.changes))
    case = next(row for row in outcome.rows if row.method == fault.methods[0] and row.metric == fault.metric)
    if fault.metric == "perplexity.delta" and fault.methods[0] == "fp32":
        raise ValueError("the reference has no delta")
    moved = [row for row in outcome.moved if row.case != case.case]
    return Found(
        case.verdict, case.reason, bool(outcome.alarms),
        tuple(f"{row.method} {row.metric} {row.verdict}" for row in moved if row.method not in fault.culprits),
        tuple(f"{row.method} {row.metric}" for row in moved if row.method in fault.culprits),
    )  # fmt: skip
