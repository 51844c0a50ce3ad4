"""Adapters that lie beside a model's weights: merged into a plain folder, so that every method computes with them.

transformers applies one where peft is installed, and passes it over where it is not; methods that read weights by
themselves never see it. Here a LoRA (Hu et al. 2021, arXiv 2106.09685) becomes part of the weights, as peft writes
it and as its own merging computes it:

    W + alpha / r * B A        (alpha / sqrt(r) under `use_rslora`)

with A (r, in) and B (out, r), for an embedding A (r, words) and B (width, r). Whole tensors among the adapter's replace
the model's. Every other kind and every setting that changes the sum is refused by name. No torch at import.
"""

from __future__ import annotations

import contextlib
import math
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core.errors import BadFile, MissingAsset
from harness.inputs.models import folder

if TYPE_CHECKING:  # annotations only
    from torch import Tensor

SETTINGS, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
USED = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out")
# where and how it was trained, and which modules it has: its tensors say so themselves
SAID_ELSEWHERE = (
    "auto_mapping base_model_name_or_path revision task_type inference_mode target_modules exclude_modules "
    "lora_dropout bias modules_to_save layers_to_transform layers_pattern megatron_core qalora_group_size "
    "peft_version ensure_weight_tying"
).split()
BEGUN = (None, True, False, "gaussian", "orthogonal", "eva")  # init_lora_weights that leave the model's weights alone
PREFIX = "base_model.model."  # of every tensor that peft writes
LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])(?:\.weight)?")
WRAPPED = re.compile(r"\.(?:modules_to_save|base_layer|original_module)(?=\.)")  # what peft puts around a module
FIX = "merge it (peft's merge_and_unload) and name that folder, or take it out"


def beside(directory: Path, model: str, *, allow_pickle: bool) -> tuple[dict[str, Any], Path] | None:
    """The settings of an adapter beside a model and the file of its weights; None where there is none.

    Raises MissingAsset where its weights are not there or pickled, BadFile where it cannot be merged.
    """
    if not (directory / SETTINGS).is_file():
        return None
    settings = folder.read_object(directory / SETTINGS, model)
    found = [name for name in WEIGHTS if (directory / name).is_file()]
    if not found:
        raise MissingAsset(
            f"{model} has an {SETTINGS} without its {WEIGHTS[0]}: copy that beside it, or take {SETTINGS} out"
        )
    if found[0] == WEIGHTS[1] and not allow_pickle:
        raise MissingAsset(
            f"{model} has an adapter with pickled weights alone, which can run code when read: save it as safetensors, "
            "or allow them with --allow-pickle"
        )
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise BadFile(
            f"{model} has an adapter of the kind {str(kind)!r:.40} beside it, which is not merged here: {FIX}"
        )
    for name, value in settings.items():
        begun = name == "init_lora_weights" and any(value is one or value == one for one in BEGUN)
        if value and not begun and name not in (*USED, *SAID_ELSEWHERE):
            raise BadFile(f"{model} has an adapter with {name} = {str(value)!s:.80}, which is not merged here: {FIX}")
    file = directory / found[0]
    if file.suffix == ".safetensors":
        folder.check_whole(file, model)
    return settings, file


@contextlib.contextmanager
def hidden(directory: Path) -> Iterator[Path]:
    """A folder with links to all files but the adapter's, which no library can then apply by itself."""
    with tempfile.TemporaryDirectory() as view:
        for path in directory.iterdir():
            if path.name not in (SETTINGS, *WEIGHTS):
                (Path(view) / path.name).symlink_to(path.resolve())
        yield Path(view)


def merge(model_folder: Path, adapter: tuple[Mapping[str, Any], Path], destination: Path, model: str) -> None:
    """Write a plain folder (safetensors, fp32 where the adapter reaches) of a model and the adapter `beside` found."""
    import torch
    from safetensors.torch import load_file, save_file

    settings, file = adapter
    files = folder.weights_files(model_folder, model, allow_pickle=False)
    folder.copy_beside(model_folder, destination, (SETTINGS,))
    if file.suffix == ".safetensors":
        tensors = load_file(file)
    else:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    there = [name for one in files for name in folder.header(one, model)[1]]
    deltas, whole = _sorted(tensors, there, settings, model)
    for weights in files:
        state = load_file(weights)
        for name, tensor in state.items():
            state[name] = _changed(tensor, name, deltas.get(name), whole.get(name), settings, model).contiguous()
        save_file(state, destination / weights.name, metadata={"format": "pt"})


def _sorted(
    tensors: Mapping[str, Tensor], there: list[str], settings: Mapping[str, Any], model: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By the model's names: what is added to a tensor, and what takes its place."""
    pairs: dict[tuple[str, bool], dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        bare = WRAPPED.sub("", name.removeprefix(PREFIX))
        if found := LOW_RANK.fullmatch(bare):
            pairs.setdefault((found["module"], bool(found["embedding"])), {})[found["part"]] = tensor
        elif "lora_" in bare:
            raise BadFile(f"{model}: its adapter holds {name:.80}, which is not merged here: {FIX}")
        else:
            whole[_place(bare, there, model)] = tensor
    deltas = {}
    for (module, embedding), pair in pairs.items():
        target = _place(f"{module}.weight", there, model)
        if pair.keys() != {"A", "B"} or any(one.dim() != 2 for one in pair.values()):
            raise BadFile(f"{model}: its adapter has no pair of matrices for {module:.80}: copy it again")
        low, high = pair["A"].float(), pair["B"].float()
        if low.shape[0] != high.shape[1] or not low.shape[0] or target in deltas:
            raise BadFile(f"{model}: its adapter's matrices for {module:.80} do not fit each other: copy it again")
        product = high @ low * _scale(settings, module, low.shape[0], model)
        deltas[target] = product.T if embedding else product
    return deltas, whole


def _place(name: str, there: list[str], model: str) -> str:
    """The model's tensor that an adapter means; older files have one word less before a name, or one more."""
    if name in there:
        return name
    shorter = name.partition(".")[2]
    near = [one for one in there if one == shorter or one.endswith(f".{name}")]
    if len(near) != 1:
        raise BadFile(f"{model}: its adapter changes {name:.80}, which the weights do not have: is it of this model?")
    return near[0]


def _scale(settings: Mapping[str, Any], module: str, rank: int, model: str) -> float:
    patterns = settings.get("alpha_pattern") or {}
    alpha = settings.get("lora_alpha", 8)  # peft's default
    for key, value in patterns.items() if isinstance(patterns, dict) else ():
        if re.search(r"[$*+?{}\[\]|()\\]", key.removeprefix("^")):
            raise BadFile(f"{model}: its adapter's alpha_pattern has the expression {key!r:.80}: {FIX}")
        if module == key.removeprefix("^") or (key[:1] != "^" and module.endswith(f".{key}")):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise BadFile(f"{model}: its adapter has the lora_alpha {str(alpha)!r:.40}: copy it again")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _changed(
    tensor: Tensor, name: str, delta: Tensor | None, whole: Tensor | None, settings: Mapping[str, Any], model: str
) -> Tensor:
    """One tensor of the model under the adapter."""
    if whole is not None:
        if whole.shape != tensor.shape:
            sizes = f"{tuple(whole.shape)} for {tuple(tensor.shape)}"
            raise BadFile(f"{model}: its adapter replaces {name} by another shape ({sizes}): {FIX}")
        tensor = whole
    if delta is None:
        return tensor
    turned = delta.shape != tensor.shape or (settings.get("fan_in_fan_out") and delta.shape[0] == delta.shape[1])
    delta = delta.T if turned else delta  # a model that keeps its matrices (in, out)
    if delta.shape != tensor.shape:
        raise BadFile(f"{model}: its adapter's matrices for {name} make another shape: is it of this model?")
    return tensor.float() + delta
