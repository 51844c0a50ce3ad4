"""Nothing that a forward of our methods needs lies on the host: no table is copied to a card, no value read back.

Quantized modules run on the meta device, which takes every path of a card but those that ask which card it is. There a
read of a value raises by itself; a copy from the host is seen by its tensor, a tensor made of Python's numbers by the
function that makes it (on a card each is a copy from the host, and a wait).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config

from harness.core import catalog
from harness.core.contracts import Arguments, Method, Scope
from harness.inputs.models import checkpoints
from harness.methods import linear_int4, linear_int4_affine
from harness.methods.quantizing import int8, stored
from harness.methods.quantizing.int4 import BLOCK
from harness.methods.quantizing.weight_method import weight_method

OURS = {name: method for name, method in catalog.methods().items() if method.scoped and not method.requires}
COMPUTED = [
    (name, compute)
    for name, method in OURS.items()
    for compute in (method.parameters["compute"].choices if "compute" in method.parameters else ("dtype",))
]
FROM_NUMBERS = frozenset(
    {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.frombuffer, Tensor.new_tensor}
)
GPT2 = GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)


class MadeOfNumbers(TorchFunctionMode):
    """Refuses what makes a tensor of numbers that Python or NumPy holds."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The call, if it may be."""
        assert func not in FROM_NUMBERS, f"{func.__name__} copies from the host"
        return func(*args, **(kwargs or {}))


class OnTheHost(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses an operation that takes or makes a tensor on the host."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The operation, if it may be."""
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, found)):
            assert not (isinstance(leaf, Tensor) and leaf.device.type == "cpu"), f"{func} has a tensor on the host"
        return found


def stored_modules(method: Method, dtype: str, compute: str) -> Iterator[nn.Module]:
    """The modules of a model without weights that hold a quantized weight."""
    values = {name: parameter.default for name, parameter in method.parameters.items()}
    values |= {"compute": compute} if "compute" in method.parameters else {}
    model = checkpoints.sketch_model(GPT2, dtype)
    method.sketch(model, Arguments(dtype, Scope("linear" if method.calibrated else "all"), values))
    return (module for module in model.modules() if stored.store_of(module) is not None)


def run(module: nn.Module, rows: int, dtype: torch.dtype) -> None:
    """A forward on the meta device."""
    inputs: Any = module.in_features if isinstance(module, stored.QuantizedLinear) else 64
    x = torch.empty(1, rows, inputs, dtype=dtype, device="meta")
    if isinstance(module, nn.Embedding):
        x = torch.zeros(1, rows, dtype=torch.long, device="meta")
    with torch.inference_mode(), MadeOfNumbers(), OnTheHost():  # type: ignore[no-untyped-call]
        assert module(x).is_meta


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("name", "compute"), COMPUTED)
def test_a_forward_keeps_to_its_device(name: str, compute: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = set()
    for module in stored_modules(OURS[name], dtype, compute):
        kinds.add(type(module).__name__)
        for rows, in_hardware in ((1, False), (32, True)):  # products of int8, which a card has for many rows
            monkeypatch.setattr(int8, "multiplies_int8", lambda *_, found=in_hardware: found)
            run(module, rows, checkpoints.TORCH_DTYPES[dtype])
    others = set() if OURS[name].calibrated else {"QuantizedEmbedding", "QuantizedLayerNorm"}
    assert kinds == {"QuantizedLinear"} | others


def of_numbers(kept: Mapping[str, Tensor]) -> Tensor:
    return torch.tensor(linear_int4.CODES.levels, device=kept["codes"].device)


def by_a_copy(kept: Mapping[str, Tensor]) -> Tensor:
    return torch.ones(16).to(kept["codes"].device)


def by_a_number(kept: Mapping[str, Tensor]) -> Tensor:
    return kept["scale"] * torch.ones(())


def by_a_read(kept: Mapping[str, Tensor]) -> Tensor:
    return kept["scale"] * kept["scale"].amax().item()


@pytest.mark.parametrize("fault", [of_numbers, by_a_copy, by_a_number, by_a_read])
def test_what_would_visit_the_host_is_seen(fault: Callable[[Mapping[str, Tensor]], Tensor]) -> None:
    def dequantize(kept: Mapping[str, Tensor], shape: tuple[int, int], block: int) -> Tensor:
        fault(kept)
        return linear_int4.CODES.decode(kept, shape, block)

    wrong = weight_method(
        name="wrong",
        summary="",
        bits=4,
        quantize=linear_int4.CODES.encode,
        dequantize=dequantize,
        parameters={"block": BLOCK},
    )
    module = next(stored_modules(wrong, "fp32", "dtype"))
    with pytest.raises((AssertionError, RuntimeError), match=r"the host|item\(\) cannot be called on meta"):
        run(module, 1, torch.float32)


@pytest.mark.parametrize("module", [linear_int4, linear_int4_affine], ids=lambda module: module.METHOD.name)
def test_levels_made_on_the_device_are_those_of_the_loops(module: Any) -> None:
    every = torch.arange(16, dtype=torch.uint8)
    kept = {"codes": every[0::2] << 4 | every[1::2], "scale": torch.ones(1), "minimum": torch.zeros(1)}
    assert module.CODES.decode(kept, (1, 16), 16).flatten().tolist() == list(module.CODES.levels)
