"""docs/studies/llamacpp.md: the harness's GGUF files in llama.cpp itself, held to our own figures token by token."""

from __future__ import annotations

import contextlib
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from studies import pages
from studies.quantizers.llamacpp_page import ALIKE, DRAWS, GREEDY, NOISE, PROBES, SHOWN, broken, render

KINDS = ("f32", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
WIDTH, TOKENS = 512, 2048  # of a window; of the embedded model's text
PROMPTS = ("The capital of France is", "Once upon a time there was", "To measure a perplexity, one")
SHARPENING = 3.0  # of the random models' heads: their raw logits are so flat that every file would agree


def measure(models: Sequence[str]) -> dict[str, Any]:
    """Perplexity of both sides for every model and format, tokens of the probes, greedy continuations."""
    with tempfile.TemporaryDirectory() as folder:
        found = {name: one_model(name, Path(folder)) for name in models or SHOWN}
    import llama_cpp

    return {"llama_cpp_python": llama_cpp.__version__, "models": found}


def one_model(name: str, folder: Path) -> dict[str, Any]:
    """One model in every format; 'NAME@FILE' reads another text."""
    from harness.core import catalog
    from harness.core.contracts import Arguments
    from harness.inputs.models import checkpoints
    from harness.inputs.models.gguf_format import write

    checkpoint = opened(name, folder)
    windows = texts(name, checkpoint)
    result: dict[str, Any] = {"formats": {}}
    for kind in KINDS:
        path = folder / "x.gguf"
        write.write(checkpoint, kind.upper(), path)
        model = catalog.methods()[f"gguf-{kind}"].load(checkpoint, Arguments("fp32"), "cpu")
        ours, theirs = our_nll(model, windows), their_nll(path, windows)
        with rounded_inputs(model, kind):
            alike = our_nll(model, windows)
        moved = []
        for seed in range(DRAWS if kind != "f32" else 0):
            with rounded_inputs(model, kind, seed):
                moved.append(our_nll(model, windows))
        result["formats"][kind] = {
            "ours": math.exp(ours.mean()),
            ALIKE: math.exp(alike.mean()),
            "llama.cpp": math.exp(theirs.mean()),
            "noise": max((abs(100 * math.expm1(other.mean() - alike.mean())) for other in moved), default=None),
            "noise_largest": max((float(abs(other - alike).max()) for other in moved), default=None),
            "largest": float(abs(alike - theirs).max()),
            "tokens": len(ours),
        }
        if kind == "f32":
            result["tokenizer"] = same_tokens(path, checkpoints.tokenizer(checkpoint))
            if name == "smollm2-135m":
                result["greedy"] = greedy(path, model, checkpoints.tokenizer(checkpoint))
        print(f"{name} {kind} {result['formats'][kind]}", file=sys.stderr, flush=True)
    return result


@contextlib.contextmanager
def rounded_inputs(model: Any, kind: str, seed: int | None = None) -> Iterator[None]:
    """Within, every product of a packed matrix rounds its inputs as llama.cpp's kernels for CPUs do.

    fp16 numbers for F16; else int8 codes in blocks of 32 of a row, whose step is rounded to fp16 after the codes are
    found (ggml's Q8_0 and Q8_1). With a seed, inputs are moved by a relative NOISE before they are rounded: as much as
    another order of summing moves them, and enough to tip those that lie half-way between two codes.
    """
    import torch

    from harness.methods.quantizing import stored

    generator = torch.Generator().manual_seed(seed or 0)

    def hook(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        x = given[0]
        if seed is not None:
            x = x * (1 + NOISE * torch.randn(x.shape, generator=generator))
        if kind == "f16":
            return (x.half().float(), *given[1:])
        blocks = x.unflatten(-1, (-1, 32))
        step = blocks.abs().amax(dim=-1, keepdim=True) / 127
        codes = torch.where(step == 0, 0.0, blocks / step).round()
        return ((codes * step.half().float()).flatten(-2), *given[1:])

    layers = [module for module in model.modules() if isinstance(module, stored.QuantizedLinear)]
    hooks = [layer.register_forward_pre_hook(hook) for layer in layers] if kind != "f32" else []
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def opened(name: str, folder: Path) -> Any:
    """The checkpoint behind a row of the page."""
    from harness.core.options import Declared
    from harness.core.specification import parse
    from harness.inputs.models import checkpoints

    kind, _, family = name.partition(" ")
    if kind != "random":
        return checkpoints.materialise(parse(name.partition("@")[0]), Declared(Path()))
    from tests.gguf_models import save

    # llama.cpp looks for Phi-3's own special tokens where a model's name says so, and made-up tokenizers lack them
    return save(family, folder / f"made-up-{family[-1]}", sharpen=SHARPENING)


def texts(name: str, checkpoint: Any) -> Any:
    """The windows fed to both sides: a text under chunk:512, or random ids where there is no text."""
    import numpy as np

    from harness.core.contracts import Window
    from harness.core.options import Declared
    from harness.core.specification import parse
    from harness.inputs.models import checkpoints
    from harness.inputs.texts import corpora, protocols

    config = checkpoints.read_config(checkpoint)
    width = min(WIDTH, config.max_position_embeddings)
    if name.startswith("random"):
        ids = np.random.default_rng(0).integers(0, config.vocab_size, (16, width))
        return [Window(row.astype(np.int64), width - 1) for row in ids]
    own = "synthetic" if name.startswith("tiny") else "lee"
    file = name.partition("@")[2]
    corpus = corpora.read(parse(f"text:{file}" if file else own), Declared(Path()))
    protocol = protocols.parse(parse(f"chunk:{width}"))
    tokenizer = checkpoints.tokenizer(checkpoint)
    return protocols.plan(corpus, protocol, tokenizer, context=width, max_tokens=TOKENS).windows


def our_nll(model: Any, windows: Any) -> Any:
    """(scored,) nats, float64."""
    from harness.metrics.measuring import engine

    return engine.score(model, windows, device="cpu").astype("float64")


def loaded(path: Path) -> Any:
    """The file in llama.cpp, its key-value cache in fp32, one thread a core."""
    import os

    import llama_cpp

    return llama_cpp.Llama(
        str(path),
        n_ctx=WIDTH,
        n_batch=WIDTH,
        logits_all=True,
        n_threads=len(os.sched_getaffinity(0)),
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )


def their_nll(path: Path, windows: Any) -> Any:
    """The same from llama.cpp's logits."""
    import numpy as np

    llama = loaded(path)
    found = []
    for window in windows:
        llama.reset()
        llama.eval(window.ids.tolist())
        logits = llama.scores[len(window.ids) - 1 - window.scored : len(window.ids) - 1].astype(np.float64)
        targets = window.ids[-window.scored :]
        top = logits.max(axis=1)
        partition = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        found.append(partition - logits[np.arange(len(targets)), targets])
    llama.close()
    return np.concatenate(found)


def same_tokens(path: Path, tokenizer: Any) -> str:
    """Whether llama.cpp makes the same tokens of the probes; how many it does, or why it is not asked."""
    from harness.inputs.models.gguf_format.file import GgufFile

    if GgufFile(path).metadata["tokenizer.ggml.model"] == "none":
        return "none in the file"
    llama = loaded(path)
    same = sum(llama.tokenize(text.encode(), special=True) == tokenizer(text).input_ids for text in PROBES)
    llama.close()
    return f"{same} of {len(PROBES)} probes"


def greedy(path: Path, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """The most likely continuation of each prompt on both sides."""
    import torch

    llama = loaded(path)
    found = []
    for prompt in PROMPTS:
        start = tokenizer(prompt).input_ids
        ours, theirs = list(start), list(start)
        llama.reset()
        llama.eval(start)
        for _ in range(GREEDY):
            with torch.inference_mode():
                ours.append(int(model(input_ids=torch.tensor([ours]), use_cache=False).logits[0, -1].argmax()))
            theirs.append(int(llama.scores[llama.n_tokens - 1].argmax()))
            llama.eval(theirs[-1:])
        same = next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours)) - len(start)
        found.append({"prompt": prompt, "continuation": tokenizer.decode(ours[len(start) :]), "same": same})
    llama.close()
    return found


_measured: list[Mapping[str, Any]] = []


def measure_and_keep(models: Sequence[str]) -> dict[str, Any]:
    """`measure`, its result kept for the exit status."""
    found = measure(models)
    _measured.append(found)
    return found


DOCUMENT = pages.Document("llamacpp", "GGUF files in llama.cpp", measure_and_keep, render, script="quantizers.llamacpp")

if __name__ == "__main__":
    status = pages.run(DOCUMENT)
    faults = [line for found in _measured for line in broken(found)]
    print("\n".join(faults), file=sys.stderr)
    sys.exit(status or bool(faults))
