"""What docs/studies/nf4.md holds: NF4's levels, errors by block size and bits, and changes of perplexity."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from harness.methods import fp4, nf4
from harness.methods.quantizing.codes import divide
from harness.methods.quantizing.int4 import blocks

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
BITS = (2, 3, 4, 5, 6, 7, 8)
SCALE_BITS = 32  # fp32 absmax, step or minimum, as our methods and bitsandbytes store them
SAMPLES = 1 << 20  # values drawn: the RMS of a billionth block moves in the fourth digit
SEED = 20_251_122  # any number would do
MODELS = ("tiny-gpt2", "tiny-olmo", "smollm2-135m")
MODEL_BLOCKS = {"tiny-gpt2": (32, 64, 256, 1024), "tiny-olmo": (32, 64, 256, 1024), "smollm2-135m": (32, 64)}
MODEL_BITS = (2, 3, 4, 5, 6, 8)  # of linear codes on the tiny models, block 64
FAMILIES = ("linear-int4", "linear-int4-affine", "nf4", "fp4")
NAMES = {
    "symmetric": "int{} symmetric",
    "affine": "int{} affine",
    "nf4": "NF4",
    "fp4": "FP4",
    "nf4-dq": "NF4, double q.",
}


def symmetric(weight: Tensor, bits: int, block: int) -> Tensor:
    """Rounded to a grid of 2^bits - 1 levels, step absmax / (2^(bits-1) - 1): any shape -> (n,) fp32."""
    top = 2 ** (bits - 1) - 1
    rows = blocks(weight, block)  # (blocks, block)
    scale = rows.abs().amax(dim=1, keepdim=True) / top
    stored: Tensor = divide(rows, scale).round_().clamp_(-top, top) * scale
    return stored.view(-1)[: weight.numel()]


def affine(weight: Tensor, bits: int, block: int) -> Tensor:
    """Rounded to a grid of 2^bits levels from a block's minimum to its maximum: any shape -> (n,) fp32."""
    top = 2**bits - 1
    rows = blocks(weight, block)  # (blocks, block)
    minimum = rows.amin(dim=1, keepdim=True)
    scale = (rows.amax(dim=1, keepdim=True) - minimum) / top
    stored: Tensor = divide(rows - minimum, scale).round_().clamp_(0, top) * scale + minimum
    return stored.view(-1)[: weight.numel()]


def table_of_levels(weight: Tensor, method: Any, block: int) -> Tensor:
    """Through a method's own codes: any shape -> (n,) fp32."""
    import torch

    flat = weight.reshape(1, -1)
    stored = {**method.CODES.encode(flat, block), "levels": torch.tensor(method.LEVELS)}
    found: Tensor = method.CODES.decode(stored, flat.shape, block)
    return found.view(-1)


def double_quantized(weight: Tensor, block: int) -> tuple[Tensor, float]:
    """Bitsandbytes' NF4 with 8-bit scales: (n,) fp32 and the bits a weight that its tensors take."""
    from bitsandbytes import functional

    from harness.inputs.models import sizes

    packed, state = functional.quantize_4bit(
        weight.reshape(-1), blocksize=block, compress_statistics=True, quant_type="nf4"
    )
    bits = 8 * sizes.bytes_of(sizes.tensors(packed, state)) / weight.numel()
    return functional.dequantize_4bit(packed, state).view(-1), bits


def candidates(weight: Tensor, block: int) -> Iterator[tuple[str, int, float, Tensor]]:
    """(kind, bits of a code, bits a weight with its scales, the weight as stored) of everything compared."""
    shared = SCALE_BITS / block
    for bits in BITS:
        yield "symmetric", bits, bits + shared, symmetric(weight, bits, block)
        yield "affine", bits, bits + 2 * shared, affine(weight, bits, block)
    yield "nf4", 4, 4 + shared, table_of_levels(weight, nf4, block)
    yield "fp4", 4, 4 + shared, table_of_levels(weight, fp4, block)
    if block >= 64:  # what every release of bitsandbytes takes
        values, whole = double_quantized(weight, block)
        yield "nf4-dq", 4, whole, values


def sources() -> dict[str, Tensor]:
    """Weights to store: drawn ones of unit variance, and the projections of models that were never quantized.

    A model's matrices follow each other, (out, in); all are multiples of the largest block, so that no block spans two.
    """
    import torch

    from harness.core.contracts import Scope
    from harness.methods.quantizing import arguments

    generator = torch.Generator().manual_seed(SEED)
    normal = torch.randn(SAMPLES, generator=generator)
    square = torch.randn(3, SAMPLES, generator=generator).square().sum(dim=0)  # chi square of 3 degrees
    student = torch.randn(SAMPLES, generator=generator) / (square / 3).sqrt() / math.sqrt(3)  # Var t3 = 3
    uniform = torch.rand(SAMPLES, generator=generator) - 0.5
    laplace = -uniform.sign() * (1 - 2 * uniform.abs()).clamp_min(1e-7).log() / math.sqrt(2)
    found = {"Gaussian": normal, "Laplace": laplace, "Student t3": student}
    for name in ("tiny-gpt2", "tiny-olmo"):
        model = bench(name).open()
        modules: list[Any] = [model.get_submodule(module) for module in arguments.select(model, Scope())]
        matrices = [module.weight.T if type(module).__name__ == "Conv1D" else module.weight for module in modules]
        assert all(matrix.numel() % BLOCKS[-1] == 0 for matrix in matrices)
        found[name] = torch.cat([matrix.detach().reshape(-1) for matrix in matrices])
    return found


def errors(weight: Tensor) -> list[dict[str, Any]]:
    """Mean absolute and RMS error of everything compared, in units of the weights' RMS."""
    size = float(weight.double().square().mean().sqrt())
    found = []
    for block in BLOCKS:
        for kind, code, bits, made in candidates(weight, block):
            gap = (made - weight).double() / size
            rms, absolute = float(gap.square().mean().sqrt()), float(gap.abs().mean())
            found.append({"kind": kind, "code": code, "block": block, "bits": bits, "rms": rms, "mean": absolute})
    return found


def quantiles() -> list[float]:
    """NF4's levels from its definition: normal quantiles at equal steps of probability, over the largest of them."""
    edge = 1 - (1 / 32 + 1 / 30) / 2  # the mean of the ends that 16 and 15 equal halves would have
    inverse = NormalDist().inv_cdf
    above = [inverse(0.5 + (edge - 0.5) * step / 8) for step in range(1, 9)]
    below = [-inverse(0.5 + (edge - 0.5) * step / 7) for step in range(7, 0, -1)]
    return [level / above[-1] for level in (*below, 0.0, *above)]


def use(levels: Sequence[float]) -> list[float]:
    """Share of Gaussian weights that take each level, in ascending order, blocks of 64."""
    import torch

    from harness.methods.quantizing.int4 import nearest

    rows = blocks(torch.randn(SAMPLES, generator=torch.Generator().manual_seed(SEED)), 64)
    codes = nearest(rows / rows.abs().amax(dim=1, keepdim=True), levels)
    counts = torch.bincount(codes.view(-1).int(), minlength=len(levels)).double() / codes.numel()
    return [float(counts[code]) for code in sorted(range(len(levels)), key=levels.__getitem__)]


def bench(model: str) -> Any:
    """A model with the text that its perplexity is measured on."""
    from harness.core.options import Declared
    from harness.core.specification import parse
    from harness.inputs.models import checkpoints
    from harness.inputs.texts import corpora
    from studies.pitfalls import Bench

    declared = Declared(Path())
    checkpoint = checkpoints.materialise(parse(model), declared)
    tiny = model.startswith("tiny")
    corpus = corpora.read(parse("synthetic" if tiny else "lee"), declared)
    return Bench(checkpoint, corpus, width=256, max_tokens=8192 if tiny else 2048)


def linear_recipe(kind: str, bits: int, block: int) -> Any:
    """A recipe that stores what `symmetric` or `affine` rounds to, for its perplexity; its bytes are not counted."""
    from harness.methods.quantizing.codes import Functions, Recipe

    rounding = {"symmetric": symmetric, "affine": affine}[kind]
    functions = Functions(
        lambda weight: {"values": rounding(weight, bits, block).view(weight.shape)},
        lambda kept, shape: kept["values"].clone(),
    )
    return Recipe(f"{kind}{bits}", functions)


def losses(model: str) -> dict[str, Any]:
    """Paired changes of NLL against fp32, by method, with bits a weight."""
    from harness.core import catalog
    from harness.core.contracts import Scope
    from harness.inputs.models import sizes
    from harness.inputs.texts.protocols import aggregate, window_slices
    from harness.methods.quantizing import arguments, stored

    where = bench(model)
    rows, kept = [], {}
    slices = window_slices(where.plan)

    def add(name: str, bits: float, candidate: Any) -> None:
        kept[name] = where.nll(candidate)
        rows.append({"method": name, "bits": bits, **change(kept[name], where.reference_nll, slices)})
        print(f"{model}: {name} {rows[-1]['delta']:+.4f}", file=sys.stderr)

    specifications = [f"{name}:block={block}" for block in MODEL_BLOCKS[model] for name in FAMILIES]
    for specification in (*specifications, "bnb-nf4", "bnb-nf4-dq"):
        candidate = where.open(specification)
        weights = list(catalog.methods()[specification.partition(":")[0]].quantized(candidate))
        add(specification, sizes.bits_per_weight(weights, "fp32"), candidate)
    for bits, kind in itertools.product(MODEL_BITS if model.startswith("tiny") else (), ("symmetric", "affine")):
        candidate = where.open()
        stored.apply(candidate, linear_recipe(kind, bits, 64), arguments.select(candidate, Scope()))
        add(f"{NAMES[kind].format(bits)}, block 64", bits + SCALE_BITS / 64 * (1 + (kind == "affine")), candidate)
    pairs = [
        {"block": block, **change(kept[f"nf4:block={block}"], kept[f"linear-int4-affine:block={block}"], slices)}
        for block in MODEL_BLOCKS[model]
    ]
    return {
        "text": where.corpus.name,
        "tokens": where.plan.tokens,
        "windows": len(where.plan.windows),
        "width": where.width,
        "reference": aggregate(where.reference_nll, where.plan),
        "note": where.checkpoint.note,
        "rows": rows,
        "nf4_over_affine": pairs,
    }


def change(candidate: Any, reference: Any, slices: Sequence[slice]) -> dict[str, float]:
    """The paired change of NLL with its interval."""
    from harness.core.stats import paired_delta

    estimate = paired_delta(candidate, reference, slices)
    return {"delta": estimate.value, "low": estimate.low, "high": estimate.high}


def measure(models: Sequence[str]) -> dict[str, Any]:
    """Levels, errors and losses."""
    return {
        "nf4": list(nf4.LEVELS),
        "quantiles": quantiles(),
        "fp4": sorted(fp4.LEVELS),
        "use": {"nf4": use(nf4.LEVELS), "symmetric": use([level / 7 for level in range(-7, 8)] + [2.0])[:15]},
        "errors": {name: errors(weight) for name, weight in sources().items()},
        "losses": {model: losses(model) for model in models or MODELS},
    }
