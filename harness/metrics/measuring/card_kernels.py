"""What kernels of a card hold while they run, where that is not what torch's operations say: bytes, no values.

Attention takes flash attention in half precision without a mask, else the memory-efficient kernel: neither holds the
(L, L) scores. Where queries share keys and values and flash attention does not run, torch takes the plain product,
which does. bitsandbytes multiplies more rows than a few by a weight that it dequantizes whole, and LLM.int8 sums in
int32; its outlier columns depend on values and are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

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
    held = _padded(query, key, value) if flash else _bias(query, attn_mask, key.shape[2])
    if flash:
        held.append(query.new_empty(batch, heads, length, dtype=torch.float32))  # the logarithm of each row's sum
    del held
    return out


def _padded(*tensors: Tensor) -> list[Tensor]:
    """Copies of those whose heads are padded."""
    return [
        tensor.new_empty(*tensor.shape[:-1], -(-tensor.shape[-1] // HEAD_UNIT) * HEAD_UNIT)
        for tensor in tensors
        if tensor.shape[-1] % HEAD_UNIT
    ]


def _bias(query: Tensor, mask: Tensor | None, keys: int) -> list[Tensor]:
    """What a mask becomes: numbers to be added, in rows that the kernel can read."""
    made = []
    if mask is not None and mask.dtype == torch.bool:
        made.append(query.new_empty(mask.shape))
    if mask is not None and keys % MASK_UNIT:
        made.append(query.new_empty(*mask.shape[:-1], -(-keys // MASK_UNIT) * MASK_UNIT))
    return made


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
    found = out if dtype in (None, torch.float16) else codes.new_empty(shape, dtype=dtype)
    del sums
    return found


def _int8_mixed_scaled_mm(
    rows: Tensor,
    codes: Tensor,
    weight: Tensor,
    *scales: Tensor,
    outlier_cols: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same where columns of outliers are multiplied apart."""
    return _int8_scaled_mm(codes, weight, dtype=rows.dtype), rows.new_empty(0)


KERNELS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "bitsandbytes::gemm_4bit": _gemm_4bit,
        "bitsandbytes::int8_vectorwise_quant": _int8_vectorwise_quant,
        "bitsandbytes::int8_scaled_mm": _int8_scaled_mm,
        "bitsandbytes::int8_mixed_scaled_mm": _int8_mixed_scaled_mm,
    }
)
