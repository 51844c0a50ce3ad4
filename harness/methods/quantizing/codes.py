"""How the codes of a quantized weight lie: what makes them, reads them and multiplies by them. No torch at import.

`int8.Rows8` and `int4.Blocks4` are the two representations of our own methods. Two plain functions are enough for
another method: `Functions` are its codes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness.core.contracts import AS_MODEL, Parameter

if TYPE_CHECKING:  # annotations only: methods are listed without torch
    from torch import Tensor

    from harness.methods.quantizing.compiled import Loops, Rounding
    from harness.methods.quantizing.stored import StoredWeight

BF16, FUSED = "bf16", "fused"  # values of `compute`
COMPUTE = Parameter(
    str, AS_MODEL, "dtype of the products: bf16 rounds activations to it; 'dtype' is the model's", (AS_MODEL, BF16)
)
COMPUTE_OR_FUSED = Parameter(
    str,
    AS_MODEL,
    f"as elsewhere, or '{FUSED}': a token's products in half precision too read the codes, and round nothing",
    (*COMPUTE.choices, FUSED),
)


class Codes(ABC):
    """What is stored of a weight (out, in), by name, and how it is used.

    Attributes:
        parameters: arguments of a method with such codes, handed to the functions below as **values.
        tables: code tables, fp32, stored once a model; `stored` holds them too.
        grain: 'row' or 'block' where no row, or block of `values["block"]` flattened weights, depends on another: the
            weight is then quantized some rows at a time, in the cache. '' quantizes it whole.
        compute: the argument that says what products are computed in; None where there is no choice.
        rounds: whether products round activations too, which only a linear layer of ours does.
        uses_numba: whether loops are compiled for a CPU, where Numba is installed.
    """

    parameters: Mapping[str, Parameter] = {}
    tables: Mapping[str, tuple[float, ...]] = {}
    grain: str = ""
    compute: Parameter | None = COMPUTE
    rounds: bool = False
    uses_numba: bool = False

    @abstractmethod
    def encode(self, weight: Tensor, *args: Any, **values: Any) -> dict[str, Tensor]:
        """(out, in) fp32 -> what is stored, by name; works on meta tensors, which predicts the bytes."""

    @abstractmethod
    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, int], *args: Any, **values: Any) -> Tensor:
        """(out, in) fp32, a tensor of its own."""

    def multiply(self, x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor | None:
        """(..., in) -> (..., out) in x's dtype; None for what `products.multiply` does, by loops or decoded."""
        return None

    def rounding(self, shape: tuple[int, int], *args: Any, **values: Any) -> Rounding | None:
        """The loop that gives what `encode` does, to the bit, on a CPU; None where there is none for the shape."""
        return None

    def loops(self, stored: Mapping[str, Tensor], shape: tuple[int, int], *args: Any, **values: Any) -> Loops | None:
        """The loops that multiply by the codes and decode them on a CPU; None where there are none for the shape."""
        return None


@dataclass(frozen=True)
class Functions(Codes):
    """Codes that a method's own two functions make and read.

    Attributes:
        quantize: (weight (out, in) fp32, **values) -> what is stored, by name. Conv1D weights come transposed, 1-D
            weights as one row, packed experts one by one. Integers and fp32 scales; must work on meta tensors, which
            predicts the bytes.
        dequantize: (stored, shape (out, in), **values) -> (out, in) fp32, a tensor of its own; runs at every forward.
        parameters, tables, grain: as of all codes.
    """

    quantize: Callable[..., dict[str, Tensor]]
    dequantize: Callable[..., Tensor]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    tables: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    grain: str = ""

    def encode(self, weight: Tensor, *args: Any, **values: Any) -> dict[str, Tensor]:
        """By `quantize`."""
        return self.quantize(weight, **values)

    def decode(self, stored: Mapping[str, Tensor], shape: tuple[int, int], *args: Any, **values: Any) -> Tensor:
        """By `dequantize`."""
        return self.dequantize(stored, shape, **values)


@dataclass(frozen=True)
class Recipe:
    """How a method stores a weight: its name, its codes, their arguments, and what products are computed in."""

    method: str
    codes: Codes
    values: Mapping[str, int | float | str] = field(default_factory=dict)
    compute: str = AS_MODEL


def divide(weight: Tensor, scale: Tensor) -> Tensor:
    """Divide, where a scale of 0 (a row of zeros, or one too small for fp32) becomes 1."""
    return weight / scale.masked_fill(scale == 0, 1.0)
