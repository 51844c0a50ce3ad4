"""What other kernels do to a model's losses, token by token: the noise that the judge must not take for a change.

Under another kernel nothing changes but the order of sums and what is rounded between them: attention computed in
another way, another number of threads, products by another library or by fewer instructions. Each kernel runs in a
process of its own, which loads each method once and scores the slices of a text as an evaluation does
(`engine.score`). Losses are kept slice by slice in the harness's cache, under gate/noise, so that an interrupted run is
taken up where it stopped.

    python -m studies.gate.noise --texts lee,wikitext-2=text:FILE,ptb=ptb:FILE     measures what is not there yet
    python -m studies.gate.noise --series embedded --kernel usual    one process of it
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from harness.core import catalog
from harness.core.contracts import Window
from harness.core.errors import UnknownName
from harness.core.files import cache_dir
from harness.core.options import Declared
from harness.core.specification import parse
from harness.judge.baselines import overlays, read_overlay
from harness.report import markup
from harness.results.losses import load

Losses = NDArray[np.float32]  # nats, one a scored token
USUAL = "usual"
FIRST_SEED = 2000  # of the made-up texts: past every seed that trains a model or is measured elsewhere
AT_ONCE = 6  # processes; each holds one model at a time


@dataclass(frozen=True)
class Kernel:
    """How the same numbers are computed.

    attention: 'sdpa' torch's fused kernel, 'math' its plain products, 'eager' transformers' own.
    onednn: all of the products of fp32, rather than where it is quicker.
    variables: of the environment, read by MKL, oneDNN and ATen as they start.
    config: what is edited in config.json, by which factor; no noise then, but a fault that must show.
    """

    threads: int = 2
    attention: str = "sdpa"
    onednn: bool = False
    batch: int = 1
    variables: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, float] = field(default_factory=dict)


KERNELS: Mapping[str, Kernel] = {
    USUAL: Kernel(),
    "eager attention": Kernel(attention="eager"),
    "attention by plain products": Kernel(attention="math"),
    "one thread": Kernel(threads=1),
    "four threads": Kernel(threads=4),
    "products by oneDNN": Kernel(onednn=True),
    "fewer instructions": Kernel(
        variables={"ONEDNN_MAX_CPU_ISA": "AVX", "MKL_ENABLE_INSTRUCTIONS": "AVX", "ATEN_CPU_CAPABILITY": "default"}
    ),
    "rope_theta a tenth lower": Kernel(config={"rope_theta": 0.9}),
    "rms_norm_eps ten times as large": Kernel(config={"rms_norm_eps": 10.0}),
}


@dataclass(frozen=True)
class Series:
    """A model's methods on slices of text under several kernels.

    label: names it on the command line. windows: of one slice. methods: how many slices each is measured on, the most
    telling first. A known model reads the texts that it is given in turn; a tiny one its own language, each slice from
    a seed of its own.
    """

    label: str
    model: str
    protocol: str
    windows: int
    kernels: tuple[str, ...]
    methods: Mapping[str, int]

    @property
    def slices(self) -> int:
        """The most that any method is measured on."""
        return max(self.methods.values())


TELLING = ("eager attention", "attention by plain products", "four threads", "products by oneDNN", "fewer instructions")
EMBEDDED = Series(
    "embedded",
    "smollm2-135m",
    "chunk:256",
    1,
    TELLING,
    {"fp32": 20, "bf16": 20, "bnb-int8": 20, "bnb-nf4": 4, "absmax-int8": 4},
)
TINY = tuple(
    Series(
        model,
        model,
        "chunk:256",
        4,
        TELLING,
        dict.fromkeys(("fp32", "bf16", "bnb-int8"), 30),
    )
    for model in ("tiny-gpt2", "tiny-olmo")
)
# What methods lose on real texts: slices of two windows, 8,192 tokens of each text.
TEXTS = Series(
    "texts",
    "smollm2-135m",
    "chunk:512",
    2,
    (),
    dict.fromkeys(("fp32", "bnb-int8", "bf16", "bnb-nf4", "absmax-int8", "fp16", "zeropoint-int8"), 16),
)
# Faults on the embedded model, a few slices each: they must show.
EDITED = Series(
    "edited",
    "smollm2-135m",
    "chunk:256",
    1,
    ("rope_theta a tenth lower", "rms_norm_eps ten times as large"),
    {"fp32": 4, "bf16": 4, "bnb-int8": 4},
)
ALL = {one.label: one for one in (EMBEDDED, EDITED, TEXTS, *TINY)}


@dataclass(frozen=True)
class Slice:
    """A piece of text as it is scored; `name` says which text and which part."""

    name: str
    windows: tuple[Window, ...]


def folder_of(series: Series) -> str:
    """Where the model's plain folder lies: found once, so that every kernel reads the same weights."""
    from harness.inputs.models import checkpoints

    return str(checkpoints.materialise(parse(series.model), Declared(Path.cwd())).directory)


def edited(folder: str, config: Mapping[str, float], scratch: Path) -> str:
    """A copy of a model's folder whose config.json has numbers multiplied, wherever they stand in it."""

    def walk(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: walk(item, key) for key, item in value.items()}
        return value * config[name] if name in config and isinstance(value, (int, float)) else value

    for path in Path(folder).iterdir():
        if path.name != "config.json" and path.is_file():
            (scratch / path.name).symlink_to(path)
    told = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    (scratch / "config.json").write_text(json.dumps(walk(told)), encoding="utf-8")
    return str(scratch)


def slices(series: Series, texts: Mapping[str, str], folder: str = "") -> list[Slice]:
    """Every slice: of the texts in turn (name -> specification), or of made-up ones for a tiny model."""
    from harness.inputs.models import checkpoints
    from harness.inputs.texts import corpora, protocols, synthetic

    checkpoint = checkpoints.materialise(parse(f"path:{folder or folder_of(series)}"), Declared(Path.cwd()))
    tokenizer = checkpoints.tokenizer(checkpoint)
    protocol = protocols.parse(parse(series.protocol))
    size = series.windows * (protocol.width or 0)

    def cut(corpus: Any, tokens: int) -> tuple[Window, ...]:
        return protocols.plan(corpus, protocol, tokenizer, context=sys.maxsize, max_tokens=tokens).windows

    if series.model.startswith("tiny-"):
        seeds = range(FIRST_SEED, FIRST_SEED + series.slices)
        made = [cut(corpora.single(f"synthetic {seed}", synthetic.text(size, seed)), size) for seed in seeds]
        return [Slice(f"synthetic-{seed}", windows) for seed, windows in zip(seeds, made, strict=True)]
    each = math.ceil(series.slices / len(texts))
    read = {name: cut(corpora.read(parse(text), Declared(Path.cwd())), each * size) for name, text in texts.items()}
    places = itertools.product(range(each), texts)  # a stop leaves as much of every text
    found = []
    for place, name in itertools.islice(places, series.slices):
        part = read[name][place * series.windows : (place + 1) * series.windows]
        if sum(len(window.ids) for window in part) < size:
            raise ValueError(f"{name} is too short: {each * size:,} tokens are needed")
        found.append(Slice(f"{name}-{place}", part))
    return found


def path_of(keep: Path, series: Series, kernel: str, method: str, piece: str) -> Path:
    """Where a slice's losses lie."""
    words = (f"{series.model} {series.protocol}", kernel, method, piece)
    return keep.joinpath(*(word.replace("/", " ").replace(":", "+") for word in words)).with_suffix(".npy")


def losses_of(keep: Path, series: Series, kernel: str, method: str) -> dict[str, Losses]:
    """The losses that are there, by slice."""
    paths = sorted(path_of(keep, series, kernel, method, "any").parent.glob("*[0-9].npy"))  # whole ones
    return {path.stem: np.load(path, allow_pickle=False) for path in paths}


def counts_of(series: Series, losses: Losses) -> list[int]:
    """Scored tokens by window of a slice: all windows are alike."""
    return [len(losses) // series.windows] * series.windows


# one process


@contextlib.contextmanager
def running(kernel: Kernel) -> Iterator[None]:
    """Compute by this kernel; its variables were set before this process started."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from harness.inputs.models import checkpoints
    from harness.methods.quantizing import bnb, cpu

    torch.set_num_threads(kernel.threads)
    with contextlib.ExitStack() as stack:
        stack.enter_context(bnb.quiet())
        if kernel.attention == "eager":
            stack.enter_context(patch.object(checkpoints, "ATTENTION", "eager"))
        if kernel.attention == "math":
            stack.enter_context(sdpa_kernel([SDPBackend.MATH]))
        if kernel.onednn:
            stack.enter_context(patch.object(cpu, "by_onednn", lambda weight: cpu.has_onednn()))
        yield


def work(series: Series, name: str, texts: Mapping[str, str], keep: Path, folder: str) -> None:
    """Score what is not there yet under one kernel, in this process."""
    from harness.inputs.models import checkpoints
    from harness.metrics.measuring import engine
    from harness.run.group import as_run

    kernel, pieces = KERNELS[name], slices(series, texts, folder)
    with tempfile.TemporaryDirectory() as scratch, running(kernel):
        read = edited(folder, kernel.config, Path(scratch)) if kernel.config else folder
        checkpoint = checkpoints.materialise(parse(f"path:{read}"), Declared(Path.cwd()))
        for text, count in series.methods.items():
            paths = [path_of(keep, series, name, text, piece.name) for piece in pieces[:count]]
            if all(path.is_file() for path in paths):
                continue
            method, given, batch, _ = as_run(text, "cpu", kernel.batch, catalog.methods())
            model = method.load(checkpoint, given, "cpu")
            told: dict[str, Any] = {"device": "cpu", "batch_size": batch}
            for piece, path in zip(pieces, paths, strict=False):
                if path.is_file():
                    continue
                start = time.process_time()
                nll = engine.score(model, piece.windows, concurrent=method.concurrent, **told)
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_suffix(".partial.npy")
                np.save(partial, nll)
                partial.replace(path)
                spent = f"{time.process_time() - start:.1f} s of processor time"
                print(f"noise: {series.label}: {name}: {text}: {piece.name}: {spent}", file=sys.stderr, flush=True)
            del model


# every process


def measure_losses(texts: Mapping[str, str], keep: Path, chosen: Sequence[str] = (), at_once: int = AT_ONCE) -> None:
    """Every kernel of the chosen series, or of all, each in a process of its own; RuntimeError names what failed."""
    series = [ALL[label] for label in chosen or ALL]
    folders = {one.model: folder_of(one) for one in {one.model: one for one in series}.values()}

    def run(job: tuple[Series, str]) -> int:
        one, kernel = job
        given = ",".join(f"{name}={text}" for name, text in texts.items())
        words = ["--series", one.label, "--kernel", kernel, "--folder", folders[one.model]]
        words += ["--texts", given, "--keep", str(keep)]
        waiting = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(KERNELS[kernel].threads)}
        world = {**os.environ, **waiting, **KERNELS[kernel].variables}
        return subprocess.run([sys.executable, "-m", "studies.gate.noise", *words], env=world, check=False).returncode

    jobs: dict[tuple[str, ...], tuple[Series, str]] = {}
    for one in series:
        for kernel in (USUAL, *one.kernels):  # one that two series share is run once
            jobs.setdefault((one.model, one.protocol, kernel), (one, kernel))
    with ThreadPoolExecutor(at_once) as pool:
        ended = list(pool.map(run, jobs.values()))
    if failed := [f"{one.label} {kernel}" for (one, kernel), code in zip(jobs.values(), ended, strict=True) if code]:
        raise RuntimeError(f"no losses of {', '.join(failed)}")


# what they say


def changes(now: Mapping[str, Losses], then: Mapping[str, Losses]) -> dict[str, NDArray[np.float64]]:
    """Change of every token's loss by slice, nats, where both kernels have it."""
    return {name: now[name].astype(np.float64) - then[name] for name in now if name in then}


def described(change: Mapping[str, NDArray[np.float64]]) -> dict[str, Any]:
    """How the tokens of all slices moved.

    Returns:
        `slices`, and how many of them are `equal` to the bit; `tokens`, and the share that `moved`; `rms` a token and
        the `largest` move; `shift`, the mean with its `error` were tokens independent; `lag`, the correlation of
        neighbours; `dispersion`, the variance of the slices' means as a multiple of what independent tokens have (1
        where nothing is shared by the tokens of a slice); `by_slice`, each with its rms and shift. All in nats.
    """
    flat = np.concatenate(list(change.values()))
    rms = float(np.sqrt((flat**2).mean()))
    neighbours = [np.stack([part[:-1], part[1:]]) for part in change.values()]
    pairs = np.concatenate(neighbours, axis=1)
    means = np.array([part.mean() for part in change.values()])
    sizes = np.array([len(part) for part in change.values()])
    within = rms**2 / sizes
    return {
        "slices": len(change),
        "equal": int(sum(not part.any() for part in change.values())),
        "tokens": len(flat),
        "moved": float((flat != 0).mean()),
        "rms": rms,
        "largest": float(np.abs(flat).max()),
        "shift": float(flat.mean()),
        "error": rms / math.sqrt(len(flat)),
        "lag": float((pairs[0] * pairs[1]).mean() / rms**2) if rms else 0.0,
        "dispersion": float(((means - flat.mean()) ** 2 / within).sum() / max(1, len(means) - 1)) if rms else 0.0,
        "by_slice": [
            {"slice": name, "rms": float(np.sqrt((part**2).mean())), "shift": float(part.mean())}
            for name, part in change.items()
        ],
    }


def rms_dp(candidate: Losses, reference: Losses) -> float:
    """Root mean square of the change of the true token's probability, as `divergence.rms_dp` has it."""
    change = np.exp(-candidate.astype(np.float64)) - np.exp(-reference.astype(np.float64))
    return float(np.sqrt((change**2).mean()))


def compute_of(method: str, *, repacked: bool) -> str:
    """What products are computed in; `repacked` where bitsandbytes computes 4-bit ones in bf16 (AVX512-BF16)."""
    if method in ("bf16", "fp16"):
        return method
    if method == "bnb-int8":
        return "int8"
    return "fp32, then bf16" if repacked and method.startswith("bnb-") else "fp32"


def named(
    model: str, kernel: str, method: str, change: Mapping[str, NDArray[np.float64]], compute: str
) -> dict[str, Any]:
    """An entry: what changed, and how its tokens moved."""
    return {"model": model, "kernel": kernel, "method": method, "compute": compute, **described(change)}


def kernels_of(series: Series, keep: Path) -> list[dict[str, Any]]:
    """One entry a kernel and method."""
    found = []
    for kernel, method in itertools.product(series.kernels, series.methods):
        now, then = (losses_of(keep, series, name, method) for name in (kernel, USUAL))
        change = changes(now, then)
        if not change:
            continue
        entry = named(series.model, kernel, method, change, compute_of(method, repacked=False))
        reference = [losses_of(keep, series, name, "fp32") for name in (kernel, USUAL)]
        both = [name for name in change if all(name in side for side in reference)]
        if method != "fp32" and both:
            moved = [
                math.log(rms_dp(now[name], reference[0][name]) / rms_dp(then[name], reference[1][name]))
                for name in both
            ]
            entry["rms_dp"] = {"largest": max(map(abs, moved)), "mean": float(np.mean(moved))}
        found.append(entry)
    return found


def between_classes(folder: Path, before: str = "cpu:avx512", now: str = "cpu:avx512_bf16") -> list[dict[str, Any]]:
    """The same of what two classes of processors recorded of the embedded model, kernels chosen by the processor."""
    home = folder / EMBEDDED.model
    recorded: dict[tuple[str, str, str], dict[str, Losses]] = {}
    for path in overlays(home):
        reach, entries = read_overlay(path)
        for entry in entries:
            if entry.metric == "perplexity" and (nll := load(home / "nll", entry.nll)) is not None:
                method, text = path.name.partition("@")[0], f"{entry.dataset} {entry.protocol}"
                recorded.setdefault((reach, method, text), {})[text] = nll
    found = []
    for reach, method, text in recorded:
        if reach == before and (now, method, text) in recorded:
            change = changes(recorded[now, method, text], recorded[before, method, text])
            compute = compute_of(method, repacked=True)
            found.append(named(EMBEDDED.model, f"{now} for {before}", method, change, compute))
    return found


def measure(texts: Mapping[str, str], keep: Path | None = None, minutes: float | None = None) -> dict[str, Any]:
    """Every series with its kernels; of 0 minutes, of what lies in `keep` (by default in the harness's cache) alone."""
    keep = keep or home()
    chosen = [one.label for one in ALL.values() if one.kernels]
    if minutes != 0:
        measure_losses(texts, keep, chosen)
    found = [entry for name in chosen for entry in kernels_of(ALL[name], keep)]
    found += between_classes(Path("baselines"))
    return {"texts": list(texts), "kernels": found, "derived": derived(found)}


def derived(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a run moves by what products are computed in: the numbers of `[[noise]]`, nats.

    token: the largest of the kernels' root mean squares. shift: the root mean square of their mean changes, from which
    the error of the means is not taken off: so it is never smaller than these runs could tell from nothing.
    """
    found = []
    own = [one for one in entries if one["model"] == EMBEDDED.model and one["kernel"] not in EDITED.kernels]
    for compute in dict.fromkeys(one["compute"] for one in own):
        moved = [one for one in own if one["compute"] == compute and one["rms"]]
        if moved:
            largest = max(moved, key=lambda one: one["rms"])
            found.append(
                {"compute": compute, "token": largest["rms"], "of": f"{largest['method']}, {largest['kernel']}",
                 "shift": math.sqrt(sum(one["shift"] ** 2 for one in moved) / len(moved)), "runs": len(moved)}
            )  # fmt: skip
    return found


def home() -> Path:
    """Where losses are kept."""
    return cache_dir() / "gate" / "noise"


def render(found: Mapping[str, Any]) -> str:
    """The section."""
    rows = [
        [
            f"`{entry['model']}`",
            entry["kernel"],
            f"`{entry['method']}`",
            f"{entry['slices']} ({entry['equal']})",
            f"{100 * entry['moved']:.1f}%",
            f"{entry['rms']:.1e}",
            f"{max(part['rms'] for part in entry['by_slice']):.1e}",
            f"{entry['shift']:+.1e} ± {1.96 * entry['error']:.1e}",
            f"{entry['lag']:+.2f}",
            f"{entry['dispersion']:.2f}",
            f"{100 * math.expm1(entry['rms_dp']['largest']):.1f}%" if "rms_dp" in entry else "–",
        ]
        for entry in found["kernels"]
    ]
    headers = ["model", "kernel", "method", "slices (equal)", "tokens moved", "rms a token, nat", "largest of a slice"]
    headers += ["mean change, nat", "neighbours' correlation", "dispersion of slices", "`rms_dp` moves up to"]
    kernels = "; ".join(f"*{name}*: {told(kernel)}" for name, kernel in KERNELS.items())
    texts = ", ".join(f"`{name}`" for name in found["texts"])
    limits = found["derived"]
    return (
        f"Losses of the embedded model on slices of {texts} (each a window of 256 tokens) and of the tiny models on "
        "slices of their own language (1,024 tokens in windows of 256), under other kernels, set against those of the "
        f"usual one token by token. {kernels}. *Equal*: slices whose every bit is the usual kernel's. *Dispersion*: "
        "variance of the slices' means as a multiple of what independent tokens have.\n\n"
        + markup.table(headers, rows, words=(0, 1, 2))
        + "\n\nWhat a run moves, by what products are computed in (`[[noise]]` of `harness/judge/bounds.toml` rounds "
        "these up). *Token*: the largest of the root mean squares. *Shift*: the root mean square of the mean changes, "
        "from which their own error is not taken off, so that it is never less than these runs could resolve.\n\n"
        + markup.table(
            ["computed in", "token, nat", "of", "shift, nat", "kernels"],
            [
                [one["compute"], f"{one['token']:.2e}", one["of"], f"{one['shift']:.1e}", f"{one['runs']}"]
                for one in limits
            ],
            words=(0, 2),
        )
    )


def told(kernel: Kernel) -> str:
    """A kernel in words."""
    usual = Kernel()
    words = [f"{kernel.threads} threads" if kernel.threads > 1 else "1 thread"] * (kernel.threads != usual.threads)
    words += {"eager": ["transformers' eager attention"], "math": ["torch's unfused attention"]}.get(
        kernel.attention, []
    )
    words += ["products of fp32 by oneDNN"] * kernel.onednn + [f"{kernel.batch} windows a forward"] * (kernel.batch > 1)
    words += [" ".join(f"`{name}={value}`" for name, value in kernel.variables.items())] * bool(kernel.variables)
    return ", ".join(words) or "2 threads, torch's fused attention, oneDNN where it is quicker, a window at a time"


def read_texts(text: str) -> dict[str, str]:
    """'lee,wikitext-2=text:FILE' -> specification by name."""
    pairs = [word.partition("=") for word in text.split(",") if word]
    return {name: specification or name for name, _, specification in pairs}


def main(words: Sequence[str]) -> int:
    """Every process, or one of them."""
    parser = argparse.ArgumentParser(description="Losses under other kernels")
    parser.add_argument("--texts", type=read_texts, default={"lee": "lee"}, metavar="NAME=SPEC,...")
    parser.add_argument("--keep", type=Path, help="folder of the losses (default: the harness's cache)")
    parser.add_argument("--series", default="", help=f"of {', '.join(ALL)}")
    parser.add_argument("--kernel", choices=list(KERNELS))
    parser.add_argument("--methods", default="", help="of the series, these alone")
    parser.add_argument("--folder", help="of the model, where it is known")
    parser.add_argument("--at-once", type=int, default=AT_ONCE)
    chosen = parser.parse_args(words)
    names = [name for name in chosen.series.split(",") if name]
    for name in names:
        if name not in ALL:
            raise UnknownName("series", name, ALL)
    keep = chosen.keep or home()
    if chosen.kernel:
        wanted = chosen.methods.split(",") if chosen.methods else None
        for one in map(ALL.__getitem__, names):
            methods = {name: count for name, count in one.methods.items() if not wanted or name in wanted}
            one = replace(one, methods=methods)
            work(one, chosen.kernel, chosen.texts, keep, chosen.folder or folder_of(one))
    else:
        measure_losses(chosen.texts, keep, names, chosen.at_once)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
