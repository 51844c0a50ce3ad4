"""Every weight method of our own on the shapes that gpt2, OLMo-1B and Phi-3-mini have, and on drawn ones.

Covered: each distinct matrix and vector that the scope `all` quantizes in those three models (projections, embeddings,
head, norms), fp32 or bf16 as it lies in their files, transposed where GPT-2 keeps it so, under every method with its
default values; of two methods with the same functions one, where a weight has more than LARGE elements. What is stored
must have the predicted shapes and the values of a definition in NumPy that knows no parts; the compiled loop and plain
torch, which every card takes, must give the same bits. Projections are dequantized too. gptq-int4 chooses codes column
by column, which takes long: its bytes are predicted on every projection, its codes checked on the smallest.

A large weight repeats PERIOD drawn rows, a number that no part is a multiple of: drawing and defining stay cheap, and
a part that lands in the wrong place is seen. Drawn shapes have parts of some hundred weights, odd ones included.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from harness.core import catalog
from harness.core.contracts import Arguments, Method, Scope
from harness.core.errors import HarnessError
from harness.inputs.models import checkpoints, names
from harness.methods import absmax_int8, fp4, linear_int4, linear_int4_affine, nf4
from harness.methods.quantizing import compiled, encode, gptq, stored
from harness.methods.quantizing.codes import Codes, Functions, Recipe, divide
from harness.methods.quantizing.int4 import pack

Array = NDArray[Any]
GPTQ = "gptq-int4"
OURS = {name: method for name, method in catalog.methods().items() if method.scoped and not method.requires}
SHAPES = {  # (out, in)
    "gpt2 embedding and head": (50257, 768),
    "gpt2 positions": (1024, 768),
    "gpt2 norm": (1, 768),
    "gpt2 c_attn": (2304, 768),
    "gpt2 attn.c_proj": (768, 768),
    "gpt2 c_fc": (3072, 768),
    "gpt2 mlp.c_proj": (768, 3072),
    "olmo-1b embedding and head": (50304, 2048),
    "olmo-1b q, k, v, o": (2048, 2048),
    "olmo-1b gate, up": (8192, 2048),
    "olmo-1b down": (2048, 8192),
    "phi-3-mini embedding, head": (32064, 3072),
    "phi-3-mini norm": (1, 3072),
    "phi-3-mini qkv": (9216, 3072),
    "phi-3-mini o": (3072, 3072),
    "phi-3-mini gate_up": (16384, 3072),
    "phi-3-mini down": (3072, 8192),
}
TRANSPOSED = frozenset(name for name in SHAPES if "c_" in name)  # Conv1D
PERIOD = 251  # rows
LARGE = 2**26  # weights: the embeddings and heads of the larger two
ALIKE = frozenset({"absmax-int8-w8a8", "fp4"})  # quantize as absmax-int8 does, as nf4 does by another table


def default(method: Method) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in method.parameters.items()}


def sketch(name: str, method: Method, part: str) -> list[stored.StoredWeight]:
    """The stores of an architecture's model of one layer, as predicted."""
    config = names.config_of(name)
    config.num_hidden_layers = 1
    model = checkpoints.sketch_model(config, "fp32")
    method.sketch(model, Arguments("fp32", Scope(part), default(method)))
    return [module for module in model.modules() if isinstance(module, stored.StoredWeight)]


@functools.cache
def recipe_of(name: str) -> Recipe:
    return sketch("gpt2", OURS[name], "attention")[0].recipe


def by_torch(recipe: Recipe, rows: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """What is stored where Numba is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "available", lambda: False)
        return encode.quantize(recipe, rows, dtype)


def tables(codes: Codes) -> dict[str, Tensor]:
    return {key: torch.tensor(levels) for key, levels in codes.tables.items()}


def predicted(recipe: Recipe, shape: tuple[int, int]) -> dict[str, Tensor]:
    """What the model without weights holds for a matrix."""
    model = nn.Sequential(nn.Linear(shape[1], shape[0], device="meta"))
    stored.apply(model, recipe, ["0"])
    store: Any = model[0].store
    return dict(store._buffers)


# --- definitions in NumPy: the whole weight at once, fp32 throughout ----------------------------------------------


def nonzero(step: Array) -> Array:
    return np.where(step == 0, np.float32(1), step)


def nearest_whole(values: Array, step: Array, low: int, high: int, add: Array | int = 0) -> Array:
    return np.clip(np.rint(values / nonzero(step)) + add, low, high)


def packed(found: Array, count: int) -> Array:
    flat = found.reshape(-1)[:count].astype(np.uint8)
    pairs = np.append(flat, np.zeros(count % 2, np.uint8)).reshape(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]


def in_rows(weight: Array, block: int) -> dict[str, Array]:
    scale = np.abs(weight).max(1, keepdims=True) / np.float32(127)
    return {"codes": nearest_whole(weight, scale, -127, 127).astype(np.int8), "scale": scale}


def in_tensor(weight: Array, block: int) -> dict[str, Array]:
    scale = np.abs(weight).max() / np.float32(127)
    return {"codes": nearest_whole(weight, scale, -127, 127).astype(np.int8), "scale": scale}


def with_zero_point(weight: Array, block: int) -> dict[str, Array]:
    least = weight.min(1, keepdims=True)
    step = (weight.max(1, keepdims=True) - least) / np.float32(255)
    step = np.where(step == 0, np.abs(least), step)
    zero = -128 - np.rint(least / nonzero(step))
    found = nearest_whole(weight, step, -128, 127, zero)
    return {"codes": found.astype(np.int8), "scale": step, "zero_point": zero}


def cut(weight: Array, block: int) -> Array:
    return np.pad(weight.reshape(-1), (0, -weight.size % block), mode="edge").reshape(-1, block)


def in_blocks(weight: Array, block: int) -> dict[str, Array]:
    rows = cut(weight, block)
    scale = np.abs(rows).max(1) / np.float32(7)
    return {"codes": packed(nearest_whole(rows, scale[:, None], -7, 7) + 8, weight.size), "scale": scale}


def with_minimum(weight: Array, block: int) -> dict[str, Array]:
    rows = cut(weight, block)
    least = rows.min(1)
    scale = (rows.max(1) - least) / np.float32(15)
    found = nearest_whole(rows - least[:, None], scale[:, None], 0, 15)
    return {"codes": packed(found, weight.size), "scale": scale, "minimum": least}


def to_levels(weight: Array, block: int, levels: tuple[float, ...]) -> dict[str, Array]:
    rows, table = cut(weight, block), np.array(levels, np.float32)
    scale, order = np.abs(rows).max(1), np.argsort(table, kind="stable")
    midpoints = (table[order][:-1] + table[order][1:]) / np.float32(2)
    ranks = np.searchsorted(midpoints, rows / nonzero(scale)[:, None], side="left")
    return {"codes": packed(order[ranks], weight.size), "scale": scale}


@dataclass(frozen=True)
class Definition:
    """What is stored of (out, in) fp32 in blocks, and the levels that 4-bit codes stand for."""

    stored: Callable[[Array, int], dict[str, Array]]
    levels: tuple[float, ...] = ()

    def dequantized(self, stored: dict[str, Array], shape: tuple[int, int], block: int) -> Array:
        """(out, in) fp32."""
        if not self.levels:
            return (stored["codes"].astype(np.float32) - stored.get("zero_point", np.float32(0))) * stored["scale"]
        nibbles = np.stack((stored["codes"] >> 4, stored["codes"] & 15), 1).reshape(-1, block)
        found = np.array(self.levels, np.float32)[nibbles] * stored["scale"][:, None]
        return (found + stored["minimum"][:, None] if "minimum" in stored else found).reshape(shape)


DEFINED = {
    "absmax-int8": Definition(in_rows),
    "absmax-int8-w8a8": Definition(in_rows),
    "absmax-int8-tensor": Definition(in_tensor),
    "zeropoint-int8": Definition(with_zero_point),
    "linear-int4": Definition(in_blocks, linear_int4.CODES.levels),
    "linear-int4-affine": Definition(with_minimum, linear_int4_affine.CODES.levels),
    "nf4": Definition(functools.partial(to_levels, levels=nf4.LEVELS), nf4.LEVELS),
    "fp4": Definition(functools.partial(to_levels, levels=fp4.LEVELS), fp4.LEVELS),
}


def test_every_method_of_ours_is_defined_here() -> None:
    assert OURS.keys() == {*DEFINED, GPTQ}


@pytest.mark.parametrize("name", names.ARCHITECTURES)
def test_the_shapes_are_the_models_own(name: str) -> None:
    found = {(store.matrix, store.transposed) for store in sketch(name, OURS["nf4"], "all")}
    assert found == {(shape, key in TRANSPOSED) for key, shape in SHAPES.items() if key.startswith(name)}


# --- true shapes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """A weight and the rows that it repeats: both (rows, in), the second in fp32."""

    weight: Tensor
    period: Array


@pytest.fixture(scope="module")
def drawn(request: pytest.FixtureRequest) -> Drawn:
    rows, inputs = SHAPES[request.param]
    lying = torch.bfloat16 if "phi" in request.param else torch.float32
    period = torch.randn(min(rows, PERIOD), inputs, generator=torch.Generator().manual_seed(rows)).mul_(0.1).to(lying)
    period[:1, 0] = 2  # the whole tensor's absmax
    places = torch.arange(rows) % len(period)
    transposed = request.param in TRANSPOSED
    weight = period.T.contiguous().index_select(1, places).T if transposed else period.index_select(0, places)
    return Drawn(weight, period.float().numpy())


def repeated(part: Tensor, rows: int) -> Iterator[tuple[int, Tensor]]:
    """What a weight's rows must hold, a period at a time: (first row, (rows, ...))."""
    for start in range(0, rows, PERIOD):
        yield start, part[: rows - start]


def is_repeated(found: Tensor, wanted: Array, rows: int) -> bool:
    """Whether a tensor is what is stored of the repeated rows, or one value for all of them."""
    if not found.dim():
        return bool(found == torch.from_numpy(np.asarray(wanted)))
    part = torch.from_numpy(wanted).view(min(rows, PERIOD), -1)
    lines = found.view(rows, -1)
    return all(torch.equal(lines[at : at + len(one)], one) for at, one in repeated(part, rows))


def same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


CASES = [(key, name) for key in SHAPES for name in DEFINED if math.prod(SHAPES[key]) <= LARGE or name not in ALIKE]


@pytest.mark.parametrize(("drawn", "name"), CASES, indirect=["drawn"])
def test_true_shapes_are_stored_as_predicted_and_defined(drawn: Drawn, name: str) -> None:
    recipe, shape = recipe_of(name), (drawn.weight.shape[0], drawn.weight.shape[1])
    block = int(recipe.values.get("block", 0))
    wanted = DEFINED[name].stored(drawn.period, block)
    room = predicted(recipe, shape)
    plain = by_torch(recipe, drawn.weight, drawn.weight.dtype)
    assert plain.keys() == room.keys() == wanted.keys()
    for key, tensor in plain.items():
        assert (tensor.shape, tensor.dtype, tensor.nbytes) == (room[key].shape, room[key].dtype, room[key].nbytes)
        assert is_repeated(tensor, wanted[key], shape[0])
    found = encode.quantize(recipe, drawn.weight, drawn.weight.dtype)
    assert found.keys() == plain.keys()
    assert all(same_bits(found[key], tensor) for key, tensor in plain.items())
    if math.prod(shape) > LARGE / 2:
        return  # half a gigabyte of fp32
    values = DEFINED[name].dequantized(wanted, drawn.period.shape, block)
    kept = plain | tables(recipe.codes)
    assert is_repeated(recipe.codes.decode(kept, shape, **recipe.values), values, shape[0])
    loops = recipe.codes.loops(kept, shape, **recipe.values)
    assert (loops is None) == (name == "absmax-int8-w8a8")
    if loops is not None:
        assert is_repeated(loops.decode(), values, shape[0])


@pytest.mark.parametrize("name", names.ARCHITECTURES)
def test_gptq_keeps_the_bytes_of_linear_int4_on_true_shapes(name: str) -> None:
    stores = [sketch(name, OURS[each], "linear") for each in (GPTQ, "linear-int4")]
    assert len(stores[0]) == len(stores[1]) > 0
    for ours, plain in zip(*stores, strict=True):
        assert ours.matrix == plain.matrix
        assert {key: (tensor.shape, tensor.dtype) for key, tensor in ours.tensors().items()} == {
            key: (tensor.shape, tensor.dtype) for key, tensor in plain.tensors().items()
        }


def test_gptq_rounds_to_nearest_where_inputs_are_independent() -> None:
    shape = SHAPES["gpt2 attn.c_proj"]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = gptq.quantize(weight, torch.eye(shape[1]), 64, 0.01, True)
    room, wanted = predicted(recipe_of(GPTQ), shape), DEFINED["linear-int4"].stored(weight.numpy(), 64)
    for name, tensor in found.items():
        assert (tensor.shape, tensor.dtype) == (room[name].shape, room[name].dtype)
        assert torch.equal(tensor, torch.from_numpy(wanted[name]))
    values = DEFINED["linear-int4"].dequantized(wanted, shape, 64)
    assert torch.equal(linear_int4.CODES.decode(found, shape, 64), torch.from_numpy(values))


# --- drawn shapes -------------------------------------------------------------------------------------------------


def awkward(rows: int, inputs: int, seed: int) -> Tensor:
    """Normal values of several sizes, with rows of zeros, of one value and of one too small to divide by."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, inputs, generator=generator)
    weight *= torch.logspace(-3, 2, 7)[torch.arange(rows) % 7, None]
    special = torch.randint(12, (rows,), generator=generator)
    for kind, value in enumerate((0.0, -3.0, 1e-45)):
        weight[special == kind] = value
    return weight


@given(
    name=st.sampled_from(sorted(DEFINED)),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 70) | st.sampled_from((64, 96, 128, 192))),
    block=st.sampled_from((1, 2, 3, 7, 16, 17, 48, 64, 128)),
    part=st.integers(1, 700),
    lying=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=250)
def test_drawn_shapes_are_stored_as_predicted_and_defined(
    name: str, shape: tuple[int, int], block: int, part: int, lying: torch.dtype, transposed: bool, seed: int
) -> None:
    recipe = recipe_of(name)
    recipe = replace(recipe, values={"block": block} if "block" in recipe.values else {})
    weight = awkward(*shape, seed).to(lying)
    wanted = DEFINED[name].stored(weight.float().numpy(), block)
    lies = weight.T.contiguous().T if transposed else weight
    room = predicted(recipe, shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "PART", part)
        found, plain = encode.quantize(recipe, lies, lying), by_torch(recipe, lies, lying)
    assert found.keys() == plain.keys() == room.keys() == wanted.keys()
    for key, tensor in plain.items():
        assert (tensor.shape, tensor.dtype) == (room[key].shape, room[key].dtype)
        assert torch.equal(tensor, torch.from_numpy(np.asarray(wanted[key])))
        assert same_bits(found[key], tensor)
    kept = found | tables(recipe.codes)
    loops = recipe.codes.loops(kept, shape, **recipe.values)
    if loops is not None:
        assert torch.equal(loops.decode(), recipe.codes.decode(kept, shape, **recipe.values))


# --- grains of others ---------------------------------------------------------------------------------------------


def rowwise_int4(weight: Tensor) -> dict[str, Tensor]:
    """A scale a row, two codes a byte: with an odd number of columns a byte holds codes of two rows."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 7
    found = divide(weight, scale).round_().clamp_(-7, 7).add_(8).byte()
    return {"codes": pack(found, weight.numel()), "scale": scale}


@pytest.mark.parametrize("shape", [(40, 33), (41, 33), (3, 1), (41, 32)])
def test_a_part_by_rows_cuts_no_byte_of_two_codes(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(encode, "PART", 1)
    found = encode.quantize(
        Recipe("mine", Functions(rowwise_int4, lambda kept, shape: weight, grain="row")), weight, weight.dtype
    )
    wanted = rowwise_int4(weight)
    assert all(same_bits(found[key], tensor) for key, tensor in wanted.items())


@pytest.mark.parametrize(
    "extra",
    [lambda weight: weight.amax(), lambda weight: weight.amax().view(1), lambda weight: weight.new_ones(16)],
    ids=["a number", "one number", "a table"],
)
def test_what_is_not_made_of_parts_is_refused(
    extra: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def quantize(weight: Tensor) -> dict[str, Tensor]:
        return {**absmax_int8.CODES.encode(weight), "extra": extra(weight)}

    functions = Functions(quantize, lambda kept, shape: torch.empty(shape), grain="row")
    model = nn.Sequential(nn.Linear(8, 50))
    monkeypatch.setattr(encode, "PART", 80)
    with pytest.raises(HarnessError, match=r"^0: mine stores no part of its extra for each part .*: leave out grain$"):
        stored.apply(model, Recipe("mine", functions), ["0"])
    stored.apply(model, Recipe("mine", replace(functions, grain="")), ["0"])
