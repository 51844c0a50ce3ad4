"""`memory`: bytes and bits per weight of a model under a method, from its configuration alone; and whether it loads.

With `--device cuda` also what a card must hold: keys `cuda.load_peak` and `cuda.run_peak`, bytes; of the latter
`cuda.weights`, `cuda.activations` and, behind `--decode`, the cache's, of which `cuda.kv_cache` is what it holds after
the last token. `cuda.window` and `cuda.decode` are tokens, `cuda.not_counted` says in words what is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core import catalog
from harness.core import specification as specifications
from harness.core.contracts import DTYPES, Arguments, Method
from harness.core.errors import BadFile, BadSpecification, HarnessError, MissingAsset, MissingPackage, UnknownName
from harness.core.options import read_declared
from harness.inputs.models import architectures
from harness.methods.quantizing.arguments import resolve
from harness.run.plan import missing_packages

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MIB, GIB = 2**20, 2**30
DOES_NOT_FIT = 1  # exit status
WINDOW = 512  # tokens of the forward that memory.run_peak measures
UNLIMITED = 1 << 30  # a context that no window reaches


def add(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("memory", help="predict bytes and bits per weight from config.json, without weights")
    parser.add_argument(
        "model", metavar="MODEL_OR_CONFIG", help="a model's name, a folder, a config.json, or hub:org/name"
    )
    parser.add_argument("--method", metavar="SPEC", help="default: the reference in --dtype, else fp32")
    parser.add_argument("--dtype", choices=DTYPES, help="of what is not quantized; default: the method's, else fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: also what a card must hold")
    parser.add_argument(
        "--window", type=int, metavar="N", help="cuda: tokens of the forward; default 512, or the context"
    )
    parser.add_argument("--decode", type=int, metavar="N", help="cuda: tokens decoded behind the window, with a cache")
    parser.add_argument(
        "--fits", metavar="SIZE", help="24GiB: whether it loads (and, on a card, runs); exit status 0 yes, 1 no"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the prediction; exit status 1 where --fits says no."""
    name = arguments.method or arguments.dtype or "fp32"
    method, chosen = _method(name, arguments.dtype, arguments.device)
    limit = None
    if arguments.fits:
        from harness.inputs.models import sizes

        limit = sizes.parse_size(arguments.fits)
    config = find_config(arguments.model)
    window, decode = _tokens(arguments, config)
    predicted = _predict(arguments.model, config, method, chosen)
    answer: dict[str, Any] = {**predicted, "dtype": chosen.dtype}
    if arguments.device == "cuda":
        answer |= _on_card(config, method, chosen, window, decode)
    if limit is not None:
        answer |= _judged(config, method, chosen, limit, answer)
    print(json.dumps(answer, indent=1) if arguments.json else _words(arguments.model, name, answer))
    return DOES_NOT_FIT if answer.get("fits") is False else 0


def _tokens(arguments: argparse.Namespace, config: PretrainedConfig) -> tuple[int, int]:
    """Tokens of the window and behind it, checked against the model's context."""
    window, decode = arguments.window, arguments.decode
    if arguments.device != "cuda":
        if window is not None or decode is not None:
            raise HarnessError("--window and --decode are of a card's forward: add --device cuda")
        return 0, 0
    context = int(getattr(config.get_text_config(), "max_position_embeddings", None) or UNLIMITED)
    window, decode = min(WINDOW, context) if window is None else window, decode or 0
    if window < 1 or decode < 0:
        raise HarnessError(f"--window is 1 or more, --decode 0 or more, not {window} and {decode}")
    if window + decode > context:
        raise HarnessError(f"{window + decode} tokens are beyond the context of {arguments.model}, {context} tokens")
    return window, decode


def _on_card(config: PretrainedConfig, method: Method, chosen: Arguments, window: int, decode: int) -> dict[str, Any]:
    from harness.metrics.measuring import card_memory

    found = card_memory.predict(config, method, chosen, window, decode)
    return {
        "cuda.load_peak": found.load_peak,
        "cuda.run_peak": found.run_peak,
        "cuda.weights": found.weights,
        "cuda.activations": found.activations,
        "cuda.kv_cache": found.cache,
        "cuda.window": window,
        "cuda.decode": decode,
        "cuda.not_counted": list(card_memory.NOT_COUNTED),
    }


def _judged(
    config: PretrainedConfig, method: Method, chosen: Arguments, limit: int, answer: dict[str, Any]
) -> dict[str, Any]:
    """What the limit is compared with, and the verdict."""
    if "cuda.run_peak" in answer:
        largest = max(answer["cuda.load_peak"], answer["cuda.run_peak"])
        return {"limit": limit, "fits": largest <= limit}
    from harness.inputs.models import sizes

    peak = sizes.loading_peak(config, method, chosen)
    return {"load_peak": peak.bytes, "load_peak_is": peak.how, "limit": limit, "fits": peak.bytes <= limit}


def _method(text: str, dtype: str | None, device: str) -> tuple[Method, Arguments]:
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
    return method, resolve(specification, method, device)


def find_config(text: str) -> PretrainedConfig:
    """The configuration that a name, folder, file or Hub id stands for; known names beat directories.

    Raises:
        MissingAsset: no such name, folder or file.
        BadFile: a configuration that transformers does not read.
    """
    if text in architectures.ARCHITECTURES:
        return architectures.config_of(text)
    path = Path(text)
    from harness.inputs.models import names as models

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
    from harness.inputs.models import checkpoints

    models.check(specification, declared)
    found = checkpoints.materialise(specification, declared, say=lambda line: print(line, file=sys.stderr))
    return checkpoints.read_config(found)


def _hub_config(argument: str) -> Path:
    """config.json of a Hub model: in the cache, or fetched without the weights."""
    from huggingface_hub import hf_hub_download

    from harness.inputs.models import hub_models

    snapshot = hub_models.find(argument, allow_pickle=True, trust_remote_code=False)  # nothing is unpickled here
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

    from harness.inputs.models import sizes

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise HarnessError(f"{name} ({config.model_type}) is no causal language model that transformers knows")
    return sizes.predict(config, method, arguments)


def _words(model: str, method: str, answer: dict[str, Any]) -> str:
    lines = [f"{model} under {method}, {answer['dtype']} where not quantized (predicted; no weights were read)"]
    names = {"memory.parameters": "parameters", "memory.footprint": "footprint", "memory.storage": "storage"}
    lines += [_line(names[key], answer[key]) for key in names]
    lines.append(
        f"{'bits per weight':<16}{answer['bits_per_weight']:>18.4f}   over {answer['linear_elements']:,} quantized"
    )
    if "cuda.run_peak" in answer:
        lines += _card_words(answer)
    if "load_peak" in answer:
        lines.append(_line("peak of loading", answer["load_peak"]))
        lines.append(f"                ({answer['load_peak_is']})")
    if "fits" in answer:
        word, size = "fits" if answer["fits"] else "does not fit", f"{answer['limit'] / GIB:,.2f} GiB"
        left_out = "what is not counted" if "cuda.run_peak" in answer else "the process itself and forward passes"
        lines.append(f"{word} into {size}, {left_out} left out")
    return "\n".join(lines)


def _line(name: str, count: int) -> str:
    return f"{name:<16}{count:>18,} B {count / MIB:>13,.2f} MiB"


def _card_words(answer: dict[str, Any]) -> list[str]:
    window, decode = answer["cuda.window"], answer["cuda.decode"]
    what = f"a prompt of {window} tokens and {decode} decoded" if decode else f"one forward over {window} tokens"
    lines = [f"on a card, bytes allocated (predicted; no card was asked): {what}"]
    names = {"load_peak": "peak of loading", "run_peak": "peak of running", "weights": "  weights"}
    names |= {"activations": "  activations", **({"kv_cache": "  key-value cache"} if decode else {})}
    lines += [_line(name, answer[f"cuda.{key}"]) for key, name in names.items()]
    return [*lines, f"not counted: {', '.join(answer['cuda.not_counted'])}"]
