"""docs/llamacpp.md: the harness's GGUF files in llama.cpp itself, held to the harness's own figures token by token."""

from __future__ import annotations

import contextlib
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the tests' made-up models

from harness import documents
from harness.report import writing

KINDS = ("f32", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
TOLERANCE = {"f32": 0.05, "other": 0.5}  # percent of the perplexity
WIDTH, TOKENS = 512, 2048  # of a window; of the embedded model's text
ALIKE = "ours, inputs rounded"
GREEDY = 20  # tokens
PROMPTS = ("The capital of France is", "Once upon a time there was", "To measure a perplexity, one")
SHARPENING = 3.0  # of the random models' heads: their raw logits are so flat that every file would agree
PROBES = (
    "The cat sat on the mat, then on 12 other mats.",
    "Caf\u00e9 2024: it's  two blanks,\nand a line \u2014 na\u00efve?",
    "them that then the mother",
)
HEADERS = ("method", "ours", "llama.cpp", "difference", ALIKE, "difference", "allowed", "largest nat")
SHOWN = {
    "smollm2-135m": "the embedded model, its own tokenizer, the text `lee`",
    "tiny-gpt2": "trained by the harness; GGUF has no word-level tokenizer, so ids only",
    "tiny-olmo": "trained by the harness; GGUF has no word-level tokenizer, so ids only",
    "random llama": "random weights, made-up byte-level tokenizer",
    "random gpt2": "random weights, made-up byte-level tokenizer",
    "random olmo": "random weights, made-up byte-level tokenizer with NFC",
    "random phi3": "random weights, made-up SentencePiece vocabulary",
}


def measure(models: Sequence[str]) -> dict[str, Any]:
    """Perplexity of both sides for every model and format, tokens of the probes, greedy continuations."""
    with tempfile.TemporaryDirectory() as folder:
        found = {name: one_model(name, Path(folder)) for name in models or SHOWN}
    import llama_cpp

    return {"llama_cpp_python": llama_cpp.__version__, "models": found}


def one_model(name: str, folder: Path) -> dict[str, Any]:
    """One model in every format; 'NAME@FILE' reads another text."""
    from harness import catalog, checkpoints, gguf_write
    from harness.contracts import Arguments

    checkpoint = opened(name, folder)
    windows = texts(name, checkpoint)
    result: dict[str, Any] = {"formats": {}}
    for kind in KINDS:
        path = folder / "x.gguf"
        gguf_write.write(checkpoint, kind.upper(), path)
        model = catalog.methods()[f"gguf-{kind}"].load(checkpoint, Arguments("fp32"), "cpu")
        ours, theirs = our_nll(model, windows), their_nll(path, windows)
        with rounded_inputs(model, kind):
            alike = our_nll(model, windows)
        result["formats"][kind] = {
            "ours": math.exp(ours.mean()),
            ALIKE: math.exp(alike.mean()),
            "llama.cpp": math.exp(theirs.mean()),
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
def rounded_inputs(model: Any, kind: str) -> Iterator[None]:
    """Within, every product of a packed matrix rounds its inputs as llama.cpp's kernels for CPUs do.

    fp16 numbers for F16; else int8 codes in blocks of 32 of a row, whose step is rounded to fp16 after the codes are
    found (ggml's Q8_0 and Q8_1).
    """
    import torch

    from harness import quantized

    def hook(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        x = given[0]
        if kind == "f16":
            return (x.half().float(), *given[1:])
        blocks = x.unflatten(-1, (-1, 32))
        step = blocks.abs().amax(dim=-1, keepdim=True) / 127
        codes = torch.where(step == 0, 0.0, blocks / step).round()
        return ((codes * step.half().float()).flatten(-2), *given[1:])

    layers = [module for module in model.modules() if isinstance(module, quantized.QuantizedLinear)]
    hooks = [layer.register_forward_pre_hook(hook) for layer in layers] if kind != "f32" else []
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def opened(name: str, folder: Path) -> Any:
    """The checkpoint behind a row of the page."""
    from harness import checkpoints
    from harness.options import Declared
    from harness.specifications import parse

    kind, _, family = name.partition(" ")
    if kind != "random":
        return checkpoints.materialise(parse(name.partition("@")[0]), Declared(Path()))
    from tests.gguf_models import save

    # llama.cpp looks for Phi-3's own special tokens where a model's name says so, and made-up tokenizers lack them
    return save(family, folder / f"made-up-{family[-1]}", sharpen=SHARPENING)


def texts(name: str, checkpoint: Any) -> Any:
    """The windows fed to both sides: a text under chunk:512, or random ids where there is no text."""
    import numpy as np

    from harness import checkpoints, corpora, protocols
    from harness.contracts import Window
    from harness.options import Declared
    from harness.specifications import parse

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
    from harness import engine

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
    from harness.gguf_file import GgufFile

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


def off(figures: Mapping[str, Any], ours: str = ALIKE) -> float:
    """By how many percent llama.cpp's perplexity differs from ours; from the plain one where no other was measured."""
    return 100 * (float(figures["llama.cpp"]) / float(figures.get(ours, figures["ours"])) - 1)


def wide(results: Mapping[str, Any]) -> str:
    """A sentence on the models for which that cost alone is beyond what is allowed; '' where there are none."""
    found = [
        f"`gguf-{kind}` of {name} ({off(figures, 'ours'):+.2f}%)"
        for name, result in results["models"].items()
        for kind, figures in result["formats"].items()
        if abs(off(figures, "ours")) > tolerance(kind)
    ]
    return f" It is more than {TOLERANCE['other']}% for {', '.join(found)}." if found else ""


def tolerance(kind: str) -> float:
    """Percent that a format may differ by."""
    return TOLERANCE.get(kind, TOLERANCE["other"])


def broken(results: Mapping[str, Any]) -> list[str]:
    """What does not agree as it must; [] where all does."""
    lines = [
        f"{name} gguf-{kind}: perplexities differ by {off(figures):+.4f}%, more than {tolerance(kind)}%"
        for name, result in results["models"].items()
        for kind, figures in result["formats"].items()
        if not abs(off(figures)) <= tolerance(kind)
    ]
    for name, result in results["models"].items():
        if result["tokenizer"] not in ("none in the file", f"{len(PROBES)} of {len(PROBES)} probes"):
            lines.append(f"{name}: llama.cpp makes other tokens: {result['tokenizer']}")
        short = [item["prompt"] for item in result.get("greedy", ()) if item["same"] < GREEDY]
        lines += [f"{name}: greedy continuations part early: {prompt!r}" for prompt in short]
    return lines


def render(results: Mapping[str, Any]) -> str:
    """The page."""
    tables = []
    for name, result in results["models"].items():
        rows = [
            [
                f"`gguf-{kind}`",
                f"{figures['ours']:.4f}",
                f"{figures['llama.cpp']:.4f}",
                f"{off(figures, 'ours'):+.4f}%",
                f"{figures[ALIKE]:.4f}" if ALIKE in figures else writing.NOTHING,
                f"{off(figures):+.4f}%",
                f"{tolerance(kind)}%",
                f"{figures['largest']:.4f}",
            ]
            for kind, figures in result["formats"].items()
        ]
        tokens = next(iter(result["formats"].values()))["tokens"]
        tables += [
            f"### {name}\n\n{SHOWN.get(name, 'another text')}. {tokens:,} scored tokens; "
            f"tokenizer: {result['tokenizer']}.",
            writing.table(HEADERS, rows),
        ]
    continued = [
        [item["prompt"], " ".join(item["continuation"].split()), f"{item['same']} of {GREEDY}"]
        for result in results["models"].values()
        for item in result.get("greedy", ())
    ]
    faults = broken(results)
    verdict = (
        "All of it agrees." if not faults else "\n".join(["What does not agree:\n", *(f"- {line}" for line in faults)])
    )
    return "\n\n".join(
        [
            f"""\
llama-cpp-python {results["llama_cpp_python"]}, built from source without the processor's newest instructions (see the
environment `llamacpp` in tox.ini; `tox run -e llamacpp` builds it and makes this page again, or fails). Each model is
written by the harness in every format; llama.cpp loads the file and is fed the same token ids, window by window, as
the method `gguf-*` of the harness, which runs from the same blocks through transformers. llama.cpp also quantizes the
*activations* of a quantized product, to 8 bits in blocks of 32. The harness does not, so a second column rounds the
inputs of its products in the same way, and it is that column which must agree; how far the first is off says what
llama.cpp's rounding of activations costs.{wide(results)}

"Largest nat" is the largest difference of a single token's loss from the second column. GPT-2's is larger under
`gguf-f32`: llama.cpp looks its GELU up in a table of fp16 values.""",
            verdict,
            "## Perplexity",
            *tables,
            "## Greedy continuations from `gguf-f32`",
            writing.table(["prompt", "continuation (ours)", "same tokens"], continued, words=(0, 1)),
        ]
    )


_measured: list[Mapping[str, Any]] = []


def measure_and_keep(models: Sequence[str]) -> dict[str, Any]:
    """`measure`, its result kept for the exit status."""
    found = measure(models)
    _measured.append(found)
    return found


DOCUMENT = documents.Document("llamacpp", "GGUF files in llama.cpp", measure_and_keep, render)

if __name__ == "__main__":
    status = documents.run(DOCUMENT)
    faults = [line for found in _measured for line in broken(found)]
    print("\n".join(faults), file=sys.stderr)
    sys.exit(status or bool(faults))
