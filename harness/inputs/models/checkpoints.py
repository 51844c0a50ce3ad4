"""Plain model folders from whatever holds the weights, and models from plain folders.

GGUF files are converted, quantized checkpoints unpacked and adapters merged once, into the cache: built in a folder of
their own under a lock, renamed when whole. The random parts of a model are never filled in silently: a missing weight
is an error.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import functools
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from harness.core import progress
from harness.core.contracts import DTYPES, Checkpoint
from harness.core.errors import HarnessError, reading
from harness.core.files import sha256_file
from harness.core.identity import identity_of
from harness.core.options import Declared, Options
from harness.core.specification import Specification, parse
from harness.inputs import hub
from harness.inputs.models import adapters, folder, identity_facts, names, packed

if TYPE_CHECKING:  # annotations only
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

TORCH_DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, theirs) for name, theirs in DTYPES.items()}
# The fused kernel never holds the (L, L) scores; transformers takes eager attention where a class has no other, which
# differs from it by rounding only. Asked for by name it would be refused there.
ATTENTION: str | None = None
UNPACKING_VERSION = 2  # part of the cache's key
EXPANSION = 8  # fp32 bytes for a byte of GGUF at 4 bits: room asked of the disk before a conversion
Say = Callable[[str], None]


def of_session(model: str, options: Options, say: Say = lambda line: None, *, verify: bool = False) -> Checkpoint:
    """`materialise` for a model that a session names, under what the session allows."""
    allowed: Any = {"allow_pickle": options.allow_pickle, "trust_remote_code": options.trust_remote_code}
    return materialise(parse(model), options.declared, **allowed, say=say, verify=verify)


def materialise(
    specification: Specification,
    declared: Declared,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    say: Say = lambda line: None,
    verify: bool = False,
) -> Checkpoint:
    """A plain folder with a model's weights: found, downloaded or converted, whatever its source needs.

    `say` gets a line before and after what takes long; `verify` hashes what lies in the cache. Raises as
    `models.locate`, and HarnessError where the cache cannot be written.
    """
    located = names.locate(specification, declared, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    allowed: Any = {"trust_remote_code": trust_remote_code, "allow_pickle": allow_pickle}
    name, given = str(specification), specification.source or declared.sources.get(str(specification), "")
    note = f"{name} was read from {given}" if given else ""
    if located.snapshot is not None:
        if located.snapshot.directory is None:
            say(f"fetching {located.snapshot.repository} at {located.snapshot.commit[:12]}")
        directory = hub.download_model(located.snapshot)
        checkpoint = Checkpoint(name, directory, located.snapshot.commit, note, **allowed)
        return _plain(identified(checkpoint), say, verify)  # a commit is its content
    if located.kind == "folder":
        checkpoint = Checkpoint(name, located.path, "", _joined(note, located.note), **allowed)
        return _plain(identified(checkpoint, verify), say, verify)
    directory, record = _converted(located, say, verify)
    note, grid = _joined(note, record.get("note", "")), record.get("grid", "")
    return identified(Checkpoint(name, directory, record["revision"], note, grid, **allowed))


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))


def identified(checkpoint: Checkpoint, verify: bool = False) -> Checkpoint:
    """The checkpoint with its identity, and its revision where it has none; `verify` as in `identity_facts`."""
    allowed: Any = {"allow_pickle": checkpoint.allow_pickle, "trust_remote_code": checkpoint.trust_remote_code}
    name = f"model '{checkpoint.specification}'"
    with quiet():
        revision, facts = identity_facts.identified(checkpoint.directory, name, **allowed, verify=verify)
    return replace(checkpoint, revision=checkpoint.revision or revision, identity=facts)


def _plain(checkpoint: Checkpoint, say: Say, verify: bool) -> Checkpoint:
    """The checkpoint; the plain fp32 folder that it stands for, in the cache, where it is quantized or has an adapter.

    What is quantized transformers reads with the library that wrote it. What is measured afterwards is the model that
    it holds, with the adapter in its weights.
    """
    name, directory = checkpoint.specification, checkpoint.directory
    quantization = folder.check_quantization(directory, f"model '{name}'")
    adapter = adapters.beside(directory, f"model '{name}'", allow_pickle=checkpoint.allow_pickle)
    if quantization is None and adapter is None:
        return checkpoint
    allowed = {"allow_pickle": checkpoint.allow_pickle}

    def build(destination: Path) -> dict[str, str]:
        notes = []
        with contextlib.ExitStack() as stack:
            base = stack.enter_context(adapters.hidden(directory)) if adapter else directory
            if quantization is not None:
                say(f"unpacking the quantized {name} to fp32 (once)")
                whole, base = base, destination
                if adapter is not None:
                    place = tempfile.TemporaryDirectory(dir=destination.parent, prefix=f"{destination.name}-")
                    base = Path(stack.enter_context(place))
                notes.append(_unpacked(checkpoint, whole, quantization, base))
            if adapter is not None:
                say(f"merging the adapter of {name} into its weights (once)")
                with reading(f"the adapter of {name}"):
                    base = stack.enter_context(folder.unpickled(base, destination, f"model '{name}'", **allowed))
                    adapters.merge(base, adapter, destination, f"model '{name}'")
                notes.append("the LoRA adapter beside its weights was merged into them")
        return {"note": "; ".join(notes)}

    kind = "unpacked" if quantization is not None else "merged"
    plain, record = folder.built(f"{kind}-{identity_of(checkpoint)[:16]}-v{UNPACKING_VERSION}", build, verify)
    told = {"directory": plain, "revision": record["revision"], "note": _joined(checkpoint.note, record["note"])}
    found = identified(replace(checkpoint, **told))
    merged = {fact: value for fact, value in checkpoint.identity.items() if fact.startswith("adapter.")}
    return replace(found, identity={**found.identity, **merged})


def _unpacked(checkpoint: Checkpoint, directory: Path, quantization: dict[str, Any], destination: Path) -> str:
    """Write a quantized folder as a plain one; returns what a reader must know of it."""
    options: dict[str, Any] = {"trust_remote_code": checkpoint.trust_remote_code, "local_files_only": True}
    kind, form, name = quantization["quant_method"], quantization.get("format"), f"model '{checkpoint.specification}'"
    if kind in folder.PACKED:
        with quiet(), reading(f"the quantized {checkpoint.specification}"):
            config = AutoConfig.from_pretrained(directory, **options)
            turned = [at for at, one in sketch_model(config, "fp32").named_modules() if isinstance(one, Conv1D)]
            with folder.unpickled(directory, destination, name, allow_pickle=checkpoint.allow_pickle) as plain:
                packed.unpack(plain, quantization, destination, name, turned)
        return f"weights were stored by {kind} ({quantization.get('bits', 8)} bits) before they became this reference"
    if kind == "bitsandbytes":
        form = "LLM.int8" if quantization.get("load_in_8bit") else quantization.get("bnb_4bit_quant_type")
        files = folder.weights_files(directory, name, allow_pickle=checkpoint.allow_pickle)
        if all(file.suffix == ".safetensors" for file in files):
            there = [one for file in files for one in folder.header(file, name)[1]]
            folder.require_quantized(there, (".SCB", ".quant_state.bitsandbytes"), kind, name)
    unpacking = {}
    if kind == "compressed-tensors":
        from transformers import CompressedTensorsConfig

        unpacking = {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
    with quiet(), reading(f"the quantized {checkpoint.specification}"):
        loaded, report = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, device_map={"": "cpu"}, output_loading_info=True, **unpacking, **options
        )
        folder.require_match(report, f"the weights in {checkpoint.directory}")
        if kind == "bitsandbytes":
            loaded = loaded.dequantize()
        state = {at: tensor.float() for at, tensor in loaded.state_dict().items()}
        folder.save_plain(loaded, state, destination)
        AutoTokenizer.from_pretrained(directory, **options).save_pretrained(destination)
    return f"weights were stored by {kind} ({form}) before they became this fp32 reference"


def _converted(located: names.Located, say: Say, verify: bool) -> tuple[Path, dict[str, Any]]:
    from harness.inputs.models.gguf_format import architectures

    source = located.sha256 or sha256_file(located.path)

    def build(destination: Path) -> dict[str, str]:
        needed, free = EXPANSION * located.path.stat().st_size, shutil.disk_usage(destination).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"{needed >> 20} MiB needed, {free >> 20} MiB free")
        say(f"converting {located.path.name} to fp32 (once, some 10 seconds)")
        with quiet(), reading(str(located.path)):
            facts = architectures.convert(located.path, destination)
        say(f"converted {located.path.name}")
        return {**facts, "source_sha256": source}

    return folder.built(f"gguf-{source[:16]}-v{architectures.VERSION}", build, verify)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' log lines below errors and its progress bars out of the output."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def counted() -> Iterator[None]:
    """Note each tensor that transformers loads, by the hook of its progress bars; its older versions have none."""
    hook = getattr(logging, "set_tqdm_hook", lambda make: None)

    def make(bar: Any, given: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        return bar(*(progress.each("a tensor to load", items) for items in given[:1]), *given[1:], **named)

    before = hook(make)
    try:
        yield
    finally:
        hook(before)


def read_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The configuration of a checkpoint, held to what its weights can be."""
    directory = checkpoint.directory
    with quiet(), reading(f"the config.json in {directory}"):
        config = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=checkpoint.trust_remote_code
        )
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    folder.require_layers(directory, layers, allow_pickle=checkpoint.allow_pickle)
    config.name_or_path = str(directory)  # `sketch_model` looks there for weights that are tied in name alone
    return config


def open_model(checkpoint: Checkpoint, dtype: str, device: str, *, quantization_config: Any = None) -> nn.Module:
    """Load a model: eval mode, on `device` ('cpu' or 'cuda').

    Weights are cast tensor by tensor, so the peak is the model and one tensor. Raises BadFile where the folder's
    weights and the architecture do not match in name or shape: nothing is filled with random numbers. `dtype`
    ('fp32', 'bf16' or 'fp16') is of everything that is not quantized; `quantization_config` goes to transformers.
    """
    options: dict[str, Any] = {}
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if quantization_config is not None or device != "cpu":
        options["device_map"] = {"": device}  # straight to the device, one tensor at a time
    name = f"model '{checkpoint.specification}'"
    weights = folder.weights_files(checkpoint.directory, name, allow_pickle=checkpoint.allow_pickle)
    with quiet(), counted(), reading(f"{name}: the model in {checkpoint.directory}"):
        model, report = AutoModelForCausalLM.from_pretrained(
            checkpoint.directory,
            dtype=TORCH_DTYPES[dtype],
            attn_implementation=ATTENTION,
            use_safetensors=weights[0].suffix == ".safetensors",
            local_files_only=True,
            trust_remote_code=checkpoint.trust_remote_code,
            ignore_mismatched_sizes=True,  # refused below, by name, rather than by a raised table
            output_loading_info=True,
            **options,
        )
    folder.require_match(report, f"{name}: the weights in {checkpoint.directory}")
    return model.eval()  # type: ignore[no-any-return]


def sketch_model(config: PretrainedConfig, dtype: str, *, real_buffers: bool = False) -> nn.Module:
    """The model that `open_model` gives, on the meta device: same parameters, buffers, dtypes and ties, no weights.

    With `real_buffers` parameters alone lie there, to be read into their places.
    """
    from accelerate import init_empty_weights

    trusted = type(config).__module__.startswith("transformers_modules")  # whoever read the config allowed its code
    empty = init_empty_weights(include_buffers=False) if real_buffers else torch.device("meta")
    with quiet(), reading("the model that config.json describes"), empty:
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config),  # building a model writes into it
            dtype=TORCH_DTYPES[dtype],
            attn_implementation=ATTENTION,
            trust_remote_code=trusted,
        )
    model.tie_weights()
    if config.name_or_path:
        _untie(model, Path(config.name_or_path))
    kept = [] if dtype == "fp32" else list(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    kept += list(getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype == "fp16" else []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()) if kept else ():
        if any(re.search(pattern.replace("*", ".*"), name) for pattern in kept):  # as transformers reads them
            tensor.data = tensor.data.float()
    return model.eval()  # type: ignore[no-any-return]


def _untie(model: Any, directory: Path) -> None:
    """Part what config.json ties and a folder's weights hold twice, with other numbers: transformers loads both."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    if not tied or not (directory / "config.json").is_file():
        return
    try:
        files = folder.weights_files(directory, str(directory), allow_pickle=True)
    except HarnessError:  # a configuration alone
        return
    there = {
        name: file for file in files if file.suffix == ".safetensors" for name in folder.header(file, str(directory))[1]
    }
    for pair in tied.items():
        names = [_as_stored(name, there) for name in pair]
        if all(names) and _differ(*[(str(there[name]), name, there[name].stat().st_mtime_ns) for name in names]):
            module, _, key = pair[0].rpartition(".")
            home = model.get_submodule(module)
            home._parameters[key] = nn.Parameter(torch.empty_like(home._parameters[key]), requires_grad=False)


def _as_stored(name: str, there: Collection[str]) -> str:
    """A parameter's name in a file, whose prefixes may be older ones; '' where it is not there, or not surely."""
    if name in there:
        return name
    end = ".".join(name.split(".")[-2:])
    found = [other for other in there if other == end or other.endswith(f".{end}")]
    return found[0] if len(found) == 1 else ""


@functools.lru_cache(maxsize=64)
def _differ(*places: tuple[str, str, int]) -> bool:
    """Whether two tensors (file, name, when it was written) hold other numbers; read some rows at a time."""
    with contextlib.ExitStack() as files:
        one, other = (files.enter_context(safe_open(file, "pt")).get_slice(name) for file, name, _ in places)
        shape = one.get_shape()
        if shape != other.get_shape():
            return True
        step = max(1, 2**22 // max(1, math.prod(shape[1:])))
        return any(
            not torch.equal(one[start : start + step].float(), other[start : start + step].float())
            for start in range(0, shape[0], step)
        )


def modules(checkpoint: Checkpoint, config: PretrainedConfig, dtype: str) -> dict[str, nn.Module]:
    """The unquantized model's modules without weights; BadFile where the folder's weights cannot be so many."""
    sketch = sketch_model(config, dtype)
    count, pickle = sum(one.numel() for one in sketch.parameters()), checkpoint.allow_pickle
    folder.require_parameters(checkpoint.directory, checkpoint.specification, count, allow_pickle=pickle)
    return dict(sketch.named_modules())


def tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer."""
    with quiet(), reading(f"the tokenizer in {checkpoint.directory}"):
        return AutoTokenizer.from_pretrained(
            checkpoint.directory, local_files_only=True, trust_remote_code=checkpoint.trust_remote_code
        )
