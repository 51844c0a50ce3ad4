"""Checkpoints that are quantized already, as models: unpacked once into a plain fp32 folder, and marked.

A folder or Hub snapshot whose config.json has a `quantization_config` of bitsandbytes or compressed-tensors is read by
transformers with the library that wrote it, and its weights are written out as the fp32 numbers they stand for. What is
measured afterwards is the model that the checkpoint holds; that it was quantized stands in every row's note. No torch
at import.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import MappingProxyType
from typing import Any

from harness.core.errors import HarnessError, MissingPackage
from harness.core.values import parse_json

READERS: Mapping[str, str] = MappingProxyType(  # quant_method -> the distribution that reads it
    {"bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors"}
)
VERSION = 1  # of the unpacking: part of the cache's key


def configuration(directory: Path) -> dict[str, Any] | None:
    """The `quantization_config` of a folder's config.json, None where it has none."""
    path = directory / "config.json"
    if not path.is_file():
        return None
    try:
        found = parse_json(path.read_bytes()).get("quantization_config")
    except (ValueError, AttributeError):
        return None  # whoever reads the folder says what is wrong with it
    return found if isinstance(found, dict) else None


def check(directory: Path, model: str) -> None:
    """Raise HarnessError where a folder is quantized in a way that cannot be read here; its library may be missing."""
    found = configuration(directory)
    if found is None:
        return
    kind = str(found.get("quant_method"))
    if kind not in READERS:
        raise HarnessError(
            f"{model} is quantized already, by '{kind}', which is not read here (known: {', '.join(READERS)}): "
            "name the unquantized model"
        )
    try:
        distribution(READERS[kind])
    except PackageNotFoundError:
        raise MissingPackage(READERS[kind], model) from None


def described(found: Mapping[str, Any]) -> str:
    """A row's note."""
    kind = found.get("quant_method")
    if kind == "bitsandbytes":
        form = "LLM.int8" if found.get("load_in_8bit") else found.get("bnb_4bit_quant_type")
    else:
        form = found.get("format")
    return f"weights were stored by {kind} ({form}) before they became this fp32 reference"


def unpack(directory: Path, destination: Path, *, trust_remote_code: bool = False) -> dict[str, str]:
    """Write the model that a quantized folder stands for as a plain fp32 folder; returns its note."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

    from harness.inputs.models import folder

    found = configuration(directory)
    assert found is not None
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    unpacking = {}
    if found["quant_method"] == "compressed-tensors":
        unpacking = {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
    loaded, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, device_map={"": "cpu"}, output_loading_info=True, **unpacking, **options
    )
    folder.require_match(report, f"the weights in {directory}")
    if found["quant_method"] == "bitsandbytes":
        loaded = loaded.dequantize()
    state = {name: tensor.float() for name, tensor in loaded.state_dict().items()}
    config = type(loaded.config).from_dict(
        {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    )
    with torch.device("meta"):  # every tensor is put in place below
        fresh = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(state, assign=True)
    fresh.tie_weights()
    fresh.save_pretrained(destination)
    AutoTokenizer.from_pretrained(directory, **options).save_pretrained(destination)
    return {"note": described(found)}
