"""Bytes and bits per weight of a model under a method, from its configuration alone; and whether it loads."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.core import catalog, specification
from harness.core.contracts import Arguments, Method
from harness.core.errors import BadFile, BadSpecification, HarnessError, MissingAsset, MissingPackage, UnknownName
from harness.core.files import read_plain
from harness.core.options import read_declared
from harness.core.text import MIB
from harness.inputs import hub
from harness.inputs.models import names
from harness.inputs.models.context import context_of
from harness.methods.quantizing.arguments import resolve
from harness.run.plan import missing_packages

if TYPE_CHECKING:
    from transformers import PretrainedConfig

GIB = 2**30
WINDOW = 512  # tokens of the forward that memory.run_peak measures
UNLIMITED = 1 << 30  # a context that no window reaches


def predict(
    model: str,
    method: str,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    window: int | None = None,
    decode: int | None = None,
    fits: str | None = None,
) -> dict[str, Any]:
    """What `python -m harness memory` answers, by key.

    `memory.parameters`, `.footprint` and `.storage` in bytes, `bits_per_weight`, `linear_elements`, `dtype`; of
    a method `matrices`, how much of what the model multiplies by it reaches (`arguments.reach`).
    With `device` 'cuda' also what a card must hold: `cuda.load_peak` and `cuda.run_peak`, bytes; of the latter
    `cuda.weights`, `cuda.activations` and, behind `decode`, the cache's, of which `cuda.kv_cache` is what it holds
    after the last token. `cuda.window` and `cuda.decode` are tokens, `cuda.not_counted` says what is left out.
    With `fits` ('24GiB') `limit` in bytes and `fits`, whether it loads and, on a card, runs.
    """
    chosen, arguments = _method(method, dtype, device)
    from harness.inputs.models import sizes
    from harness.metrics.measuring import census

    limit = sizes.parse_size(fits) if fits else None
    if device != "cuda" and (window is not None or decode is not None):
        raise HarnessError("--window and --decode are of a card's forward: add --device cuda")
    config = _causal(model)
    answer: dict[str, Any] = {**sizes.predict(config, chosen, arguments), "dtype": arguments.dtype}
    answer |= census.predicted(config, chosen, arguments, answer["bits_per_weight"], answer["linear_elements"])
    if device == "cuda":
        from harness.metrics.measuring import card_memory

        context = context_of(config) or UNLIMITED
        window, decode = min(WINDOW, context) if window is None else window, decode or 0
        if window < 1 or decode < 0:
            raise HarnessError(f"--window is 1 or more, --decode 0 or more, not {window} and {decode}")
        if window + decode > context:
            raise HarnessError(f"{window + decode} tokens are beyond the context of {model}, {context} tokens")
        card = card_memory.predict(config, chosen, arguments, window, decode)
        answer |= {
            "cuda.load_peak": card.load_peak,
            "cuda.run_peak": card.run_peak,
            "cuda.weights": card.weights,
            "cuda.activations": card.activations,
            "cuda.kv_cache": card.cache,
            "cuda.window": window,
            "cuda.decode": decode,
            "cuda.not_counted": list(card_memory.NOT_COUNTED),
        }
    if limit is not None:
        if device == "cuda":
            peak = max(answer["cuda.load_peak"], answer["cuda.run_peak"])
        else:
            loading = sizes.loading_peak(config, chosen, arguments)
            peak = loading.bytes
            answer |= {"load_peak": peak, "load_peak_is": loading.how}
        answer |= {"limit": limit, "fits": peak <= limit}
    return answer


@functools.cache
def kept_and_peak(model: str, method: str, device: str) -> tuple[int, int]:
    """Bytes that a model under a method keeps, and holds at most while it loads or, on a card, reads a window."""
    chosen, arguments = _method(method, None, device)
    from harness.inputs.models import sizes

    config = _causal(model)
    kept = int(sizes.predict(config, chosen, arguments)["memory.storage"])
    if device == "cuda":
        from harness.metrics.measuring import card_memory

        card = card_memory.predict(config, chosen, arguments, min(WINDOW, context_of(config) or UNLIMITED), 0)
        return kept, max(card.load_peak, card.run_peak)
    return kept, sizes.loading_peak(config, chosen, arguments).bytes


def _causal(model: str) -> PretrainedConfig:
    """`find_config` of a causal language model."""
    config = find_config(model)
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise HarnessError(f"{model} ({config.model_type}) is no causal language model that transformers knows")
    return config


def _method(text: str, dtype: str | None, device: str) -> tuple[Method, Arguments]:
    parsed = specification.parse(text)
    known = catalog.methods()
    if parsed.name not in known:
        raise UnknownName("method", parsed.name, known)
    given = dict(parsed.arguments)
    if dtype and given.get("dtype", dtype) != dtype:
        raise BadSpecification(f"'{text}' and --dtype {dtype} disagree: give the dtype once")
    if dtype and dtype != parsed.name:
        given["dtype"] = dtype
    parsed = replace(parsed, arguments=tuple(sorted(given.items())))
    method = known[parsed.name]
    for package in missing_packages(method):
        raise MissingPackage(package, f"the method '{method.name}'")
    return method, resolve(parsed, method, device)


def find_config(text: str) -> PretrainedConfig:
    """The configuration that a name, folder, file or Hub id stands for; known names beat directories.

    Raises:
        MissingAsset: no such name, folder or file.
        BadFile: a configuration that transformers does not read.
    """
    if text in names.ARCHITECTURES:
        return names.config_of(text)
    path = Path(text)
    if text not in names.KNOWN and path.exists():
        return read_config(path / "config.json" if path.is_dir() else path)
    if text.endswith(".json") or "/" in text.partition(":")[0]:
        raise MissingAsset(f"{text} is not there: name a model, a folder with a config.json, or that file")
    parsed = specification.parse_model(text)
    declared = read_declared(Path.cwd())[1]
    source = names.declared_source(parsed, declared)
    if source.name == "hub":
        from huggingface_hub import hf_hub_download

        snapshot = hub.find_model(source.words[0], allow_pickle=True, trust_remote_code=False)  # nothing is unpickled
        if snapshot.directory is not None:
            return read_config(snapshot.directory / "config.json")
        return read_config(Path(hf_hub_download(snapshot.repository, "config.json", revision=snapshot.commit)))
    if source.name == "path" and Path(source.words[0]).is_dir():
        return read_config(Path(source.words[0]) / "config.json")
    from harness.inputs.models import checkpoints

    checkpoint = checkpoints.materialise(parsed, declared, say=lambda line: print(line, file=sys.stderr))
    return checkpoints.read_config(checkpoint)


def read_config(path: Path) -> PretrainedConfig:
    """Read a config.json; refuses one of a model that is quantized already."""
    try:
        data = json.loads(read_plain(path))
    except FileNotFoundError as error:
        raise MissingAsset(f"{path} is not there: name a model, a folder with a config.json, or that file") from error
    except (OSError, ValueError) as error:
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
    config.name_or_path = str(path.parent)  # beside which its weights may lie
    return config


def in_words(model: str, method: str, answer: dict[str, Any]) -> str:
    """A prediction for a terminal."""
    lines = [f"{model} under {method}, {answer['dtype']} where not quantized (predicted; no weights were read)"]
    lines += [_line(key, answer[f"memory.{key}"]) for key in ("parameters", "footprint", "storage")]
    found = answer.get("matrices") or {}
    over = f"{answer['linear_elements']:,} quantized"
    if rest := found.get("named", 0) - found.get("reached", 0):
        over += f" and {rest:,} left out"
    lines.append(f"{'bits per weight':<16}{answer['bits_per_weight']:>18.4f}   over {over}")
    if found:
        lines.append(f"{'reached':<16}{found['share']:>18.2%}   of {found['named']:,} in matrices of {found['stack']}")
        for word, left in (("left out", found["left"]), ("elsewhere", found["elsewhere"])):
            lines += [f"{word:<16}{count:>18,}   in {name}" for name, count in left.items()]
    if "cuda.run_peak" in answer:
        window, decode = answer["cuda.window"], answer["cuda.decode"]
        what = f"a prompt of {window} tokens and {decode} decoded" if decode else f"one forward over {window} tokens"
        lines.append(f"on a card, bytes allocated (predicted; no card was asked): {what}")
        parts = {"load_peak": "peak of loading", "run_peak": "peak of running", "weights": "  weights"}
        parts |= {"activations": "  activations", **({"kv_cache": "  key-value cache"} if decode else {})}
        lines += [_line(part, answer[f"cuda.{key}"]) for key, part in parts.items()]
        lines.append(f"not counted: {', '.join(answer['cuda.not_counted'])}")
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
