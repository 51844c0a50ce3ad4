"""Plain model folders from whatever holds the weights, and models from plain folders.

GGUF files are converted and quantized checkpoints unpacked once, into the cache: built in a folder of their own under a
lock, renamed when whole. The random parts of a model are never filled in silently: a missing weight is an error.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from harness.core.contracts import DTYPES, Checkpoint
from harness.core.errors import reading
from harness.core.files import sha256_file
from harness.core.identity import identity_of
from harness.core.options import Declared, Options
from harness.core.specification import Specification, parse
from harness.inputs import hub
from harness.inputs.models import folder, identity_facts, names

if TYPE_CHECKING:  # annotations only
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

TORCH_DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, theirs) for name, theirs in DTYPES.items()}
# Written out because the default follows what is installed. The fused kernel never holds the (L, L) scores, and every
# architecture named in the README has it; eager attention differs from it by rounding only.
ATTENTION = "sdpa"
UNPACKING_VERSION = 1  # part of the cache's key
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
    """The checkpoint; one that is quantized already as the plain fp32 folder that it stands for, in the cache.

    transformers reads it with the library that wrote it. What is measured afterwards is the model that it holds.
    """
    name, directory = checkpoint.specification, checkpoint.directory
    quantization = folder.check_quantization(directory, f"model '{name}'")
    if quantization is None:
        return checkpoint
    options: dict[str, Any] = {"trust_remote_code": checkpoint.trust_remote_code, "local_files_only": True}
    kind, form = quantization["quant_method"], quantization.get("format")
    if kind == "bitsandbytes":
        form = "LLM.int8" if quantization.get("load_in_8bit") else quantization.get("bnb_4bit_quant_type")

    def build(destination: Path) -> dict[str, str]:
        say(f"unpacking the quantized {name} to fp32 (once)")
        unpacking = {}
        if kind == "compressed-tensors":
            from transformers import CompressedTensorsConfig

            unpacking = {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
        with quiet(), reading(f"the quantized {name}"):
            loaded, report = AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.float32, device_map={"": "cpu"}, output_loading_info=True, **unpacking, **options
            )
            folder.require_match(report, f"the weights in {directory}")
            if kind == "bitsandbytes":
                loaded = loaded.dequantize()
            state = {name: tensor.float() for name, tensor in loaded.state_dict().items()}
            folder.save_plain(loaded, state, destination)
            AutoTokenizer.from_pretrained(directory, **options).save_pretrained(destination)
        return {"note": f"weights were stored by {kind} ({form}) before they became this fp32 reference"}

    plain, record = folder.built(f"unpacked-{identity_of(checkpoint)[:16]}-v{UNPACKING_VERSION}", build, verify)
    told = {"directory": plain, "revision": record["revision"], "note": _joined(checkpoint.note, record["note"])}
    return identified(replace(checkpoint, **told))


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


def read_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The configuration of a checkpoint, held to what its weights can be."""
    directory = checkpoint.directory
    with quiet(), reading(f"the config.json in {directory}"):
        config = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=checkpoint.trust_remote_code
        )
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    folder.require_layers(directory, layers, allow_pickle=checkpoint.allow_pickle)
    return config


def attention_of(config: PretrainedConfig) -> str:
    """The attention implementation that a model is built with: sdpa, or eager where its class has no other."""
    known = AutoModelForCausalLM._model_mapping.get(type(config), None)  # None: remote code, which decides by itself
    return ATTENTION if getattr(known, "_supports_sdpa", True) else "eager"


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
    with quiet(), reading(f"{name}: the model in {checkpoint.directory}"):
        model, report = AutoModelForCausalLM.from_pretrained(
            checkpoint.directory,
            dtype=TORCH_DTYPES[dtype],
            attn_implementation=attention_of(read_config(checkpoint)),
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
            attn_implementation=attention_of(config),
            trust_remote_code=trusted,
        )
    model.tie_weights()
    return model.eval()  # type: ignore[no-any-return]


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
