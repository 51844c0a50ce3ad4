"""Modules that hold integer codes and scales in place of a weight, and the walk that puts them into a model.

Codes and scales are buffers of a `StoredWeight`, the child `store` of the module they serve, so that they save and
load with a state_dict. Tied weights share one `StoredWeight`, every module of a model shares one `Tables`.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from harness.core import progress
from harness.core.contracts import QuantizedWeight
from harness.core.errors import HarnessError
from harness.methods.quantizing import encode, products
from harness.methods.quantizing.codes import Recipe
from harness.methods.quantizing.compiled import Loops


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
    """One quantized weight: what `Codes.encode` returned, as buffers.

    Attributes:
        kind: class of the module that the weight was taken from.
        matrix: (out, in), the shape it was quantized in.
        layout: its shape in that module: (out, in), (in, out) for Conv1D, (in,) for a norm.
        dtype: of the weight before.
    """

    def __init__(self, module: nn.Module, recipe: Recipe, tables: Tables) -> None:
        super().__init__()
        assert isinstance(module.weight, Tensor)
        weight = module.weight.detach()
        self.recipe, self.tables = recipe, tables
        self.kind, self.layout, self.dtype = type(module).__name__, tuple(weight.shape), tables.dtype or weight.dtype
        self.transposed = isinstance(module, Conv1D)  # GPT-2 keeps (in, out); scales belong to output channels
        rows = weight.reshape(-1, weight.shape[-1])
        rows = rows.T if self.transposed else rows  # (out, in)
        self.matrix = (rows.shape[0], rows.shape[1])
        stored = encode.quantize(recipe, rows, self.dtype)
        for name, tensor in stored.items():
            # a storage of exactly its own size, so that bytes counted are bytes held
            whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
            self.register_buffer(name, tensor if whole else tensor.clone(memory_format=torch.contiguous_format))

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, tables too, by name."""
        both: dict[str, Any] = {**self._buffers, **self._modules["tables"]._buffers}  # type: ignore[union-attr]
        return both  # neither module registers an absent buffer

    def dequantize(self) -> Tensor:
        """(out, in) fp32."""
        return self.recipe.codes.decode(self.tensors(), self.matrix, **self.recipe.values)

    def loops(self) -> Loops | None:
        """The compiled loops over what lies on a CPU, made once for as long as codes and scale are the same tensors."""
        codes, scale = self._buffers.get("codes"), self._buffers.get("scale")
        if codes is None or codes.device.type != "cpu":
            return None
        kept = _loops.get(self)
        if kept is None or kept[0] is not codes or kept[1] is not scale:
            loops = self.recipe.codes.loops(self.tensors(), self.matrix, **self.recipe.values)
            _loops[self] = kept = (codes, scale, loops)
        return kept[2]

    def restore(self) -> Tensor:
        """The weight it stands for, fp32, in the layout of the module it was taken from."""
        matrix = self.dequantize()
        return (matrix.T if self.transposed else matrix).reshape(self.layout)


# beside the stores, so that no copy of a model takes it along: what loops were made of, and they
_loops: MutableMapping[StoredWeight, tuple[Tensor | None, Tensor | None, Loops | None]] = weakref.WeakKeyDictionary()


def _weight(module: Any) -> Tensor:
    """The dequantized weight in its original layout and dtype; made anew at each access."""
    restored: Tensor = module.store.restore().to(module.store.dtype)
    return restored


class QuantizedLinear(nn.Module):
    """Stands for nn.Linear and Conv1D: x (..., in) -> x @ W.T + bias (..., out), from codes."""

    bias: nn.Parameter | None

    def __init__(self, store: StoredWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.store = store
        self.register_parameter("bias", bias)
        self.out_features, self.in_features = store.matrix

    weight = property(_weight)

    def forward(self, x: Tensor) -> Tensor:
        """As the codes multiply, else as all do."""
        store: Any = self._modules["store"]  # past __getattr__, which a token's 200 layers would feel
        bias = self._parameters["bias"]
        result: Tensor | None = store.recipe.codes.multiply(x, store, bias)
        return products.multiply(x, store, bias) if result is None else result

    def extra_repr(self) -> str:
        """Shape and method, for print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, method={self.store.recipe.method}"


@functools.cache
def _reading_its_store(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose `weight` is dequantized from `store`: forward stays that of the class (norms, embeddings)."""
    return type(f"Quantized{kind.__name__}", (kind,), {"weight": property(_weight), "__module__": __name__})


def weight_owners(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Every weight (parameter or store) that is some module's `weight`: first module name -> all that share it."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = store_of(module) or module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(name)
    return {names[0]: tuple(names) for names in owners.values()}


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
        names: modules, one for each weight; those tied to it follow and share its store.
        read: puts the weight of the module of this name in its place, just before it is quantized.
        dtype: that weights are rounded to before, where they are read in another; their own otherwise.

    Raises:
        HarnessError: a weight is not finite, or a scale overflows; the module is named.
    """
    owners = weight_owners(model)
    tables: Tables | None = None
    placement: Tensor | None = None
    for first in names:
        progress.note("a tensor to quantize")
        if read is not None:
            read(first)
        module = model.get_submodule(first)
        assert isinstance(module.weight, Tensor)
        placement = torch.empty(0, dtype=dtype or module.weight.dtype, device=module.weight.device)
        tables = tables or Tables(recipe, placement.device, dtype)
        try:
            with torch.no_grad():
                store = StoredWeight(module, recipe, tables)
        except HarnessError as error:
            raise HarnessError(f"{first}: {error}") from error
        _put(model, owners[first], store)
        del module  # the last hold on the unquantized weight
    if placement is not None and not any(parameter.is_floating_point() for parameter in model.parameters()):
        # transformers reads a model's dtype and device off its parameters, of which the scope `all` may leave none
        model.register_parameter("placement", nn.Parameter(placement, requires_grad=False))


def _put(model: nn.Module, names: Iterable[str], store: StoredWeight) -> None:
    """Rebuild the modules of these names around a store; one object that stands at several places stays one."""
    rebuilt: dict[nn.Module, nn.Module] = {}
    for name in names:
        old: Any = model.get_submodule(name)
        kind: Any = type(old)
        if old not in rebuilt and kind in (nn.Linear, Conv1D):
            rebuilt[old] = QuantizedLinear(store, old._parameters.get("bias")).train(old.training)
        elif old not in rebuilt:  # the same object under a subclass
            del old._parameters["weight"]
            old.__class__, old.store = _reading_its_store(kind), store
            rebuilt[old] = old
        model.set_submodule(name, rebuilt[old])


def store_of(module: nn.Module) -> StoredWeight | None:
    """The module's quantized weight, if it has one."""
    store = module._modules.get("store")
    return store if isinstance(store, StoredWeight) else None


def weights(model: nn.Module) -> Iterator[QuantizedWeight]:
    """Each quantized weight once, under its first module's name; the first also carries the shared tables' bytes."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        store = store_of(module)
        if store is None or id(store) in seen:
            continue
        fresh = {id(tensor): tensor.nbytes for tensor in store.tensors().values() if id(tensor) not in seen}
        seen.update(fresh, (id(store),))
        yield QuantizedWeight(name, store.kind, math.prod(store.matrix), sum(fresh.values()), store.restore)
