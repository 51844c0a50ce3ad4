"""Modules that hold integer codes and scales in place of a weight, and the walk that puts them into a model.

A weight is a module's `weight`, or another parameter that the forward multiplies by: experts that are packed into one
tensor, a matrix an expert. Its name is its module's, or the parameter's own ('model.layers.0.mlp.experts.down_proj').

Codes and scales are buffers of a `StoredWeight`, a child of the module they serve (`store`, or 'down_proj_store'), so
that they save and load with a state_dict. Tied weights share one `StoredWeight`, every module of a model shares one
`Tables`.
"""

from __future__ import annotations

import functools
import math
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from harness.core import progress
from harness.core.contracts import AS_MODEL, QuantizedWeight
from harness.core.errors import HarnessError
from harness.methods.quantizing import encode, products
from harness.methods.quantizing.codes import Recipe
from harness.methods.quantizing.compiled import Loops

WEIGHT = "weight"
# Parameters beside `weight` that are added, scaled by, looked up or passed through exp, never multiplied as matrices.
NO_MATRIX = re.compile(r"bias|scale|embed|position|static|A_log|^D$|^time_|sinks", re.IGNORECASE)
# Parameters (..., in, out), by class: of those whose module has no `is_transposed` to say so.
TRANSPOSED: Mapping[str, frozenset[str]] = {
    "Llama4TextExperts": frozenset({"gate_up_proj", "down_proj"}),
    "DbrxExpertGLU": frozenset({"w2"}),
    "RecurrentGemmaRglru": frozenset({"input_gate_weight", "recurrent_gate_weight"}),
    "XLNetRelativeAttention": frozenset("qkvr"),
    "InklingRelativeLogits": frozenset({"proj"}),
    "Inkling2RelativeLogits": frozenset({"proj"}),
}
FLAT = frozenset({"XLNetRelativeAttention"})  # of one matrix, whose rows are kept as (heads, width)


class KeepsDtype(nn.Module):
    """A module whose buffers move between devices but keep their dtype, whatever model.to(dtype) says."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep, recurse)  # type: ignore[no-untyped-call]


class Tables(KeepsDtype):
    """What a model's stores share: code tables, fp32, and the dtype that weights are rounded to (None: theirs)."""

    def __init__(self, recipe: Recipe, device: torch.device, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype = dtype
        for name, levels in recipe.codes.tables.items():
            self.register_buffer(name, torch.tensor(levels, dtype=torch.float32, device=device))


class StoredWeight(KeepsDtype):
    """One quantized weight: what `Codes.encode` returned, as buffers; of packed matrices one behind the other.

    Attributes:
        kind: class of the module that the weight was taken from.
        count: matrices that it is made of; 1 but for packed experts. With more, each buffer has that many in front.
        matrix: (out, in), the shape that each was quantized in.
        layout: its shape in that module: (out, in), (in, out) for Conv1D, (in,) for a norm, (experts, out, in).
        dtype: of the weight before.
    """

    def __init__(self, module: nn.Module, recipe: Recipe, tables: Tables, key: str = WEIGHT) -> None:
        super().__init__()
        weight = module._parameters[key]
        assert isinstance(weight, Tensor)
        self.recipe, self.tables = recipe, tables
        self.kind, self.layout = plain_class(module).__name__, tuple(weight.shape)
        self.dtype = tables.dtype or weight.dtype
        self.transposed = is_transposed(module, key)  # scales belong to output channels
        matrices = as_matrices(module, key, weight.detach())  # (count, out, in)
        self.count, self.matrix = len(matrices), (matrices.shape[1], matrices.shape[2])
        stored = encode.quantize_all(recipe, matrices, self.dtype)
        for name, tensor in stored.items():
            # a storage of exactly its own size, so that bytes counted are bytes held
            whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
            self.register_buffer(name, tensor if whole else tensor.clone(memory_format=torch.contiguous_format))

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, tables too, by name."""
        both: dict[str, Any] = {**self._buffers, **self._modules["tables"]._buffers}  # type: ignore[union-attr]
        return both  # neither module registers an absent buffer

    def dequantize(self) -> Tensor:
        """(out, in) fp32; of packed matrices (count, out, in)."""
        kept = self.tensors()
        if self.count == 1:
            return self.recipe.codes.decode(kept, self.matrix, **self.recipe.values)
        whole = torch.empty((self.count, *self.matrix), device=next(self.buffers()).device)
        for place in range(self.count):
            own = {name: tensor[place] if name in self._buffers else tensor for name, tensor in kept.items()}
            whole[place] = self.recipe.codes.decode(own, self.matrix, **self.recipe.values)
        return whole

    def loops(self) -> Loops | None:
        """The compiled loops over what lies on a CPU, made once for as long as codes and scale are the same tensors."""
        codes, scale = self._buffers.get("codes"), self._buffers.get("scale")
        if codes is None or codes.device.type != "cpu" or self.count > 1:
            return None
        kept = _loops.get(self)
        if kept is None or kept[0] is not codes or kept[1] is not scale:
            loops = self.recipe.codes.loops(self.tensors(), self.matrix, **self.recipe.values)
            _loops[self] = kept = (codes, scale, loops)
        return kept[2]

    def restore(self) -> Tensor:
        """The weight it stands for, fp32, in the layout of the module it was taken from."""
        matrices = self.dequantize()
        lying = matrices.transpose(-2, -1) if self.transposed else matrices
        return lying.reshape(self.layout).contiguous()  # products of another layout may round otherwise


# beside the stores, so that no copy of a model takes it along: what loops were made of, and they
_loops: MutableMapping[StoredWeight, tuple[Tensor | None, Tensor | None, Loops | None]] = weakref.WeakKeyDictionary()


class _Unpacked(threading.local):
    """What the forward of packed experts that runs in this thread has unpacked so far; None outside of one."""

    weights: dict[StoredWeight, Tensor] | None = None


_unpacked = _Unpacked()


def _child(key: str) -> str:
    return "store" if key == WEIGHT else f"{key}_store"


def _restored(key: str) -> property:
    """A property: the dequantized weight in its original layout and dtype, made anew at each access outside a pack."""
    child = _child(key)

    def read(module: nn.Module) -> Tensor:
        store: Any = module._modules[child]
        known = _unpacked.weights
        if known is None:
            known = {}
        if store not in known:
            known[store] = store.restore().to(store.dtype)
        return known[store]

    return property(read)


class QuantizedLinear(nn.Module):
    """Stands for nn.Linear and Conv1D: x (..., in) -> x @ W.T + bias (..., out), from codes."""

    bias: nn.Parameter | None

    def __init__(self, store: StoredWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.store = store
        self.register_parameter("bias", bias)
        self.out_features, self.in_features = store.matrix

    weight = _restored(WEIGHT)

    def forward(self, x: Tensor) -> Tensor:
        """As the codes multiply, else as all do."""
        store: Any = self._modules["store"]  # past __getattr__, which a token's 200 layers would feel
        bias = self._parameters["bias"]
        result: Tensor | None = store.recipe.codes.multiply(x, store, bias)
        return products.multiply(x, store, bias) if result is None else result

    def extra_repr(self) -> str:
        """Shape and method, for print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, method={self.store.recipe.method}"


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The module's class before any of its weights were quantized in place."""
    kind: type[nn.Module] = getattr(type(module), "unquantized_class", type(module))
    return kind


@functools.cache
def _reading_its_stores(kind: type[nn.Module], keys: tuple[str, ...], packed: bool) -> type[nn.Module]:
    """A subclass whose weights are dequantized from its stores: forward stays that of the class."""
    body: dict[str, Any] = {key: _restored(key) for key in keys}
    if packed:
        body["forward"] = _unpacking_once(kind.forward)
    return type(f"Quantized{kind.__name__}", (kind,), {**body, "unquantized_class": kind, "__module__": __name__})


def _unpacking_once(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward, which may ask for its weights once an expert; they are unpacked once."""

    @functools.wraps(forward)
    def run(*given: Any, **named: Any) -> Any:
        outer, _unpacked.weights = _unpacked.weights, {}
        try:
            return forward(*given, **named)
        finally:
            _unpacked.weights = outer

    return run


def is_matrix(module: nn.Module, key: str, shape: Sequence[int]) -> bool:
    """Whether a forward multiplies by a parameter as by a matrix, or by several packed into one.

    By how transformers writes its models: `weight` of linear layers, dense convolutions and routers, and whatever else
    has rows and columns and is not named as what is added or looked up. `tests/methods/test_matrices.py` holds it to
    what forwards do.
    """
    if isinstance(module, (nn.Linear, Conv1D, QuantizedLinear)):
        return key == WEIGHT
    if isinstance(module, nn.Embedding) or len(shape) < 2:
        return False
    if isinstance(module, _ConvNd):
        return key == WEIGHT and shape[1] > 1  # else a filter a channel
    if min(shape[-2:]) < 2:
        return False
    return "norm" not in plain_class(module).__name__.lower() if key == WEIGHT else not NO_MATRIX.search(key)


def is_transposed(module: nn.Module, key: str) -> bool:
    """Whether a weight lies as (in, out), as GPT-2's do, or packed experts as (experts, in, out)."""
    if isinstance(module, Conv1D):
        return True
    kinds = [kind.__name__ for kind in type(module).__mro__]
    stated = vars(module).get("is_transposed") is True and key != WEIGHT
    return stated or any(key in TRANSPOSED.get(kind, ()) for kind in kinds)


def as_matrices(module: nn.Module, key: str, weight: Tensor) -> Tensor:
    """A weight as the matrices that it is made of, a view: (count, out, in)."""
    experts = vars(module).get("moe_num_experts")  # DBRX stacks the rows of its experts
    if isinstance(module, _ConvNd) or any(kind.__name__ in FLAT for kind in type(module).__mro__):
        weight = weight.flatten(1)
    elif experts and key != WEIGHT:
        weight = weight.view(experts, -1, weight.shape[1])
    matrices = weight.reshape(-1, *weight.shape[-2:]) if weight.dim() > 1 else weight.reshape(1, 1, -1)
    return matrices.transpose(1, 2) if is_transposed(module, key) else matrices


def held(module: nn.Module) -> Iterator[tuple[str, Tensor | StoredWeight]]:
    """A module's weights by the name of their parameter, quantized or not: `weight`, and other matrices."""
    for key, parameter in module._parameters.items():
        if parameter is not None and (key == WEIGHT or is_matrix(module, key, parameter.shape)):
            yield key, parameter
    for name, child in module._modules.items():
        if isinstance(child, StoredWeight):
            yield (WEIGHT if name == "store" else name.removesuffix("_store")), child


def weight_owners(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every weight that is some module's `weight`: first module name -> all that share it."""
    return _shared(
        (name, weight)
        for name, module in model.named_modules(remove_duplicate=False)
        for key, weight in held(module)
        if key == WEIGHT
    )


def owners(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every weight, parameter or store: first name -> all its names. `place` finds a weight by its name."""
    return _shared(
        (name if key == WEIGHT else f"{name}.{key}".lstrip("."), weight)
        for name, module in model.named_modules(remove_duplicate=False)
        for key, weight in held(module)
    )


def _shared(named: Iterable[tuple[str, Tensor | StoredWeight]]) -> dict[str, tuple[str, ...]]:
    found: dict[int, list[str]] = {}
    for name, weight in named:
        found.setdefault(id(weight), []).append(name)
    return {names[0]: tuple(names) for names in found.values()}


def place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module of a weight's name, and the weight's own name in it."""
    if not name:
        return model, WEIGHT
    parent, _, leaf = name.rpartition(".")
    home = model.get_submodule(parent)
    module = home._modules.get(leaf)
    return (home, leaf) if module is None else (module, WEIGHT)


def parameter_name(model: nn.Module, name: str) -> str:
    """How a weight of an unquantized model is called in its state_dict."""
    _, key = place(model, name)
    return f"{name}.{key}" if key == WEIGHT else name


def apply(
    model: nn.Module,
    recipe: Recipe,
    names: Iterable[str],
    *,
    read: Callable[[str], None] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Quantize the named weights of a model in place, on the device they lie on (meta too).

    Args:
        model: unquantized; each weight is freed as soon as its codes exist.
        recipe: the method.
        names: of the weights, each once; those tied to it follow and share its store.
        read: puts the weight of this name in its place, just before it is quantized.
        dtype: that weights are rounded to before, where they are read in another; their own otherwise.

    Raises:
        HarnessError: a weight is not finite, or a scale overflows; the module is named.
    """
    names, everywhere = list(names), owners(model)
    _refuse_without_products(model, recipe, names)
    tables: Tables | None = None
    placement: Tensor | None = None
    for first in progress.each("a tensor to quantize", names):
        if read is not None:
            read(first)
        module, key = place(model, first)
        weight = module._parameters[key]
        assert isinstance(weight, Tensor)
        placement = torch.empty(0, dtype=dtype or weight.dtype, device=weight.device)
        tables = tables or Tables(recipe, placement.device, dtype)
        try:
            with torch.no_grad():
                store = StoredWeight(module, recipe, tables, key)
        except HarnessError as error:
            raise HarnessError(f"{first}: {error}") from error
        _put(model, everywhere[first], store)
        del module, weight  # the last holds on the unquantized weight
    if placement is not None and not any(parameter.is_floating_point() for parameter in model.parameters()):
        # transformers reads a model's dtype and device off its parameters, of which the scope `all` may leave none
        model.register_parameter("placement", nn.Parameter(placement, requires_grad=False))


def _refuse_without_products(model: nn.Module, recipe: Recipe, names: Iterable[str]) -> None:
    """HarnessError where activations are to be rounded before a product that is not ours but the module's own."""
    if recipe.compute == AS_MODEL and not recipe.codes.rounds:
        return
    for name in names:
        module, key = place(model, name)
        weight = module._parameters[key]
        assert weight is not None
        if is_matrix(module, key, weight.shape) and type(module) not in (nn.Linear, Conv1D):
            asked = "" if recipe.compute == AS_MODEL else f" under compute={recipe.compute}"
            raise HarnessError(
                f"{recipe.method}{asked} rounds what linear layers are given; {name} ({type(module).__name__}) "
                "multiplies in its own way: narrow the scope with names=GLOB, or take a method of weights alone"
            )


def _put(model: nn.Module, names: Iterable[str], store: StoredWeight) -> None:
    """Rebuild the modules of these weights around a store; one object that stands at several places stays one."""
    rebuilt: dict[nn.Module, nn.Module] = {}
    for name in names:
        old, key = place(model, name)
        kind: Any = plain_class(old)
        if old not in rebuilt and kind in (nn.Linear, Conv1D):
            bias: Any = old._parameters.get("bias")
            rebuilt[old] = QuantizedLinear(store, bias).train(old.training)
        elif old not in rebuilt:  # the same object under a subclass
            del old._parameters[key]
            old.add_module(_child(key), store)
            stores = dict(held(old))
            keys = tuple(sorted(key for key, weight in stores.items() if isinstance(weight, StoredWeight)))
            packed = any(isinstance(weight, StoredWeight) and weight.count > 1 for weight in stores.values())
            old.__class__ = _reading_its_stores(kind, keys, packed)
            rebuilt[old] = old
        if rebuilt[old] is not old:
            model.set_submodule(name, rebuilt[old])


def store_of(module: nn.Module) -> StoredWeight | None:
    """The module's quantized `weight`, if it has one."""
    store = module._modules.get("store")
    return store if isinstance(store, StoredWeight) else None


def weights(model: nn.Module) -> Iterator[QuantizedWeight]:
    """Each quantized weight once, under its first name; the first also carries the shared tables' bytes."""
    seen: set[int] = set()
    for first, names in owners(model).items():
        module, key = place(model, names[0])
        store = module._modules.get(_child(key))
        if not isinstance(store, StoredWeight):
            continue
        fresh = {id(tensor): tensor.nbytes for tensor in store.tensors().values() if id(tensor) not in seen}
        seen.update(fresh)
        yield QuantizedWeight(first, store.kind, math.prod(store.layout), sum(fresh.values()), store.restore)
