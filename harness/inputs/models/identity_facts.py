"""What a model folder computes with, as the flat facts of `core.identity`. No torch at import.

    weights              digest over every tensor: name, dtype, shape and bytes, however they are cut into files
    config.<key>         of config.json, nested keys with dots; quantize_config.json as its quantization_config
    tokenizer.<part>     digests of tokenizer.json's parts, or of the vocabulary's files; what else changes encoding
    code.<file>          sha256 of the folder's *.py, where the model's own code is used
    adapter.<key>        of adapter_config.json and its weights, which are merged into the model's

Of config.json everything is in that is not left out by name (`LEFT_OUT`, `SAMPLING`, `TRAINING`): an unknown key may
matter. Numbers are canonical, so are the two ways of transformers 4 and 5 to write rotary positions. generation_config
is out: greedy decoding as it is measured here takes a fixed number of tokens, and no setting of a file.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harness.core.errors import BadFile
from harness.core.files import cache_dir, replace_text, sha256_file
from harness.core.identity import DEFAULT
from harness.core.values import digest, parse_json, sha256_text
from harness.inputs.models import adapters, folder

LEFT_OUT = frozenset(  # at any depth: who wrote the file, how its numbers are stored (the loader says), labels, outputs
    """transformers_version _name_or_path name_or_path _commit_hash _from_model_config dtype torch_dtype
    attn_implementation _attn_implementation _attn_implementation_autoset _experts_implementation
    id2label label2id num_labels problem_type finetuning_task task_specific_params
    use_cache return_dict output_attentions output_hidden_states output_scores torchscript gradient_checkpointing
    """.split()
)
SAMPLING = frozenset(  # at the top, where the architecture has no such field of its own
    """do_sample temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff num_beams num_beam_groups
    diversity_penalty length_penalty repetition_penalty encoder_repetition_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids max_length max_new_tokens min_length early_stopping max_time
    num_return_sequences return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens prefix renormalize_logits
    """.split()
)
TRAINING = re.compile("dropout|pdrop|initializer|^summary_|aux_loss")  # at any depth: not in eval mode
ROTARY = ("rope_theta", "partial_rotary_factor")  # which transformers 5 keeps in rope_parameters
PARTS = ("model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder")  # of tokenizer.json
VOCABULARIES = (*folder.TOKENIZERS, "merges.txt", "added_tokens.json")  # where there is no tokenizer.json
ENCODING = """add_bos_token add_eos_token add_prefix_space bos_token eos_token unk_token pad_token sep_token cls_token
    mask_token do_lower_case do_basic_tokenize strip_accents tokenize_chinese_chars split_special_tokens legacy
    keep_accents remove_space""".split()  # of tokenizer_config.json
ELSEWHERE = ("base_model_name_or_path", "revision", "inference_mode")  # of an adapter: where it was trained, and how
PIECE = 2**22  # bytes read at once
Keys = tuple[str, ...]  # of a leaf of JSON objects: what leads there
SETTLED = 2_000_000_000  # nanoseconds: a file written later may be written again without a change of its times


def identified(
    directory: Path, model: str, *, allow_pickle: bool = False, trust_remote_code: bool = False, verify: bool = False
) -> tuple[str, dict[str, str]]:
    """(`folder.revision`, facts) of a model folder.

    Found once for a state of its files: the cache keeps it by their names, sizes, times and inodes. `verify` reads them
    again, code is read anyway. Raises MissingAsset or BadFile, one line.
    """
    code = {}
    if trust_remote_code:
        config, words = folder.read_object(directory / "config.json", model), tokenizer_settings(directory, model)
        code = code_facts(directory, config.get("auto_map"), words.get("auto_map"))
    asked = [allow_pickle, trust_remote_code, code, version("transformers"), CODE]
    state, now = digest([asked, _files(directory)]), time.time_ns()
    kept = cache_dir() / "identities" / f"{sha256_text(str(directory.resolve()))}.json"
    if not verify and (found := _kept(kept, state)):
        return found
    revision, weights = hashed(folder.weights_files(directory, model, allow_pickle=allow_pickle), model)
    facts = {"weights": weights, **facts_of(directory, model, trust_remote_code=trust_remote_code)}
    after = _files(directory)
    if digest([asked, after]) == state and max(max(file[2:4]) for file in after) + SETTLED < now:
        with contextlib.suppress(OSError):  # a cache that is not ours to write: found again the next time
            replace_text(kept, json.dumps({"state": state, "revision": revision, "facts": facts}, indent=1) + "\n")
    return revision, facts


CODE = sha256_text(Path(__file__).read_bytes())  # what is kept was found by this very code


def _files(directory: Path) -> list[tuple[Any, ...]]:
    """Name, size, times of writing and of any change, and inode of each file."""
    found = []
    for path in sorted(directory.iterdir()):
        with contextlib.suppress(FileNotFoundError):  # a link to nothing, or gone just now
            status = path.stat()
            found.append((path.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))
    return found


def _kept(path: Path, state: str) -> tuple[str, dict[str, str]] | None:
    try:
        held = parse_json(path.read_bytes())
        if held["state"] == state:
            return str(held["revision"]), {str(name): str(value) for name, value in held["facts"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # never kept, or damaged
        pass
    return None


def facts_of(directory: Path, model: str, *, trust_remote_code: bool = False) -> dict[str, str]:
    """Every fact but the weights."""
    config = folder.read_object(directory / "config.json", model)
    words = tokenizer_settings(directory, model)
    if (packed := folder.stated_quantization(directory, config, model)) is not None:
        config = {**config, "quantization_config": packed}
    own = trust_remote_code and "auto_map" in config
    facts = config_facts(config, own_code=own) | tokenizer_facts(directory, words, model)
    if trust_remote_code:
        facts |= code_facts(directory, config.get("auto_map"), words.get("auto_map"))
    return facts | adapter_facts(directory, model)


def code_facts(directory: Path, *maps: Any) -> dict[str, str]:
    """`code.<file>`: of a folder whose own code is used, and of repositories whose code an `auto_map` names instead.

    The latter ('org/name--module.Class') as far as the Hub's cache holds them.
    """
    stated = [value for one in maps if one for _, value in leaves({"": one})]
    if not stated:
        return {}
    facts = {f"code.{path.relative_to(directory)}": sha256_file(path) for path in sorted(directory.rglob("*.py"))}
    classes = [name for value in stated for name in (value if isinstance(value, list) else [value])]
    for name in sorted({str(name) for name in classes if "--" in str(name)}):
        from huggingface_hub import try_to_load_from_cache

        repository, _, reference = name.partition("--")
        with contextlib.suppress(ValueError):  # no name of a repository
            found = try_to_load_from_cache(repository, f"{reference.rpartition('.')[0]}.py")
            beside = sorted(Path(found).parent.glob("*.py")) if isinstance(found, str) else []
            facts |= {f"code.{repository}/{path.name}": sha256_file(path) for path in beside}
    return facts


# weights


def hashed(files: Sequence[Path], model: str) -> tuple[str, str]:
    """(`folder.revision`, digest over the tensors) of weights files, every byte read once.

    Tensors of pickled files are not told apart: there the second is the first.
    """
    whole: dict[str, str] = {}
    tensors: dict[str, str] = {}
    for file in files:
        if file.suffix == ".safetensors":
            whole[file.name], found = _tensors(file, model)
            tensors |= found
        else:
            whole[file.name] = sha256_file(file)
    revision = folder.revision_of(whole)
    return revision, digest(tensors) if tensors else revision


def _tensors(file: Path, model: str) -> tuple[str, dict[str, str]]:
    """sha256 of a safetensors file, and of each of its tensors by 'name dtype shape'."""
    start, entries = folder.header(file, model)
    try:
        offsets = {name: tuple(map(int, entry["data_offsets"])) for name, entry in entries.items()}
        places = sorted((begin, end, name) for name, (begin, end) in offsets.items())
        labels = {name: f"{name} {entry['dtype']} {entry['shape']}" for name, entry in entries.items()}
        begins = [0, *(end for _, end, _ in places)]
        if any(begin != wanted for (begin, _, _), wanted in zip(places, begins, strict=False)):
            raise ValueError("tensors overlap, or lie apart")
    except (TypeError, KeyError, ValueError, OverflowError):
        raise BadFile(f"{model}: {file} has a header without tensors' places: copy or download it again") from None
    whole, found = hashlib.sha256(), dict[str, str]()
    with file.open("rb") as stream:

        def read(count: int, part: Any) -> None:
            while count and (piece := stream.read(min(count, PIECE))):
                whole.update(piece)
                part.update(piece)
                count -= len(piece)

        read(start, hashlib.sha256())
        for begin, end, name in places:
            part = hashlib.sha256()
            read(end - begin, part)
            found[labels[name]] = part.hexdigest()
        for piece in iter(lambda: stream.read(PIECE), b""):  # behind the last tensor: refused where a run begins
            whole.update(piece)
    return whole.hexdigest(), found


# config.json


def config_facts(config: Mapping[str, Any], *, own_code: bool = False) -> dict[str, str]:
    """`config.<key>` for everything that may change the computation.

    Args:
        config: of config.json.
        own_code: whether the folder's own classes read it: nobody knows what they take by themselves.
    """
    kept = {path: value for path, value in leaves(config) if not _left_out(path)}
    if not own_code:
        kept = {path: value for path, value in kept.items() if path[0] != "auto_map"}
    spare = frozenset[Keys]() if own_code else spare_keys(kept, str(config.get("model_type")))
    stated = {path for path in kept if path[0] not in SAMPLING or (spare and path not in spare)}
    facts = {}
    for path in sorted(stated, key=lambda path: (path not in spare, path)):  # what counts last: it may have two names
        facts[f"config.{'.'.join(_named(path))}"] = text(kept[path]) + (DEFAULT if path in spare else "")
    return facts


def leaves(value: Any, path: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Whatever a JSON object holds that is no object itself (or an empty one), with the keys that lead there."""
    if path and not (isinstance(value, Mapping) and value):
        yield path, value
        return
    for key, item in value.items():
        yield from leaves(item, (*path, str(key)))


def nested(kept: Mapping[Keys, Any]) -> dict[str, Any]:
    """Undo `leaves`."""
    whole: dict[str, Any] = {}
    for path, value in kept.items():
        place = whole
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
    return copy.deepcopy(whole)


def _left_out(path: Keys) -> bool:
    return any(key in LEFT_OUT or TRAINING.search(key) for key in path)


def spare_keys(kept: Mapping[Keys, Any], model_type: str) -> frozenset[Keys]:
    """Leaves without which the installed architecture comes to the same configuration, one left out after the other.

    Its defaults, what it derives from the rest (a head's size, layers' kinds) and what it does not read. None of an
    architecture that is not installed.
    """
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return frozenset()
    kind: Any = CONFIG_MAPPING[model_type]

    def built(some: Mapping[Keys, Any]) -> Any:
        try:
            return kind.from_dict(nested(some)).to_dict()
        except Exception:  # classes check in their own ways: a key without which they refuse the rest is needed
            return None

    left, whole = dict(kept), built(kept)
    for path in sorted(kept):
        fewer = {other: value for other, value in left.items() if other != path}
        if whole is not None and path != ("model_type",) and built(fewer) == whole:
            left = fewer
    return frozenset(kept.keys() - left.keys())


def _named(path: Keys) -> Keys:
    """A leaf's name, however rotary positions are written: rope_theta, rope_scaling.rope_type, rope_scaling.factor."""
    home, *rest = path
    if home not in ("rope_parameters", "rope_scaling") or len(rest) != 1:  # nested deeper: by kinds of layers
        return path
    key = "rope_type" if rest[0] == "type" else rest[0]
    return (key,) if key in ROTARY else ("rope_scaling", key)


def canonical(value: Any) -> Any:
    """A JSON value whose equal numbers are equal text: 10000.0 as 10000."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {key: canonical(item) for key, item in value.items()}
    return [canonical(item) for item in value] if isinstance(value, list) else value


def text(value: Any) -> str:
    """A value as one line: JSON, but words without their quotes, where they do not read as something else."""
    if not isinstance(value, str):
        return json.dumps(canonical(value), sort_keys=True, default=str)
    try:
        parse_json(value)
    except ValueError:
        return value
    return json.dumps(value)


# tokenizer


def tokenizer_settings(directory: Path, model: str) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json, as far as they are there."""
    files = [directory / name for name in ("special_tokens_map.json", "tokenizer_config.json")]
    settings: dict[str, Any] = {}
    for file in files:
        settings |= folder.read_object(file, model) if file.is_file() else {}
    return settings


def tokenizer_facts(directory: Path, settings: Mapping[str, Any], model: str) -> dict[str, str]:
    """`tokenizer.<part>`: what decides the ids of a text. Not the chat template, nor how the files are written."""
    facts, known = {}, set[tuple[int, str]]()
    if (file := directory / "tokenizer.json").is_file():
        whole = folder.read_object(file, model)
        facts = tokenizer_parts(whole)
        known = set(_added(whole.get("added_tokens")))
    else:
        for file in (directory / name for name in VOCABULARIES):
            if file.is_file():
                same = file.suffix == ".json"  # however it is written
                facts[f"tokenizer.{file.name}"] = (
                    digest(canonical(folder.read_object(file, model))) if same else sha256_file(file)
                )
    decoder = settings.get("added_tokens_decoder")
    pairs = decoder.items() if isinstance(decoder, dict) else ()
    listed = [{"id": key, "content": token.get("content")} for key, token in pairs if isinstance(token, dict)]
    if more := sorted(set(_added(listed)) - known):
        facts["tokenizer.added_tokens_decoder"] = digest(more)
    for name in ENCODING:
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value  # a token with its habits
        if value is not None:
            facts[f"tokenizer.{name}"] = text(value)
    return facts


def tokenizer_parts(whole: Mapping[str, Any]) -> dict[str, str]:
    """A digest for each part of a tokenizer.json."""
    parts = {name: whole[name] for name in PARTS if whole.get(name)}
    if isinstance(parts.get("model"), dict):
        parts["model"] = _vocabulary(parts["model"])
    return {f"tokenizer.{name}": digest(canonical(part)) for name, part in parts.items()}


def _vocabulary(model: Mapping[str, Any]) -> dict[str, Any]:
    """The model of tokenizer.json as every release writes it: without unset options, merges as pairs."""
    stated = {key: value for key, value in model.items() if value is not None and value is not False}
    if isinstance(stated.get("merges"), list):
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in stated["merges"]]
        stated["merges"] = pairs
    return stated


def _added(tokens: Any) -> Iterator[tuple[int, str]]:
    for token in tokens if isinstance(tokens, list) else ():
        if isinstance(token, dict) and str(token.get("id")).isdecimal():
            yield int(token["id"]), str(token.get("content"))


# adapter


def adapter_facts(directory: Path, model: str) -> dict[str, str]:
    """`adapter.<key>` and `adapter.weights`; {} where there is no adapter."""
    file = directory / adapters.SETTINGS
    if not file.is_file():
        return {}
    stated = dict(leaves(folder.read_object(file, model)))
    facts = {f"adapter.{'.'.join(path)}": text(value) for path, value in stated.items() if path[0] not in ELSEWHERE}
    weights = [directory / name for name in adapters.WEIGHTS if (directory / name).is_file()][:1]
    return facts | ({"adapter.weights": hashed(weights, model)[1]} if weights else {})
