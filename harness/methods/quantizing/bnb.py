"""bitsandbytes through transformers: LLM.int8, FP4 and NF4, with nothing left to a library's default.

Every option of `BitsAndBytesConfig` is written out, the skip list too: transformers replaces its own defaults by the
list it is given, so that a list without the output embeddings would quantize them. An option it does not know it only
logs, and an unknown quantization type it takes; both are errors here.

What the library does to a loaded model (0.49.0 to 0.50.2, processors with AVX512-BF16): the first evaluating forward
repacks each 4-bit weight, with bf16 scales and double quantization undone, and after that neither `state_dict()` nor a
move to another device is safe. Hence sizes and weights are read before the first forward, and nothing here does either.

Nothing at module level imports torch, so that the method files stay light.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import inspect
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.core.contracts import AS_MODEL, DTYPES, Arguments, Checkpoint, Method, Parameter, QuantizedWeight
from harness.core.errors import HarnessError, UnknownName

if TYPE_CHECKING:  # annotations only
    from torch import Tensor, nn
    from transformers import BitsAndBytesConfig

DEFAULT_THRESHOLD = 6.0  # activations beyond it are outliers (Dettmers et al. 2022, arXiv:2208.07339, section 3.2)

BLOCK = 64  # weights under one absmax: the library's default, which transformers cannot change
PIECE = 32  # outputs that its kernel for AVX512-BF16 takes at once
NESTED_BLOCK = 256  # absmax values under one nested absmax, fixed in the library's quantize_4bit
LEVELS = 16  # of a 4-bit code table
NESTED_LEVELS = 256  # of the dynamic 8-bit code table of double quantization
INT8_MAX = 127  # SCB is a row's absmax, which takes this code

FP16_PRODUCT = "bitsandbytes writes the product of 8-bit codes in fp16 on a card, whatever the model's dtype"

SPEAKERS = ("bitsandbytes.autograd._functions", "bitsandbytes.nn.modules")  # loggers that repeat themselves a forward
NOISE = re.compile("MatMul8bitLt: inputs will be cast|Input type into Linear4bit is torch.float16")

THRESHOLD = Parameter(float, DEFAULT_THRESHOLD, "activations of at least this size stay in the model's dtype; 0: none")
COMPUTE = Parameter(str, AS_MODEL, "dtype of the products; 'dtype' is the model's", (AS_MODEL, *DTYPES))


@dataclass(frozen=True)
class Format:
    """What transformers calls the quantization method ('llm_int8', 'fp4', 'nf4'), and whether absmax is quantized."""

    kind: str
    double: bool = False

    @property
    def int8(self) -> bool:
        """LLM.int8, rather than one of the 4-bit types."""
        return self.kind == "llm_int8"


def hush() -> None:
    """Let the logger of its CPU backend speak from errors on, before the library is imported.

    On processors with AVX512-BF16 it warns at import that the `kernels` package is absent, which every environment
    records and which reads like a fault.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def preload() -> None:
    """Import the library once, for children forked later; what it marks for compiling is compiled when first called.

    `torch.compile` only marks a function, but it imports the whole of the compiler, seconds on a slow processor.
    """
    import torch

    hush()
    compiler = torch.compile
    torch.compile = _marks  # type: ignore[assignment]
    try:
        importlib.import_module("bitsandbytes")
    finally:
        torch.compile = compiler
    importlib.import_module("transformers.integrations.bitsandbytes")


def _marks(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """`torch.compile`, called when the function is."""
    if function is None:
        return functools.partial(_marks, **options)
    import torch

    compiled = functools.cache(lambda: torch.compile(function, **options))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call


def method(name: str, summary: str, format: Format) -> Method:
    """A method of this library: int8 takes `threshold`, the 4-bit types take `compute`."""
    return Method(
        name=name,
        summary=summary,
        bits=8 if format.int8 else 4,
        load=functools.partial(load, format),
        sketch=functools.partial(sketch, format),
        quantized=quantized,
        targets=targets,
        parameters={"threshold": THRESHOLD} if format.int8 else {"compute": COMPUTE},
        requires=("bitsandbytes", "accelerate"),
        batch_invariant=not format.int8,
        concurrent=not format.int8,  # 4-bit layers repack at their first forward, the int8 ones keep a state
        reloads=False,  # its quantization states are no buffers
        notes={"cuda": FP16_PRODUCT} if format.int8 else {},
    )


def format_of(method: Method) -> Format | None:
    """The format of a method of this library, None of any other's."""
    load_ = method.load
    return load_.args[0] if isinstance(load_, functools.partial) and load_.func is load else None


def options(format: Format, arguments: Arguments, skip: list[str]) -> dict[str, Any]:
    """Every option of `BitsAndBytesConfig`; those of the other width are given the values they are ignored at."""
    compute = str(arguments.values.get("compute", AS_MODEL))
    return {
        "load_in_8bit": format.int8,
        "load_in_4bit": not format.int8,
        "llm_int8_threshold": float(arguments.values.get("threshold", DEFAULT_THRESHOLD)),  # an int is refused
        "llm_int8_skip_modules": skip,  # of the 4-bit types too, despite the name
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "bnb_4bit_compute_dtype": DTYPES[arguments.dtype if compute == AS_MODEL else compute],
        "bnb_4bit_quant_type": "fp4" if format.int8 else format.kind,
        "bnb_4bit_use_double_quant": format.double,
        "bnb_4bit_quant_storage": "uint8",
    }


def configuration(chosen: Mapping[str, Any]) -> BitsAndBytesConfig:
    """The options as transformers wants them; UnknownName for an option or type that it would silently ignore."""
    from transformers import BitsAndBytesConfig

    known = set(inspect.signature(BitsAndBytesConfig.__init__).parameters) - {"self", "kwargs"}
    for name in chosen:
        if name not in known:
            raise UnknownName("option of BitsAndBytesConfig", name, known)
    config = BitsAndBytesConfig(**chosen)
    if config.quantization_method() is None:
        raise UnknownName("4-bit quantization type", str(chosen.get("bnb_4bit_quant_type")), ("fp4", "nf4"))
    return config


def kept(model: nn.Module) -> list[str]:
    """The full skip list: the output embeddings, and every module that shares a parameter with another."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    names = {name for sharing in owners.values() if len(sharing) > 1 for name in sharing}
    head = model.get_output_embeddings()  # type: ignore[operator]  # a PreTrainedModel
    return sorted(names | {name for name, module in model.named_modules() if module is head})


def targets(model: nn.Module, arguments: Arguments) -> list[str]:
    """Every Linear and Conv1D that transformers replaces, of the model before or after quantization.

    No subclass of Linear, nothing on the skip list, nor what the architecture keeps in fp32.
    """
    hush()
    from bitsandbytes import nn as library
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    skip = [*kept(model), *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    made = (Conv1D, library.Linear4bit, library.Linear8bitLt)
    return [
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, made)) and should_convert_module(name, skip)
    ]


def load(format: Format, checkpoint: Checkpoint, arguments: Arguments, device: str) -> nn.Module:
    """The checkpoint quantized while it is read, in eval mode on `device`, before any forward."""
    from harness.inputs.models import checkpoints

    plain = checkpoints.sketch_model(checkpoints.read_config(checkpoint), arguments.dtype)
    if device == "cpu" and not format.int8:
        refuse_unpackable(plain, targets(plain, arguments))
    config = configuration(options(format, arguments, kept(plain)))
    with quiet():
        return checkpoints.open_model(checkpoint, arguments.dtype, device, quantization_config=config)


def refuse_unpackable(model: nn.Module, names: list[str]) -> None:
    """HarnessError where the first forward would fail: AVX512-BF16's kernel takes PIECE outputs by BLOCK inputs."""
    from bitsandbytes import functional
    from transformers.pytorch_utils import Conv1D

    if not getattr(functional, "has_avx512bf16", lambda: False)():  # releases without that kernel have no such question
        return
    for name in names:
        module: Any = model.get_submodule(name)
        outputs, inputs = module.weight.shape[::-1] if isinstance(module, Conv1D) else module.weight.shape
        if outputs % PIECE or inputs % BLOCK:
            raise HarnessError(
                f"bitsandbytes multiplies 4-bit weights on processors with AVX512-BF16 in pieces of {PIECE} outputs by "
                f"{BLOCK} inputs, and {name} has {outputs} by {inputs}: a limit of the library; measure it on another "
                "processor, or take nf4, which has none"
            )


def sketch(format: Format, model: nn.Module, arguments: Arguments) -> None:
    """Replace each target of a model on the meta device by the library's module as it stands before a forward."""
    hush()
    chosen = options(format, arguments, kept(model))
    for name in targets(model, arguments):
        model.set_submodule(name, sketched(model.get_submodule(name), chosen))


def sketched(plain: nn.Module, chosen: Mapping[str, Any]) -> nn.Module:
    """The library's module for a Linear or Conv1D on the meta device, under the options of BitsAndBytesConfig.

    4-bit, n weights of (out, in): two codes a byte, (ceil(n/2), 1) uint8; absmax (ceil(n/64),) fp32; a code table (16,)
    fp32. Double quantization keeps absmax in uint8 and adds a nested absmax (ceil(ceil(n/64)/256),) fp32, its code
    table (256,) fp32 and an offset, an fp32 scalar. LLM.int8: codes CB (out, in) int8 and row absmax SCB (out,) fp32.
    Every weight has tables of its own: the library shares none between modules.
    """
    import torch
    from bitsandbytes import functional
    from bitsandbytes import nn as library
    from transformers.pytorch_utils import Conv1D

    empty = functools.partial(torch.empty, device="meta", dtype=torch.float32)
    weight: Any = plain.weight
    outputs, inputs = weight.shape[::-1] if isinstance(plain, Conv1D) else weight.shape  # Conv1D stores (in, out)
    module: Any
    if chosen["load_in_8bit"]:
        in_16_bit = chosen["llm_int8_has_fp16_weight"]
        settings = {"has_fp16_weights": in_16_bit, "threshold": chosen["llm_int8_threshold"]}
        module = library.Linear8bitLt(inputs, outputs, bias=False, device="meta", **settings)
        codes, scales = empty(outputs, inputs, dtype=torch.int8), empty(outputs)
        module.weight = library.Int8Params(codes, requires_grad=False, has_fp16_weights=in_16_bit, CB=codes, SCB=scales)
    else:
        kind, double = chosen["bnb_4bit_quant_type"], chosen["bnb_4bit_use_double_quant"]
        blocks = -(-outputs * inputs // BLOCK)
        nested = offset = None
        if double:
            offset = empty(())  # mean of the absmax values, taken off before they are quantized
            absmax, code = empty(-(-blocks // NESTED_BLOCK)), empty(NESTED_LEVELS)
            nested = functional.QuantState(absmax=absmax, code=code, blocksize=NESTED_BLOCK, dtype=torch.float32)
        state = functional.QuantState(
            absmax=empty(blocks, dtype=torch.uint8 if double else torch.float32),
            shape=torch.Size((outputs, inputs)),
            code=empty(LEVELS),
            blocksize=BLOCK,
            quant_type=kind,
            dtype=weight.dtype,
            offset=offset,
            state2=nested,
        )
        settings = {"compress_statistics": double, "quant_type": kind, "quant_storage": torch.uint8}
        compute = getattr(torch, chosen["bnb_4bit_compute_dtype"])
        module = library.Linear4bit(inputs, outputs, bias=False, compute_dtype=compute, device="meta", **settings)
        module.quant_state = state
        module.weight = library.Params4bit(
            empty(-(-outputs * inputs // 2), 1, dtype=torch.uint8),
            requires_grad=False,
            quant_state=state,
            blocksize=BLOCK,
            module=module,
            bnb_quantized=True,
            **settings,
        )
    module.bias = plain.bias
    module.source_cls = type(plain)  # as transformers marks it
    return module  # type: ignore[no-any-return]


def quantized(model: nn.Module) -> Iterator[QuantizedWeight]:
    """The quantized weights of a loaded or sketched model; storage is codes, absmax, tables and offset, no bias."""
    from bitsandbytes import nn as library

    from harness.inputs.models import sizes

    held: tuple[Any, ...]
    for name, module in model.named_modules():
        if isinstance(module, library.Linear4bit):
            dequantize, held = dequantize_4bit, (module.weight,)
        elif isinstance(module, library.Linear8bitLt):
            dequantize, held = dequantize_int8, (module.weight, module.state)
        else:
            continue
        elements, storage = module.in_features * module.out_features, sizes.bytes_of(sizes.tensors(*held))
        read = functools.partial(dequantize, module)
        yield QuantizedWeight(name, module.source_cls.__name__, elements, storage, read)


def dequantize_int8(module: Any) -> Tensor:
    """CB * SCB / 127 in fp32, in the layout of the module it replaced: (out, in), of a Conv1D (in, out)."""
    state = module.state if module.weight.SCB is None else module.weight  # the first forward moves them to the state
    weight = state.CB.float() * (state.SCB[:, None] / INT8_MAX)  # (out, in) * (out, 1)
    return _layout(module, weight)


def dequantize_4bit(module: Any) -> Tensor:
    """code[weight] * absmax in the dtype it was quantized from, in the layout of the module it replaced.

    After a repacking forward (AVX512-BF16) it is the weight as repacked: with its bf16 scales.
    """
    from bitsandbytes import functional

    codes, state = module.weight.data, module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        absmax = state.absmax.T.reshape(-1).float()  # (in/64, out) bf16 -> (out*in/64,)
        state = copy.copy(state)  # the library's inverse writes into the state, and leaves absmax transposed
        state.original_nested = False
        codes, state = functional._convert_weight_packed_for_cpu_inverse(codes, state)
        state.absmax = absmax
    return _layout(module, functional.dequantize_4bit(codes, state))


def _layout(module: Any, weight: Tensor) -> Tensor:
    from transformers.pytorch_utils import Conv1D

    return weight.T if issubclass(module.source_cls, Conv1D) else weight


@contextlib.contextmanager
def quiet() -> Iterator[Counter[str]]:
    """Filter the lines that the library repeats a layer a forward, logged or warned, and count them by their text.

    The runner wraps the whole life of a child process in it; whoever calls a quantized model elsewhere (a test, a
    notebook) wraps the forward. Other lines pass. It may be nested: the innermost counts.
    """
    counted: Counter[str] = Counter()

    def passes(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if NOISE.match(text):
            counted[text] += 1
            return False
        return True

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        if NOISE.match(str(message)):
            counted[str(message)] += 1
        else:
            shown(message, *where, **more)

    loggers = [logging.getLogger(name) for name in SPEAKERS]
    with warnings.catch_warnings():
        shown = warnings.showwarning
        warnings.filterwarnings("always", message=NOISE.pattern)
        warnings.showwarning = show
        for logger in loggers:
            logger.addFilter(passes)
        try:
            yield counted
        finally:
            for logger in loggers:
                logger.removeFilter(passes)
