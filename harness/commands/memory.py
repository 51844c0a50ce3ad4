"""`memory`: bytes and bits per weight of a model under a method, from its configuration alone; and whether it loads."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import architectures, catalog, specifications
from harness.arguments import resolve
from harness.contracts import DTYPES, Arguments, Method
from harness.errors import BadFile, BadSpecification, HarnessError, MissingAsset, MissingPackage, UnknownName
from harness.planning import missing_packages
from harness.settings import read_declared

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MIB, GIB = 2**20, 2**30
DOES_NOT_FIT = 1  # exit status


def add(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("memory", help="predict bytes and bits per weight from config.json, without weights")
    parser.add_argument(
        "model", metavar="MODEL_OR_CONFIG", help="a model's name, a folder, a config.json, or hub:org/name"
    )
    parser.add_argument("--method", metavar="SPEC", help="default: the reference in --dtype, else fp32")
    parser.add_argument("--dtype", choices=DTYPES, help="of what is not quantized; default: the method's, else fp32")
    parser.add_argument("--fits", metavar="SIZE", help="24GiB: whether it loads; exit status 0 yes, 1 no")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the prediction; exit status 1 where --fits says no."""
    name = arguments.method or arguments.dtype or "fp32"
    method, chosen = _method(name, arguments.dtype)
    limit = None
    if arguments.fits:
        from harness import fits

        limit = fits.parse_size(arguments.fits)
    config = find_config(arguments.model)
    predicted = _predict(arguments.model, config, method, chosen)
    answer: dict[str, Any] = {**predicted, "dtype": chosen.dtype}
    if limit is not None:
        peak = fits.loading_peak(config, method, chosen)
        answer |= {"load_peak": peak.bytes, "load_peak_is": peak.how, "limit": limit, "fits": peak.bytes <= limit}
    print(json.dumps(answer, indent=1) if arguments.json else _words(arguments.model, name, answer))
    return DOES_NOT_FIT if answer.get("fits") is False else 0


def _method(text: str, dtype: str | None) -> tuple[Method, Arguments]:
    specification = specifications.parse(text)
    known = catalog.methods()
    if specification.name not in known:
        raise UnknownName("method", specification.name, known)
    given = dict(specification.arguments)
    if dtype and given.get("dtype", dtype) != dtype:
        raise BadSpecification(f"'{text}' and --dtype {dtype} disagree: give the dtype once")
    if dtype and dtype != specification.name:
        given["dtype"] = dtype
    specification = replace(specification, arguments=tuple(sorted(given.items())))
    method = known[specification.name]
    for package in missing_packages(method):
        raise MissingPackage(package, f"the method '{method.name}'")
    return method, resolve(specification, method, "cpu")


def find_config(text: str) -> PretrainedConfig:
    """The configuration that a name, folder, file or Hub id stands for; known names beat directories.

    Raises:
        MissingAsset: no such name, folder or file.
        BadFile: a configuration that transformers does not read.
    """
    if text in architectures.ARCHITECTURES:
        return architectures.config_of(text)
    path = Path(text)
    from harness import models

    if text not in models.KNOWN and path.exists():
        return read_config(path / "config.json" if path.is_dir() else path)
    if text.endswith(".json") or "/" in text.partition(":")[0]:
        raise MissingAsset(f"{text} is not there: name a model, a folder with a config.json, or that file")
    specification = specifications.parse(text)
    _, declared = read_declared(Path.cwd())
    source = models.declared_source(specification, declared)
    if source.name == "hub":
        return read_config(_hub_config(source.words[0]))
    if source.name == "path" and Path(source.words[0]).is_dir():
        return read_config(Path(source.words[0]) / "config.json")
    from harness import checkpoints

    models.check(specification, declared)
    found = checkpoints.materialise(specification, declared, say=lambda line: print(line, file=sys.stderr))
    return checkpoints.read_config(found)


def _hub_config(argument: str) -> Path:
    """config.json of a Hub model: in the cache, or fetched without the weights."""
    from huggingface_hub import hf_hub_download

    from harness import hubmodels

    snapshot = hubmodels.find(argument, allow_pickle=True, trust_remote_code=False)  # nothing is unpickled here
    if snapshot.directory is not None:
        return snapshot.directory / "config.json"
    return Path(hf_hub_download(snapshot.repository, "config.json", revision=snapshot.commit))


def read_config(path: Path) -> PretrainedConfig:
    """Read a config.json; refuses one of a model that is quantized already."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingAsset(f"{path} is not there: name a model, a folder with a config.json, or that file") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadFile(f"{path} is no readable config.json: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("model_type"), str):
        raise BadFile(f"{path} names no model_type: a config.json of transformers does")
    if "quantization_config" in data:
        raise BadFile(f"{path} is of a model that is quantized already: name the unquantized model's config.json")
    from transformers import AutoConfig

    kind = data.pop("model_type")
    try:
        config: PretrainedConfig = AutoConfig.for_model(kind, **data)
    except Exception as error:  # whatever a configuration class makes of a wrong value
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise BadFile(f"{path}: transformers does not take it as '{kind}': {reason[:200]}") from error
    return config


def _predict(name: str, config: PretrainedConfig, method: Method, arguments: Arguments) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    from harness import memory

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise HarnessError(f"{name} ({config.model_type}) is no causal language model that transformers knows")
    return memory.predict(config, method, arguments)


def _words(model: str, method: str, answer: dict[str, Any]) -> str:
    lines = [f"{model} under {method}, {answer['dtype']} where not quantized (predicted; no weights were read)"]
    names = {"memory.parameters": "parameters", "memory.footprint": "footprint", "memory.storage": "storage"}
    lines += [f"{names[key]:<16}{answer[key]:>18,} B {answer[key] / MIB:>13,.2f} MiB" for key in names]
    lines.append(
        f"{'bits per weight':<16}{answer['bits_per_weight']:>18.4f}   over {answer['linear_elements']:,} quantized"
    )
    if "fits" in answer:
        lines.append(f"{'peak of loading':<16}{answer['load_peak']:>18,} B {answer['load_peak'] / MIB:>13,.2f} MiB")
        lines.append(f"                ({answer['load_peak_is']})")
        word = "fits" if answer["fits"] else "does not fit"
        lines.append(f"{word} into {answer['limit'] / GIB:,.2f} GiB, the process itself and forward passes left out")
    return "\n".join(lines)
