"""Weights packed by GPTQ, AWQ or as block-scaled FP8, unpacked to fp32 without the library that packed them.

A matrix W (in, out) of GPTQ and AWQ is scale (code - zero) in groups of rows, codes of b bits in words of 32:

- GPTQ (Frantar et al. 2022, arXiv 2210.17323; AutoGPTQ's files): `qweight` (in b/32, out) has 32/b rows a word, lowest
  bits first; `qzeros` (groups, out b/32) as many columns, each less one unless `checkpoint_format` is gptq_v2;
  `scales` (groups, out); `g_idx` (in,) names each row's group.
- AWQ (Lin et al. 2023, arXiv 2306.00978; AutoAWQ's `gemm`): `qweight` (in, out/8) and `qzeros` (groups, out/8) have
  eight columns a word in the order 0 2 4 6 1 3 5 7; `scales` (groups, out).
- FP8 (fine-grained, as DeepSeek-V3 is stored): `weight` (out, in) in float8, and `weight_scale_inv` a factor a block.

No torch at import.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.errors import BadFile
from harness.inputs.models import folder

if TYPE_CHECKING:  # annotations only
    from torch import Tensor

Parts = Mapping[str, "Tensor"]  # of one module, by the ends of their names
WORD = 32  # bits
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of each nibble of a word, from the lowest


def unpack(
    packed: Path, settings: Mapping[str, Any], destination: Path, model: str, turned: Sequence[str] = ()
) -> None:
    """Write a plain folder of a packed one: fp32 matrices in place of codes, everything else as it was.

    `turned` names the modules that keep their matrices (in, out). Raises BadFile for bits, versions and shapes that are
    not read, and where nothing is packed.
    """
    from safetensors.torch import save_file

    kind = settings["quant_method"]
    first, read = PACKED[kind]
    files = folder.weights_files(packed, model, allow_pickle=False)
    homes = {name: file for file in files for name in folder.header(file, model)[1]}
    folder.require_quantized(homes, (f".{first}",), kind, model)
    modules = {name.removesuffix(f".{first}") for name in homes if name.endswith(f".{first}")}
    parts = {module: _ends(module, homes) for module in modules}
    owned = {f"{module}.{end}": module for module, ends in parts.items() for end in ends}
    places: dict[str, str] = {}
    for file in files:
        state = {}
        for name in (name for name, home in homes.items() if home == file):
            module = owned.get(name)
            if module is None:
                state[name] = _load(homes, name)
            elif name == f"{module}.{first}":
                tensors = {end: _load(homes, f"{module}.{end}") for end in parts[module]}
                matrix = _read(read, tensors, settings, f"{model}: {module}")
                conv1d = any(one == module or one.endswith(f".{module}") for one in turned)
                state[f"{module}.weight"] = matrix.T.contiguous() if conv1d else matrix
        places |= dict.fromkeys(state, file.name)
        save_file(state, destination / file.name, metadata={"format": "pt"})
    folder.copy_beside(packed, destination, ("quantize_config.json",))
    config = folder.read_object(packed / "config.json", model)
    config.pop("quantization_config", None)
    (destination / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=1) + "\n", "utf-8")
    for index in destination.glob("*.index.json"):
        index.write_text(json.dumps({"weight_map": places}, indent=1) + "\n", "utf-8")


def _ends(module: str, names: Mapping[str, Any]) -> list[str]:
    """What of a module belongs to its packed weight."""
    kinds = ("qweight", "qzeros", "scales", "g_idx", "weight", "weight_scale_inv", "activation_scale", "input_scale")
    return [end for end in kinds if f"{module}.{end}" in names]


def _load(homes: Mapping[str, Path], name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(homes[name], "pt") as file:
        found: Tensor = file.get_tensor(name)
    return found


def _read(read: Callable[..., Tensor], tensors: Parts, settings: Mapping[str, Any], what: str) -> Tensor:
    """One matrix (out, in), contiguous; BadFile where its parts do not fit each other."""
    try:
        return read(tensors, settings, what).contiguous()
    except (KeyError, RuntimeError, IndexError) as error:  # a part that is not there, or of another shape
        raise BadFile(f"{what} is packed in a way that is not read ({str(error).splitlines()[0]:.120})") from error


def _bits(settings: Mapping[str, Any], known: tuple[int, ...], what: str) -> int:
    bits = settings.get("bits", settings.get("w_bit"))
    if bits not in known or isinstance(bits, bool):
        raise BadFile(f"{what} has codes of {str(bits)!s:.20} bits; {', '.join(map(str, known))} are read")
    return int(bits)


def _codes(words: Tensor, bits: int) -> Tensor:
    """(..., n) int32 -> (..., n, 32 / bits) codes, from the lowest bits."""
    import torch

    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    return (words[..., None] >> shifts) & ((1 << bits) - 1)


def gptq(parts: Parts, settings: Mapping[str, Any], what: str) -> Tensor:
    """(out, in) fp32."""
    import torch

    bits = _bits(settings, (2, 4, 8), what)
    form = settings.get("checkpoint_format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise BadFile(f"{what} is packed as {str(form)!s:.20}; gptq and gptq_v2 are read")
    codes = _codes(parts["qweight"].T, bits).flatten(-2).T  # (in, out)
    zeros = _codes(parts["qzeros"], bits).flatten(-2)  # (groups, out)
    if form == "gptq":
        zeros = (zeros + 1) & ((1 << bits) - 1)
    groups = parts["scales"].shape[0]
    rows = torch.arange(codes.shape[0])
    group = parts["g_idx"].long() if "g_idx" in parts else rows // -(-codes.shape[0] // groups)
    return ((codes - zeros[group]).float() * parts["scales"].float()[group]).T


def awq(parts: Parts, settings: Mapping[str, Any], what: str) -> Tensor:
    """(out, in) fp32."""
    import torch

    bits = _bits(settings, (4,), what)
    if (version := str(settings.get("version", "gemm")).lower()) != "gemm":
        raise BadFile(f"{what} is packed by AWQ's version {version:.20}; gemm is read")
    place = torch.tensor(AWQ_ORDER).argsort()
    codes, zeros = (_codes(parts[name], bits)[..., place].flatten(-2) for name in ("qweight", "qzeros"))
    each = codes.shape[0] // parts["scales"].shape[0]
    zeros, scales = (one.repeat_interleave(each, 0) for one in (zeros, parts["scales"].float()))
    return ((codes - zeros).float() * scales).T


def fp8(parts: Parts, settings: Mapping[str, Any], what: str) -> Tensor:
    """(out, in) fp32."""
    weight, scale = parts["weight"].float(), parts["weight_scale_inv"].float()
    if scale.numel() == 1:
        return weight * scale.reshape(())
    high, wide = settings.get("weight_block_size") or (128, 128)
    whole = scale.repeat_interleave(high, 0).repeat_interleave(wide, 1)
    return weight * whole[: weight.shape[0], : weight.shape[1]]


Unpacking = tuple[str, Callable[[Parts, Mapping[str, Any], str], "Tensor"]]
# how a packed module is known, and how it is read
PACKED: Mapping[str, Unpacking] = {
    "gptq": ("qweight", gptq),
    "awq": ("qweight", awq),
    "fp8": ("weight_scale_inv", fp8),
}
