"""docs/studies/gguf.md: what GGML and GGUF are, with the block formats' sizes and the embedded file's contents."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.report import markup
from studies import pages

SHOWN = {  # formats that models are shared in, and what a block of each holds
    "F16": "plain half precision",
    "Q8_0": "int8 codes, one fp16 step",
    "Q6_K": "6-bit codes, int8 steps for 16 weights each, an fp16 step over them",
    "Q5_1": "5-bit codes, fp16 step and minimum",
    "Q5_0": "5-bit codes, one fp16 step",
    "Q5_K": "5-bit codes, 6-bit steps and minima for 32 weights each, two fp16 figures over them",
    "Q4_1": "4-bit codes, fp16 step and minimum",
    "Q4_0": "4-bit codes, one fp16 step",
    "Q4_K": "4-bit codes, 6-bit steps and minima for 32 weights each, two fp16 figures over them",
    "IQ4_NL": "4-bit codes into a fixed table of unequal steps, one fp16 scale",
    "Q3_K": "3-bit codes, 6-bit steps for 16 weights each, an fp16 step over them",
    "Q2_K": "2-bit codes, 4-bit steps and minima for 16 weights each, two fp16 figures over them",
}
WHAT = """\
## What they are

**GGML** is a C library of tensor operations with its own quantized block formats, and kernels for CPUs and several
kinds of GPU that multiply with blocks as they lie. It is what llama.cpp runs on. (It is also the name of an older file
format of that project, which current programs no longer read.)

**GGUF** is the file format that replaced it: one file with everything that running a model takes. Behind a header come
typed key-value pairs (architecture, dimensions, rotary base, the whole tokenizer, often a chat template), then a list
of tensors with name, shape, block format and offset, then their data, aligned so that a program can map the file into
memory and start without copying or unpacking it. Block formats are chosen tensor by tensor: a file called *Q4_K_M*
mixes several, and its name says which recipe made it, not how many bits each weight takes.

GGUF is therefore not a quantization method. It stores weights as they were rounded; how they were rounded (to
nearest, or weighted by an importance matrix from calibration text) is the converter's affair, and seldom written in
the file."""
WHEN = """\
## When to deploy with them

- **On a CPU, an Apple chip or a small GPU**, above all at batch 1: decoding is bound by reading weights, and kernels
  that read 4-bit blocks save that time. A weight-only method that unpacks to floats before every product does not
  (control `dequantize-every-call` in [pitfalls.md](pitfalls.md)).
- **To ship one file** that any llama.cpp-based program opens, without Python.
- **To split a model** between host memory and a card, layer by layer.

Rather something else: for many requests at once on data-centre cards (serving engines with GPTQ, AWQ or FP8 kernels
batch better), for training or adapters on top (bitsandbytes), and wherever transformers must run the model as it is.
transformers reads GGUF, but in most set-ups unpacks it to floats when it loads: the file is small and the model is not.

## What to watch when measuring

- A GGUF file is a *quantized* model. Unpacked, its weights lie on the grid they were rounded to, and a second method on
  the same grid looks lossless. The embedded model of this repository is such a file, which its caveat says wherever it
  is measured, and [nf4.md](nf4.md) shows it.
- llama.cpp's perplexity scores the second half of each window only (`half:W` here): not to be compared with others.
- A file and a checkpoint of one name may differ in tokenizer details, and in whether a BOS is added.

Perplexity is not on this page: [llamacpp.md](llamacpp.md) has it for seven formats, from the harness's methods `gguf-*`
and from llama.cpp on the same files. `pytest --methods gguf-q4_0,gguf-q8_0` measures them on any model; its times are
those of blocks unpacked by torch before each product, not of llama.cpp's kernels."""


def measure(models: Sequence[str]) -> dict[str, Any]:
    """Sizes of the block formats, and the tensors of the embedded file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    from harness.core.options import Declared
    from harness.core.specification import parse
    from harness.inputs.models import names
    from harness.inputs.models.gguf_format.file import GgufFile

    path = names.locate(parse("smollm2-135m"), Declared(Path())).path
    tensors = GgufFile(path).tensors.values()
    counts, weights, held = Counter[str](), Counter[str](), Counter[str]()
    for tensor in tensors:
        counts[tensor.kind] += 1
        held[tensor.kind] += tensor.data.nbytes
        size = 1
        for length in tensor.shape:
            size *= length
        weights[tensor.kind] += size
    sizes = {kind.name: list(size) for kind, size in GGML_QUANT_SIZES.items()}
    assert sizes.keys() <= {kind.name for kind in GGMLQuantizationType}
    return {
        "formats": {name: {"block": sizes[name][0], "bytes": sizes[name][1]} for name in SHOWN},
        "file": path.name,
        "file_bytes": path.stat().st_size,
        "tensors": {kind: {"count": counts[kind], "weights": weights[kind], "bytes": held[kind]} for kind in counts},
    }


def render(results: Mapping[str, Any]) -> str:
    """The page."""
    formats = [
        [f"`{name}`", str(size["block"]), str(size["bytes"]), f"{8 * size['bytes'] / size['block']:.4g}", SHOWN[name]]
        for name, size in results["formats"].items()
    ]
    tensors = [
        [
            f"`{kind}`",
            f"{facts['count']:,}",
            f"{facts['weights']:,}",
            f"{facts['bytes']:,}",
            f"{8 * facts['bytes'] / facts['weights']:.4g}",
        ]
        for kind, facts in results["tensors"].items()
    ]
    in_tensors = sum(facts["bytes"] for facts in results["tensors"].values())
    about = (
        f"The embedded file `{results['file']}` has {results['file_bytes']:,} bytes, of which {in_tensors:,} are "
        "tensors; the rest is metadata, most of it the tokenizer:"
    )
    return "\n\n".join(
        [
            WHAT,
            "## Block formats\n\nBits count everything in a block:",
            markup.table(["format", "weights a block", "bytes", "bits a weight", "a block holds"], formats),
            about,
            markup.table(["format", "tensors", "weights", "bytes", "bits a weight"], tensors, words=(0,)),
            WHEN,
        ]
    )


DOCUMENT = pages.Document("gguf", "GGML and GGUF", measure, render, script="quantizers.gguf_formats")

if __name__ == "__main__":
    sys.exit(pages.run(DOCUMENT))
