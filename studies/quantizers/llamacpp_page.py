"""What docs/studies/llamacpp.md says, as a pure function of what studies/quantizers/llamacpp.py measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness.core.text import NOTHING
from harness.report import markup

TOLERANCE = {"f32": 0.05, "other": 0.5}  # percent of the perplexity
ALIKE = "ours, inputs rounded"
NOISE, DRAWS = 1e-6, 3  # relative, on the inputs of every product; draws of it
GREEDY = 20  # tokens
PROBES = (
    "The cat sat on the mat, then on 12 other mats.",
    "Caf\u00e9 2024: it's  two blanks,\nand a line \u2014 na\u00efve?",
    "them that then the mother",
)
BEYOND = (
    f" That is more than the {TOLERANCE['other']}% allowed: on so few tokens no closer agreement of formats whose "
    "inputs are rounded so can be asked for; `gguf-f32`, without rounding, and `gguf-f16`, with finer, check more."
)
HEADERS = ("method", "ours", "llama.cpp", "difference", ALIKE, "difference", "allowed", "noise alone", "largest nat")
SHOWN = {
    "smollm2-135m": "the embedded model, its own tokenizer, the text `lee`",
    "tiny-gpt2": "trained by the harness; GGUF has no word-level tokenizer, so ids only",
    "tiny-olmo": "trained by the harness; GGUF has no word-level tokenizer, so ids only",
    "random llama": "random weights, made-up byte-level tokenizer",
    "random gpt2": "random weights, made-up byte-level tokenizer",
    "random olmo": "random weights, made-up byte-level tokenizer with NFC",
    "random phi3": "random weights, made-up SentencePiece vocabulary",
}


def off(figures: Mapping[str, Any], ours: str = ALIKE) -> float:
    """By how many percent llama.cpp's perplexity differs from ours; from the plain one where no other was measured."""
    return 100 * (float(figures["llama.cpp"]) / float(figures.get(ours, figures["ours"])) - 1)


def wide(results: Mapping[str, Any]) -> list[str]:
    """The formats and models for which inputs left alone are beyond what is allowed."""
    return [
        f"`gguf-{kind}` of {name} ({off(figures, 'ours'):+.2f}%)"
        for name, result in results["models"].items()
        for kind, figures in result["formats"].items()
        if abs(off(figures, "ours")) > tolerance(kind)
    ]


def claims(results: Mapping[str, Any]) -> str:
    """Which of the two columns agrees within what is allowed, and by how much the other misses it."""
    rounded = [
        (abs(off(figures)), f"`gguf-{kind}` of {name}")
        for name, result in results["models"].items()
        for kind, figures in result["formats"].items()
        if kind != "f32"
    ]
    largest, where = max(rounded)
    missed = wide(results)
    faults = broken(results)
    allowed = f"{TOLERANCE['f32']}% for `gguf-f32` and {TOLERANCE['other']}% for the other formats"
    plain = f"does not hold for {' and '.join(missed)}; elsewhere it does" if missed else "holds everywhere"
    first = "holds" if not faults else "**does not hold**"
    told = [
        f"- Same blocks, inputs rounded alike: agreement within {allowed} {first}, the largest difference being "
        f"{largest:.2f}% ({where}). This is what says that files are written and read right.",
        f"- Same blocks, inputs left alone, which is what the methods `gguf-*` measure: the same bound {plain}.",
        *(f"- Does not agree: {line}" for line in faults),
    ]
    noises = [
        (figures["noise"], abs(off(figures)), figures["noise_largest"])
        for result in results["models"].values()
        for kind, figures in result["formats"].items()
        if figures.get("noise") is not None
    ]
    if noises:
        within = sum(difference <= noise for noise, difference, _ in noises)
        told.append(
            f"- Noise of {NOISE:g} on the inputs, relative, before they are rounded, alone moves a perplexity by up to "
            f"{max(noise for noise, _, _ in noises):.2f}% and a single token's loss by up to "
            f"{max(largest for _, _, largest in noises):.2f} nat (the largest of {DRAWS} draws stands in the tables): "
            f"it tips inputs between two codes, and layers behind amplify that. {within} of {len(noises)} differences "
            "are no larger than what it does to the same file."
            + BEYOND
            * (max(noise for noise, _, _ in noises) > TOLERANCE["other"])
        )
    return "\n".join(told)


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
                f"{figures[ALIKE]:.4f}" if ALIKE in figures else NOTHING,
                f"{off(figures):+.4f}%",
                f"{tolerance(kind)}%",
                NOTHING if figures.get("noise") is None else f"{figures['noise']:.4f}%",
                f"{figures['largest']:.4f}",
            ]
            for kind, figures in result["formats"].items()
        ]
        tokens = next(iter(result["formats"].values()))["tokens"]
        tables += [
            f"### {name}\n\n{SHOWN.get(name, 'another text')}. {tokens:,} scored tokens; "
            f"tokenizer: {result['tokenizer']}.",
            markup.table(HEADERS, rows),
        ]
    continued = [
        [item["prompt"], " ".join(item["continuation"].split()), f"{item['same']} of {GREEDY}"]
        for result in results["models"].values()
        for item in result.get("greedy", ())
    ]
    return "\n\n".join(
        [
            f"""\
llama-cpp-python {results["llama_cpp_python"]}, built from source without the processor's newest instructions (see the
environment `llamacpp` in tox.ini; `tox run -e llamacpp` builds it and makes this page again, or fails). Each model is
written by the harness in every format; llama.cpp loads the file and is fed the same token ids, window by window, as
the method `gguf-*` of the harness, which runs from the same blocks through transformers. llama.cpp also quantizes the
*activations* of a quantized product, to 8 bits in blocks of 32. The harness does not, so a second column rounds the
inputs of its products in the same way, and it is that column which must agree; how far the first is off says what
llama.cpp's rounding of activations costs. Its key-value cache is fp32, flash attention is off.

"Largest nat" is the largest difference of a single token's loss from the second column. GPT-2's is larger under
`gguf-f32`: llama.cpp looks its GELU up in a table of fp16 values.""",
            claims(results),
            "## Perplexity",
            *tables,
            "## Greedy continuations from `gguf-f32`",
            markup.table(["prompt", "continuation (ours)", "same tokens"], continued, words=(0, 1)),
        ]
    )
