"""A CUDA card that is not there: tensors without values that say they lie on it, and a count of their bytes.

A model on the meta device is put on the card; from then on its tensors answer `cuda:0` when asked for their device, so
that code takes the way that it takes on a card, and every storage made there is counted for as long as it lives. No
build of torch with CUDA, no driver and no compiler is needed.

What depends on no weight keeps its values: token ids, positions and masks are computed on the host and only marked, so
that code that looks at them (is this mask all true?) decides as it does on a card. Code that looks at a value that is
not there gets `Valueless`, and tensors of host and card that meet in one operation raise as on a card.

Made for `torch.no_grad()`: in inference mode torch hands over composite operations whole.

Attention, and kernels that are no operations of torch (`KERNELS`), are counted as what they hold while they run. In
half precision without a mask attention is flash attention, else the memory-efficient kernel: neither holds the (L, L)
scores. Where queries share keys and values and flash attention does not run, torch takes the plain product, which does.
bitsandbytes multiplies more rows than a few by a weight that it dequantizes whole, and LLM.int8 sums in int32; its
outlier columns depend on values and are not counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from harness.inputs.models.sizes import StorageCount

PLACE = torch.device("cuda", 0)
CAPABILITY = (9, 0)  # of the card that is assumed: a data-centre card of 2022, with int8 and bf16 products
SMALL = 2**10  # elements of inputs whose outcome is small too
LARGEST = 2**24  # elements up to which what needs no weight keeps its values: a mask of 4096 x 4096
BETWEEN = frozenset({"aten::copy_", "aten::_to_copy"})  # may take a tensor of the host and one of a card
ROOM = frozenset(  # made to be written into: no values, but for the dtypes of masks and ids
    f"aten::{name}" for name in "empty empty_like empty_strided new_empty zeros zeros_like new_zeros".split()
)
LOOKED_AT = frozenset({torch.bool, torch.int64})
INDEXED = frozenset({"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"})


class Valueless(Exception):
    """Code looked at the value of a tensor that has none: what it would do next cannot be told."""


class Card(StorageCount):  # type: ignore[no-untyped-call]
    """Runs operations on the card's tensors and counts the bytes of every storage there; `take` puts one on it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = ""  # the place that Python named for what is made now; '' where it named none

    def on(self, tensor: Tensor) -> bool:
        """Whether a tensor lies on the card."""
        return tensor.untyped_storage()._cdata in self._alive

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation where it belongs."""
        kwargs = dict(kwargs or {})
        given = _tensors((*args, *kwargs.values()))
        here = [tensor for tensor in given if self.on(tensor)]
        # a device that C++ names is that of a tensor without values: the same place
        if not (given or self.asked) and getattr(kwargs.get("device"), "type", "") == "meta":
            return self._taken(func(*args, **kwargs))
        name = func._schema.name
        to_host = self.asked == "host" or (name == "aten::copy_" and not self.on(args[0]))
        if to_host or not (here or self.asked):
            if any(tensor.is_meta for tensor in here):
                raise Valueless(f"{func} copies a tensor to the host")
            return func(*args, **kwargs)
        # tensors of both places may meet in copies alone, numbers without a dimension and indices left out
        met = [args[0]] if name in INDEXED else [tensor for tensor in given if tensor.dim()]
        if name not in BETWEEN and len({self.on(tensor) for tensor in met}) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu ({name})")
        kernel = KERNELS.get(name)
        if kernel is not None:
            with self:
                return kernel(*args, **kwargs)
        return self._taken(self._run(func, args, kwargs, given))

    def _taken(self, result: Any) -> Any:
        """What an operation made, on the card."""
        for tensor in _tensors(result if isinstance(result, list | tuple) else (result,)):
            self.take(tensor)
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]) -> Any:
        """With values where all inputs have some and the outcome is not large, else without."""
        if given and all(tensor.is_meta for tensor in given) and "device" not in kwargs:
            return func(*args, **kwargs)
        valued = not any(tensor.is_meta for tensor in given)
        if valued and given and all(tensor.numel() <= SMALL for tensor in given):
            return func(*args, **kwargs)

        def without_values(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.is_meta:
                return leaf
            return torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device="meta")

        shapes = tree_map(without_values, (args, kwargs))
        if kwargs.get("device") is not None:
            shapes[1]["device"] = "meta"
        if not valued:
            for place, argument in enumerate(func._schema.arguments):
                written = args[place] if place < len(args) else kwargs.get(argument.name)
                into = argument.alias_info is not None and argument.alias_info.is_write
                if into and isinstance(written, Tensor) and not written.is_meta:
                    raise Valueless(f"{func} writes a computed value into a tensor that the model looks at")
            return func(*shapes[0], **shapes[1])
        try:
            outcome = func(*shapes[0], **shapes[1])
        except (RuntimeError, NotImplementedError):  # its shape depends on values: they are there
            return func(*args, **kwargs)
        made = _tensors(outcome if isinstance(outcome, list | tuple) else (outcome,))
        large = any(tensor.numel() > LARGEST for tensor in made)
        room = func._schema.name in ROOM and made[0].dtype not in LOOKED_AT
        return outcome if large or room else func(*args, **kwargs)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Tensors among an operation's arguments or results, which nest no deeper than a list."""
    lists = [value if isinstance(value, list | tuple) else (value,) for value in values]
    return [one for values in lists for one in values if isinstance(one, Tensor)]


class OnCard(TorchFunctionMode):
    """Answers what Python asks of a tensor of the card, and turns requests for `cuda` into tensors there."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer, or call the function."""
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and func in ANSWERS and self.card.on(args[0]):
            return ANSWERS[func]
        if func in MOVES and isinstance(args[0], Tensor):
            return self._moved(func, args, kwargs)
        if func is F.scaled_dot_product_attention and self.card.on(args[0]):
            return attention(*args, **kwargs)
        device = kwargs.get("device")
        if device is None:
            return func(*args, **kwargs)
        if torch.device(device).type != "cuda":
            with self._asked("host"):
                return func(*args, **kwargs)
        kwargs["device"] = torch.device("cpu")
        if func in FROM_DATA:
            return self._placed(func(*args, **kwargs), None)
        with self._asked("card"):
            return func(*args, **kwargs)

    @contextlib.contextmanager
    def _asked(self, place: str) -> Iterator[None]:
        before, self.card.asked = self.card.asked, place
        try:
            yield
        finally:
            self.card.asked = before

    def _placed(self, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
        """A copy on the card of a tensor of the host."""
        with self._asked("card"):
            return _copy(tensor, dtype, torch.device("cpu"))

    def _moved(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        tensor: Tensor = args[0]
        if func is not Tensor.to:
            device, dtype, copy = torch.device("cuda" if func is Tensor.cuda else "cpu"), None, False
        elif len(args) > 1 and isinstance(args[1], Tensor):
            device, dtype, copy = PLACE if self.card.on(args[1]) else args[1].device, args[1].dtype, False
        else:
            copy = kwargs.pop("copy", False)
            device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
        here = self.card.on(tensor)
        there = here if device is None else device.type == "cuda"
        if there and not here and not tensor.is_meta:
            return self._placed(tensor, dtype)
        if here and not there:
            with self._asked("host"):
                return _copy(tensor, dtype, device)
        if here:
            return tensor if not copy and dtype in (None, tensor.dtype) else _copy(tensor, dtype)
        return func(*args, **kwargs)  # type: ignore[no-any-return]


def _copy(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | None = None) -> Tensor:
    named = {} if device is None else {"device": device}
    copied: Tensor = torch.ops.aten._to_copy.default(tensor, dtype=dtype or tensor.dtype, **named)
    return copied


ANSWERS = {
    Tensor.device.__get__: PLACE,
    Tensor.is_cuda.__get__: True,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: False,  # type: ignore[attr-defined]
    Tensor.get_device: PLACE.index,
}
MOVES = frozenset({Tensor.to, Tensor.cpu, Tensor.cuda})
FROM_DATA = frozenset({torch.tensor, torch.as_tensor, torch.asarray})


@contextlib.contextmanager
def present() -> Iterator[Card]:
    """A card for as long as this lasts; `take` puts tensors on it."""
    card, known = Card(), torch.cuda.get_device_capability
    torch.cuda.get_device_capability = lambda device=None: CAPABILITY  # the one question that asks no tensor
    try:
        with card, OnCard(card), torch.no_grad():
            yield card
    finally:
        torch.cuda.get_device_capability = known


FLASH = frozenset({torch.float16, torch.bfloat16})
FLASH_HEAD = 256  # the widest head it takes
HEAD_UNIT = 8  # to which it pads one
MASK_UNIT = 16  # elements of a row of a mask that the memory-efficient kernel reads at a time
FEW_ROWS = 4  # up to which bitsandbytes always reads 4-bit codes as they lie


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention`, as a card computes it: query (B, H, L, D), key and value (B, H', S, D).

    Returns:
        (B, H, L, D'), stored as (B, L, H, D').
    """
    batch, heads, length, width = query.shape
    shared = enable_gqa and key.shape[1] != heads
    flash = query.dtype in FLASH and attn_mask is None and max(width, value.shape[-1]) <= FLASH_HEAD
    if shared and not flash:
        plain = torch.ops.aten._scaled_dot_product_attention_math.default
        product: Tensor = plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=True)[0]
        return product
    out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
    held = []
    if flash:
        held.append(query.new_empty(batch, heads, length, dtype=torch.float32))  # the logarithm of each row's sum
        for tensor in (query, key, value):
            if tensor.shape[-1] % HEAD_UNIT:  # a copy, padded
                held.append(tensor.new_empty(*tensor.shape[:-1], -(-tensor.shape[-1] // HEAD_UNIT) * HEAD_UNIT))
    elif attn_mask is not None:  # it becomes numbers to be added, in rows that the kernel can read
        if attn_mask.dtype == torch.bool:
            held.append(query.new_empty(attn_mask.shape))
        if key.shape[2] % MASK_UNIT:
            held.append(query.new_empty(*attn_mask.shape[:-1], -(-key.shape[2] // MASK_UNIT) * MASK_UNIT))
    del held
    return out


def _gemm_4bit(
    rows: Tensor,
    codes: Tensor,
    shape: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    kind: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    """(..., in) by a weight (out, in): (..., out)."""
    if rows.numel() // rows.shape[-1] <= FEW_ROWS:
        return rows.new_empty(*rows.shape[:-1], shape[0])
    if absmax_8bit is not None:
        absmax = absmax_8bit.new_empty(absmax_8bit.shape, dtype=torch.float32)  # of each block, for the weight
    weight = rows.new_empty(tuple(shape))
    out = rows.new_empty(*rows.shape[:-1], shape[0])
    del weight, absmax
    return out


def _int8_vectorwise_quant(rows: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows (M, in) fp16: codes (M, in) int8, absmax (M,) fp32, and the outlier columns, of which none are counted."""
    absmax = rows.new_empty(rows.numel() // rows.shape[-1], dtype=torch.float32)
    codes = rows.new_empty(rows.shape, dtype=torch.int8)
    if threshold == 0.0:
        return codes, absmax, None
    outliers = rows.abs() >= threshold
    del outliers
    return codes, absmax, rows.new_empty(0, dtype=torch.int64)


def _int8_scaled_mm(
    codes: Tensor, weight: Tensor, *scales: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Codes (..., in) by a weight (out, in) int8: sums in int32, then fp16, then the dtype."""
    shape = (*codes.shape[:-1], weight.shape[0])
    sums = codes.new_empty(shape, dtype=torch.int32)
    out = codes.new_empty(shape, dtype=torch.float16)
    result = out if dtype in (None, torch.float16) else codes.new_empty(shape, dtype=dtype)
    del sums
    return result


def _int8_mixed_scaled_mm(rows: Tensor, codes: Tensor, weight: Tensor, *scales: Tensor, **more: Any) -> Any:
    """The same where columns of outliers are multiplied apart."""
    return _int8_scaled_mm(codes, weight, dtype=rows.dtype), rows.new_empty(0)


KERNELS: Mapping[str, Callable[..., Any]] = {
    "bitsandbytes::gemm_4bit": _gemm_4bit,
    "bitsandbytes::int8_vectorwise_quant": _int8_vectorwise_quant,
    "bitsandbytes::int8_scaled_mm": _int8_scaled_mm,
    "bitsandbytes::int8_mixed_scaled_mm": _int8_mixed_scaled_mm,
}
