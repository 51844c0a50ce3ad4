"""The tensors that bitsandbytes holds for a quantized weight: predicted on the meta device, read from a loaded model.

4-bit, n weights of (out, in): two codes a byte, (ceil(n/2), 1) uint8; absmax (ceil(n/64),) fp32; a code table (16,)
fp32. Double quantization keeps absmax in uint8 and adds a nested absmax (ceil(ceil(n/64)/256),) fp32, its code table
(256,) fp32 and an offset, an fp32 scalar. LLM.int8: codes CB (out, in) int8 and row absmax SCB (out,) fp32.
Every weight has tables of its own: the library shares none between modules.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import bitsandbytes
import torch
from bitsandbytes import functional
from torch import nn
from transformers.pytorch_utils import Conv1D

from harness.core.contracts import QuantizedWeight
from harness.inputs.models import sizes

BLOCK = 64  # weights under one absmax: the library's default, which transformers cannot change
NESTED_BLOCK = 256  # absmax values under one nested absmax, fixed in the library's quantize_4bit
LEVELS = 16  # of a 4-bit code table
NESTED_LEVELS = 256  # of the dynamic 8-bit code table of double quantization
INT8_MAX = 127  # SCB is a row's absmax, which takes this code

empty = functools.partial(torch.empty, device="meta")


def sketch(plain: nn.Module, chosen: Mapping[str, Any]) -> nn.Module:
    """The library's module for a Linear or Conv1D on the meta device, under the options of BitsAndBytesConfig."""
    weight: Any = plain.weight
    outputs, inputs = weight.shape[::-1] if isinstance(plain, Conv1D) else weight.shape  # Conv1D stores (in, out)
    build = _int8 if chosen["load_in_8bit"] else _4bit
    module: nn.Module = build(chosen, outputs, inputs, weight.dtype)
    module.bias = plain.bias
    module.source_cls = type(plain)  # type: ignore[assignment]  # as transformers marks it
    return module


def _int8(chosen: Mapping[str, Any], outputs: int, inputs: int, dtype: torch.dtype) -> Any:
    kept_in_16_bit = chosen["llm_int8_has_fp16_weight"]
    module = bitsandbytes.nn.Linear8bitLt(
        inputs,
        outputs,
        bias=False,
        has_fp16_weights=kept_in_16_bit,
        threshold=chosen["llm_int8_threshold"],
        device="meta",
    )
    codes = empty(outputs, inputs, dtype=torch.int8)  # (out, in)
    scales = empty(outputs, dtype=torch.float32)  # (out,)
    module.weight = bitsandbytes.nn.Int8Params(
        codes, requires_grad=False, has_fp16_weights=kept_in_16_bit, CB=codes, SCB=scales
    )
    return module


def _4bit(chosen: Mapping[str, Any], outputs: int, inputs: int, dtype: torch.dtype) -> Any:
    kind, double = chosen["bnb_4bit_quant_type"], chosen["bnb_4bit_use_double_quant"]
    module = bitsandbytes.nn.Linear4bit(
        inputs,
        outputs,
        bias=False,
        compute_dtype=getattr(torch, chosen["bnb_4bit_compute_dtype"]),
        compress_statistics=double,
        quant_type=kind,
        quant_storage=torch.uint8,
        device="meta",
    )
    module.quant_state = _state(torch.Size((outputs, inputs)), kind, double, dtype)
    module.weight = bitsandbytes.nn.Params4bit(
        empty(-(-outputs * inputs // 2), 1, dtype=torch.uint8),  # (ceil(n/2), 1)
        requires_grad=False,
        quant_state=module.quant_state,
        blocksize=BLOCK,
        compress_statistics=double,
        quant_type=kind,
        quant_storage=torch.uint8,
        module=module,
        bnb_quantized=True,
    )
    return module


def _state(shape: torch.Size, kind: str, double: bool, dtype: torch.dtype) -> Any:
    blocks = -(-shape.numel() // BLOCK)
    nested = offset = None
    if double:
        offset = empty((), dtype=torch.float32)  # mean of the absmax values, taken off before they are quantized
        nested = functional.QuantState(
            absmax=empty(-(-blocks // NESTED_BLOCK), dtype=torch.float32),  # (ceil(blocks/256),)
            code=empty(NESTED_LEVELS, dtype=torch.float32),
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
    return functional.QuantState(
        absmax=empty(blocks, dtype=torch.uint8 if double else torch.float32),  # (ceil(n/64),)
        shape=shape,
        code=empty(LEVELS, dtype=torch.float32),
        blocksize=BLOCK,
        quant_type=kind,
        dtype=dtype,
        offset=offset,
        state2=nested,
    )


def quantized(model: nn.Module) -> Iterator[QuantizedWeight]:
    """The quantized weights of a loaded or sketched model; storage is codes, absmax, tables and offset, no bias."""
    for name, module in model.named_modules():
        dequantize: Callable[[Any], torch.Tensor]
        held: tuple[Any, ...]
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            dequantize, held = dequantize_4bit, (module.weight,)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            dequantize, held = dequantize_int8, (module.weight, module.state)
        else:
            continue
        yield QuantizedWeight(
            name=name,
            kind=module.source_cls.__name__,
            elements=module.in_features * module.out_features,
            storage=sizes.bytes_of(sizes.tensors(*held)),
            dequantize=functools.partial(dequantize, module),
        )


def dequantize_int8(module: Any) -> torch.Tensor:
    """CB * SCB / 127 in fp32, in the layout of the module it replaced: (out, in), of a Conv1D (in, out)."""
    state = module.state if module.weight.SCB is None else module.weight  # the first forward moves them to the state
    weight = state.CB.float() * (state.SCB[:, None] / INT8_MAX)  # (out, in) * (out, 1)
    return _layout(module, weight)


def dequantize_4bit(module: Any) -> torch.Tensor:
    """code[weight] * absmax in the dtype it was quantized from, in the layout of the module it replaced.

    After a repacking forward (AVX512-BF16) it is the weight as repacked: with its bf16 scales.
    """
    codes, state = module.weight.data, module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        absmax = state.absmax.T.reshape(-1).float()  # (in/64, out) bf16 -> (out*in/64,)
        state = copy.copy(state)  # the library's inverse writes into the state, and leaves absmax transposed
        state.original_nested = False
        codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
        state.absmax = absmax
    return _layout(module, functional.dequantize_4bit(codes, state))


def _layout(module: Any, weight: torch.Tensor) -> torch.Tensor:
    return weight.T if issubclass(module.source_cls, Conv1D) else weight
