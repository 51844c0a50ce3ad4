"""Model folders, without torch at import.

Of anybody's: is it whole and safe to read, quantized already, what identifies its weights. Those of the cache are built
once, whole or not at all, and found again only as they were built.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import json
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from harness.core.errors import BadFile, HarnessError, MissingAsset, MissingPackage
from harness.core.files import cache_folder, locked, read_plain, replace_text, sha256_file
from harness.core.values import digest, parse_json

SAFE = ("model.safetensors", "model.safetensors.index.json", re.compile(r"model-\d+-of-\d+\.safetensors"))
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", re.compile(r"pytorch_model-\d+-of-\d+\.bin"))
COUNTS = re.compile("layer|expert|label|block|depth|stage", re.IGNORECASE)  # keys of config.json that count objects
KERNELS = re.compile("(attn|experts)_implementation|kernel", re.IGNORECASE)  # keys that can name code of the Hub
MOST = 10_000  # of them; the largest models have some hundred
LARGEST_HEADER = 100_000_000  # bytes; safetensors itself reads no larger one
QUANTIZED = ("bitsandbytes", "compressed-tensors")  # how checkpoints may be: a distribution of that name reads them
PACKED = ("gptq", "awq", "fp8")  # the same, unpacked here
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")  # any one serves
BESIDE = (".json", ".model", ".txt", ".jinja", ".py")  # ends of the files beside the weights
RECORD = "harness.json"  # beside a built folder's weights: what it is, its files' sizes, times and hashes
CHECK = "check"  # in it: a digest of all the rest
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def chosen_weights(names: Iterable[str], model: str, *, allow_pickle: bool) -> tuple[str, ...]:
    """Which of a folder's files hold the weights: one file, or an index followed by its shards.

    Safetensors come first. Raises MissingAsset where there are none, or only pickled ones that nobody allowed.
    """
    there = set(names)
    for form in (SAFE, PICKLED):
        single, index, shard = form
        files: tuple[str, ...] = (single,) if single in there else ()
        if not files and index in there:
            files = (index, *sorted(name for name in there if shard.fullmatch(name)))
        if files and form is PICKLED and not allow_pickle:
            raise MissingAsset(
                f"{model} has only pickled weights, which can run code when read: "
                "save it as safetensors, or allow them with --allow-pickle"
            )
        if files:
            return files
    raise MissingAsset(f"{model} has no weights: a model.safetensors, or an index with its shards, is needed")


def check_names(names: Iterable[str], model: str, *, allow_pickle: bool) -> tuple[str, ...]:
    """Hold a list of file names to what a model folder needs; returns the weights' files."""
    there = set(names)
    if "config.json" not in there and "adapter_config.json" in there:
        raise MissingAsset(
            f"{model} is an adapter without its model: copy it into that model's folder (config.json and weights), "
            "and name that"
        )
    if "config.json" not in there:
        raise MissingAsset(f"{model} has no config.json: name the folder that holds config.json and *.safetensors")
    weights = chosen_weights(there, model, allow_pickle=allow_pickle)
    if not there.intersection(TOKENIZERS):
        raise MissingAsset(f"{model} has no tokenizer: copy its tokenizer.json beside config.json")
    return weights


def native(model_type: str) -> bool:
    """Whether the installed transformers has this architecture itself; looked up on disk, an import costs seconds."""
    spec = importlib.util.find_spec("transformers")
    homes = spec.submodule_search_locations if spec else None
    folder = model_type.replace("-", "_")
    return bool(re.fullmatch(r"\w+", folder)) and any(
        (Path(home) / "models" / folder / "__init__.py").is_file() for home in homes or ()
    )


def check_config(path: Path, model: str, *, trust_remote_code: bool) -> None:
    """Refuse an unreadable config.json, and one that asks for code or weights beside the folder's own weights."""
    config = read_object(path, model)
    for keys, value in _leaves(config):
        key = keys[-1] if keys else ""
        if COUNTS.search(key) and isinstance(value, int | float) and value > MOST:
            raise BadFile(f"{model}: {path} says {key} = {value:.3g}, more than any model has: copy it again")
        if isinstance(value, str) and "/" in value and any(map(KERNELS.search, keys)):
            raise BadFile(
                f"{model}: {path} asks for the kernel {value!r:.80} ({'.'.join(keys)}), code that nobody has hashed: "
                "take that entry out"
            )
    if other := config.get("transformers_weights"):
        raise BadFile(
            f"{model}: {path} names weights of its own ({other!r:.80}), not those that are hashed: "
            "take transformers_weights out, or name a folder that holds them alone"
        )
    if "auto_map" in config and not trust_remote_code and not native(str(config.get("model_type", ""))):
        raise MissingAsset(
            f"{model} needs code of its own ('{config.get('model_type')}' is not in the installed transformers): "
            "read that code, then allow it with --trust-remote-code"
        )


def _leaves(value: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every text, number and truth of a JSON value, with the keys that lead to it."""
    for name, item in value.items() if isinstance(value, dict) else ():
        yield from _leaves(item, (*keys, str(name)))
    for item in value if isinstance(value, list) else ():
        yield from _leaves(item, keys)
    if not isinstance(value, dict | list):
        yield keys, value


def require_layers(directory: Path, layers: Any, *, allow_pickle: bool) -> None:
    """BadFile where a configuration has more layers than the weights have tensors: building them would hang."""
    files = weights_files(directory, f"the model in {directory}", allow_pickle=allow_pickle)
    if all(file.suffix == ".safetensors" for file in files):
        tensors = sum(len(header(file, str(directory))[1]) for file in files)
        if not isinstance(layers, int) or layers > tensors:
            raise BadFile(
                f"{directory}: its config.json has {layers} layers, its weights {tensors} tensors: copy again"
            )


def require_parameters(directory: Path, model: str, parameters: int, *, allow_pickle: bool) -> None:
    """BadFile where a configuration has more parameters than the weights have bytes: allocating them would take all."""
    files = weights_files(directory, model, allow_pickle=allow_pickle)
    held = sum(file.stat().st_size for file in files)
    if parameters > held:
        raise BadFile(f"{model}: its config.json describes {parameters:,} parameters, its weights have {held:,} bytes")


def weights_files(directory: Path, model: str, *, allow_pickle: bool) -> tuple[Path, ...]:
    """The files that hold the weights, sorted, without the index; MissingAsset names a shard that is not there."""
    first, *_ = chosen_weights((path.name for path in directory.iterdir()), model, allow_pickle=allow_pickle)
    if not first.endswith(".json"):
        return (directory / first,)
    shards = read_object(directory / first, model).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise BadFile(f"{model}: {directory / first} holds no weight_map")
    shard = next(pattern for _, index, pattern in (SAFE, PICKLED) if index == first)
    for name in shards.values():  # a name with a folder in it, or of the other kind, is somebody else's file
        if not isinstance(name, str) or not shard.fullmatch(name):
            raise BadFile(f"{model}: {directory / first} names {str(name)!r:.80}, which is no shard's name")
    files = tuple(directory / name for name in sorted(set(shards.values())))
    for file in files:
        if not file.is_file():
            raise MissingAsset(f"{model} lacks {file.name}, which {first} names: copy or download it again")
    return files


def check_folder(directory: Path, model: str, *, allow_pickle: bool, trust_remote_code: bool) -> None:
    """Hold a folder to what a run needs: config, tokenizer, whole weights files. One line says what is wrong."""
    try:
        names = [path.name for path in directory.iterdir()]
    except FileNotFoundError:
        raise MissingAsset(f"{model}: there is no folder {directory}") from None
    except OSError as error:
        raise MissingAsset(f"{model}: {directory} cannot be read as a folder ({error.strerror})") from error
    for path in directory.iterdir():
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise BadFile(f"{model}: {path} is a pipe or a device, which can be waited on for ever: take it away")
    check_names(names, model, allow_pickle=allow_pickle)
    check_config(directory / "config.json", model, trust_remote_code=trust_remote_code)
    for file in weights_files(directory, model, allow_pickle=allow_pickle):
        if file.suffix == ".safetensors":
            check_whole(file, model)


def revision(directory: Path, model: str, *, allow_pickle: bool = False) -> str:
    """sha256 (hex) over the weights: of the file itself, or of `sha256sum`'s listing of several, sorted by name."""
    files = weights_files(directory, model, allow_pickle=allow_pickle)
    return revision_of({file.name: sha256_file(file) for file in files})


def revision_of(hashes: Mapping[str, str]) -> str:
    """The same from the files' own hashes, by name, in order."""
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    listing = "".join(f"{sha}  {name}\n" for name, sha in hashes.items())
    return hashlib.sha256(listing.encode()).hexdigest()


def stamp(directory: Path) -> str:
    """Changes whenever a file of a folder is written, replaced or gone: a digest of names, sizes, times and inodes."""
    files: list[Any] = []
    with contextlib.suppress(FileNotFoundError):  # somebody takes the folder away just now: that is another stamp
        for path in sorted(directory.iterdir()):
            status = path.stat()
            files.append([path.name, status.st_size, status.st_mtime_ns, status.st_ino])
    return digest(files)


def require_match(report: Mapping[str, Any], weights: str) -> None:
    """Hold transformers' loading report to weights and architecture that match in every name and shape.

    Raises BadFile naming the keys: a weight that is missing would otherwise be filled with random numbers.
    """
    shapes = [key if isinstance(key, str) else key[0] for key in report.get("mismatched_keys") or ()]
    for what, keys in (
        ("lack", report.get("missing_keys") or ()),
        ("have other shapes for", shapes),
        ("hold what the architecture does not:", report.get("unexpected_keys") or ()),
    ):
        if keys:
            listed = ", ".join(sorted(keys)[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
            raise BadFile(f"{weights} {what} {listed}: config and weights do not match")


def read_object(path: Path, model: str) -> dict[str, Any]:
    """A JSON file that must hold an object; MissingAsset or BadFile, one line, names it."""
    try:
        data = parse_json(read_plain(path))
    except OSError as error:
        raise MissingAsset(f"{model}: {path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise BadFile(f"{model}: {path} is no JSON ({str(error).splitlines()[0]})") from error
    if not isinstance(data, dict):
        raise BadFile(f"{model}: {path} holds no JSON object")
    return data


def header(file: Path, model: str) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begin, and the entries of its tensors."""
    try:
        with file.open("rb") as stream:
            length, size = int.from_bytes(stream.read(8), "little"), file.stat().st_size
            entries = parse_json(stream.read(length)) if 2 <= length <= min(size - 8, LARGEST_HEADER) else None
    except OSError as error:
        raise MissingAsset(f"{model}: {file} cannot be read ({error.strerror})") from error
    except ValueError:
        entries = None
    if not isinstance(entries, dict):
        raise BadFile(f"{model}: {file} is no safetensors file: copy or download it again")
    return 8 + length, {name: entry for name, entry in entries.items() if name != "__metadata__"}


def check_whole(file: Path, model: str) -> None:
    """Compare a safetensors file's size with what its header promises: a download cut short is found here."""
    (start, entries), size = header(file, model), file.stat().st_size
    try:
        ends = [int(entry["data_offsets"][1]) for entry in entries.values()]
    except (TypeError, KeyError, IndexError, ValueError, OverflowError):
        raise BadFile(f"{model}: {file} has a header without tensors' places: copy or download it again") from None
    promised = start + max(ends, default=0)
    if size != promised:
        raise BadFile(f"{model}: {file} has {size} bytes where its header promises {promised}: copy it again")


def stated_quantization(directory: Path, config: Mapping[str, Any], model: str) -> Any:
    """What config.json says of how a folder is quantized, or quantize_config.json of AutoGPTQ's first files beside it.

    The latter counts only where weights are packed; None where neither says anything.
    """
    stated, beside = config.get("quantization_config"), directory / "quantize_config.json"
    if stated is None and beside.is_file():
        weights = [name for file in directory.glob("*.safetensors") for name in header(file, model)[1]]
        if any(name.endswith(".qweight") for name in weights):
            return {"quant_method": "gptq", **read_object(beside, model)}
    return stated


def check_quantization(directory: Path, model: str) -> dict[str, Any] | None:
    """How a folder is quantized already, as its config.json has it, with its `quant_method`; None where it is not.

    Raises HarnessError where it is so in a way that cannot be read here; its library may be missing.
    """
    stated = stated_quantization(directory, read_object(directory / "config.json", model), model)
    if not isinstance(stated, dict):
        return None
    kind = stated.get("quant_method")
    if kind is None and (stated.get("load_in_4bit") or stated.get("load_in_8bit")):
        kind = "bitsandbytes"  # whose first releases did not say so
    if kind is None:
        raise HarnessError(
            f"{model} is quantized already, and its config.json does not say by what (quantization_config.quant_method)"
            ": name the unquantized model, or write it there"
        )
    if kind in PACKED:
        return stated
    if kind not in QUANTIZED:
        raise HarnessError(
            f"{model} is quantized already, by '{kind}', which is not read here "
            f"(known: {', '.join((*QUANTIZED, *PACKED))}): "
            "name the unquantized model"
        )
    try:
        distribution(kind)
    except PackageNotFoundError:
        raise MissingPackage(kind, model) from None
    return {**stated, "quant_method": kind}


def require_quantized(names: Iterable[str], marks: tuple[str, ...], kind: str, model: str) -> None:
    """BadFile where no tensor's name has a mark of what config.json says its weights are quantized by."""
    if not any(mark in name for name in names for mark in marks):
        said = f"it says that it is quantized by {kind}, and no weight of it is"
        raise BadFile(f"{model}: {said}: take quantization_config out of config.json")


def save_plain(loaded: Any, state: Mapping[str, Any], directory: Path) -> None:
    """Write a model of transformers, with fp32 tensors in place of its own, as a folder that nothing has quantized.

    A model that was loaded quantized, or from GGUF, refuses to be saved, so a fresh one is. Quantized matrices come
    back (out, in) where the architecture keeps them (in, out), as GPT-2 does.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    facts = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    with torch.device("meta"):  # no random weights: every tensor is put in place below
        fresh = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(facts), dtype=torch.float32)
    state = dict(state)
    for name, module in fresh.named_modules():
        if isinstance(module, Conv1D) and isinstance(loaded.get_submodule(name), torch.nn.Linear):
            state[f"{name}.weight"] = state[f"{name}.weight"].T.contiguous()
    fresh.load_state_dict(state, assign=True)
    fresh.tie_weights()
    fresh.save_pretrained(directory)


@contextlib.contextmanager
def unpickled(directory: Path, room: Path, model: str, *, allow_pickle: bool) -> Iterator[Path]:
    """The folder; where its weights are pickled and that is allowed, another with them in safetensors, within `room`.

    It has links to what else lies in the folder. Tensors alone are read, no code is run.
    """
    files = weights_files(directory, model, allow_pickle=allow_pickle)
    if all(file.suffix == ".safetensors" for file in files):
        yield directory
        return
    import torch
    from safetensors.torch import save_file

    state: dict[str, torch.Tensor] = {}
    for file in files:
        state |= torch.load(file, map_location="cpu", weights_only=True)
    with tempfile.TemporaryDirectory(dir=room.parent, prefix=f"{room.name}-") as place:
        for path in directory.iterdir():
            if path.is_file() and path.suffix in BESIDE and path.name != PICKLED[1]:
                (Path(place) / path.name).symlink_to(path.resolve())
        # copies, since safetensors refuses tensors that share their storage
        own = {name: state.pop(name).clone(memory_format=torch.contiguous_format) for name in list(state)}
        save_file(own, Path(place) / SAFE[0], metadata={"format": "pt"})
        del own
        yield Path(place)


def copy_beside(source: Path, destination: Path, leave: Iterable[str] = ()) -> None:
    """Copy what lies beside a model's weights (config, tokenizer, code), but files of the names in `leave`."""
    for path in source.iterdir():
        if path.is_file() and path.suffix in BESIDE and path.name not in (RECORD, *leave):
            shutil.copyfile(path, destination / path.name)


def no_room(error: BaseException) -> bool:
    """Whether a disk is to blame: libraries in other languages tell it in words only."""
    return (isinstance(error, OSError) and error.errno in NO_ROOM) or "os error 28" in str(error)


def built(name: str, build: Callable[[Path], dict[str, str]], verify: bool = False) -> tuple[Path, dict[str, Any]]:
    """The cache's folder `name` and its record, made by `build(empty folder) -> facts` where it is not there whole.

    One process builds, others wait. What a killed process left unfinished, or a folder whose files are not what was
    recorded, is cleared away under the lock. Files are hashed where `verify` asks, and where a time or size changed.
    """
    home = cache_folder("checkpoints")
    folder = home / name
    try:
        record = _record(folder, verify)
        if record is None:
            with locked(home / f"{name}.lock"):
                record = _record(folder, True) or _build(folder, build)
    except Exception as error:
        if not no_room(error):
            raise
        raise HarnessError(
            f"{name} cannot be written to the cache {home} ({getattr(error, 'strerror', None) or error}): "
            "make room, or set HARNESS_CACHE to a folder with more"
        ) from error
    return folder, record


def _build(folder: Path, build: Callable[[Path], dict[str, str]]) -> dict[str, Any]:
    prefix = f".{folder.name}."
    for left in (*folder.parent.glob(f"{prefix}*"), folder):  # we hold the lock: whoever made them is gone
        if left.is_dir():
            shutil.rmtree(left)
    temporary = folder.with_name(f"{prefix}{secrets.token_hex(4)}")
    temporary.mkdir()
    allowed = temporary.stat().st_mode & 0o666  # by the umask: a cache may be shared
    try:
        facts = {**build(temporary), "revision": revision(temporary, f"the built {folder.name}")}
        for file in temporary.iterdir():
            file.chmod(allowed)  # safetensors writes for its owner alone
        record = {**facts, "files": {file.name: [*_stamp(file), sha256_file(file)] for file in temporary.iterdir()}}
        replace_text(temporary / RECORD, json.dumps({**record, CHECK: digest(record)}, indent=1) + "\n")
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return record


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _record(folder: Path, verify: bool) -> dict[str, Any] | None:
    """The record of a built folder, or None where it is not there, or not whole."""
    try:
        record: dict[str, Any] = parse_json((folder / RECORD).read_bytes())
        if record.pop(CHECK) != digest(record):
            return None
        for name, (size, written, sha) in record["files"].items():
            size_now, written_now = _stamp(folder / name)
            if size_now != size or ((verify or written_now != written) and sha256_file(folder / name) != sha):
                return None
    except (FileNotFoundError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return record
