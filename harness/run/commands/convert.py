"""`convert`: write a model as a GGUF file, weights, tokenizer and hyperparameters."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness.core import catalog, specification
from harness.core.errors import HarnessError, UnknownName
from harness.core.options import read_declared
from harness.inputs.models import names

PREFIX = "gguf-"


def add(subparsers: Any) -> None:
    """Declare the command."""
    parser = subparsers.add_parser("convert", help="write a model as a GGUF file")
    parser.add_argument("model", metavar="MODEL", help="a model as --models takes it")
    parser.add_argument("--to", metavar="METHOD", required=True, help="gguf-f32, gguf-f16, gguf-q8_0, ...")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, required=True, help="the file, FILE.gguf")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the file whole or not at all, and say what it holds."""
    known = [name for name in catalog.methods() if name.startswith(PREFIX)]
    if arguments.to not in known:
        raise UnknownName("GGUF format", arguments.to, known)
    output: Path = arguments.output
    if output.suffix != ".gguf":
        raise HarnessError(f"'{output}' does not end in .gguf, by which a file is known as a model: name it so")
    if not output.resolve().parent.is_dir():
        raise HarnessError(f"'{output}' cannot be written: there is no folder {output.resolve().parent}")
    _, declared = read_declared(Path.cwd())
    model = specification.parse(arguments.model)
    names.check(model, declared)
    from harness.inputs.models import checkpoints
    from harness.inputs.models.gguf_format import write as gguf_write
    from harness.inputs.models.gguf_format.file import GgufFile

    checkpoint = checkpoints.materialise(model, declared, say=lambda line: print(line, file=sys.stderr))
    with tempfile.TemporaryDirectory(dir=output.resolve().parent, prefix=".convert-") as folder:
        whole = Path(folder) / "model.gguf"
        size = gguf_write.write(checkpoint, arguments.to.removeprefix(PREFIX).upper(), whole)
        whole.replace(output)
    file = GgufFile(output)
    print(f"{output}: {size:,} bytes, {len(file.tensors)} tensors, tokenizer {file.metadata['tokenizer.ggml.model']}")
    if checkpoint.note:
        print(f"note: {checkpoint.note}")
    if file.metadata["tokenizer.ggml.model"] == "none":
        print("note: GGUF has no tokenizer of this kind; llama.cpp reads this file with token ids only")
    return 0
