"""Coverage-guided fuzzing of the byte-level readers with atheris (libFuzzer): `guided.py TARGET SEEDS [FLAG...]`.

A crash is any exception but the reader's own refusal; libFuzzer bounds time and memory of a call by its flags and keeps
the input that crashed. `tox run -e fuzz` installs atheris; without it this part is left out and the page says so.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy

ROOT = Path(__file__).parents[2]
SECONDS_A_CALL, MEMORY_MIB, LONGEST = 20, 2048, 16384  # bounds of one call, and bytes of an input
LOSSES = "0" * 64  # a name that no losses hash to
EXECUTED = re.compile(r"stat::number_of_executed_units:\s*(\d+)")


def readers(folder: Path) -> dict[str, tuple[Callable[[bytes], object], bytes]]:
    """By name: what reads bytes, and sound ones to start from."""
    from harness.core import options
    from harness.core.records import Row
    from harness.inputs.models import folder as weightfiles
    from harness.inputs.models.gguf_format import file
    from harness.judge import baselines as facts
    from harness.results import losses

    baselines, made = ROOT / "baselines" / "tiny-gpt2", ROOT / "tests" / "report" / "data" / "made-session"

    def through(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
        path = folder / name

        def call(data: bytes) -> object:
            path.write_bytes(data)
            return read(path)

        return call

    def line(data: bytes) -> object:
        try:
            return Row.from_json(data.decode())
        except ValueError:
            return None  # how a line is refused

    def whole(name: str, read: Callable[[Path], object], sound: Path) -> tuple[Callable[[bytes], object], bytes]:
        return through(name, read), sound.read_bytes()

    return {
        "a measurements line": (line, (made / "measurements.jsonl").read_bytes().splitlines()[1]),
        "facts of a baseline": whole("nf4.yaml", facts.read_exact, baselines / "nf4.yaml"),
        "a GGUF file": (through("x.gguf", file.GgufFile), gguf_seed(folder / "seed.gguf")),
        "losses": whole(f"{LOSSES}.npz", lambda path: losses.load(folder, LOSSES), next(baselines.glob("nll/*.npz"))),
        "a safetensors header": (
            through("x.safetensors", lambda path: weightfiles.check_whole(path, "x")),
            safetensors.numpy.save({"a": np.zeros((2, 3), np.float32)}, {"format": "pt"}),
        ),
        "[tool.harness]": whole(
            "pyproject.toml",
            lambda path: options.read_declared(folder),
            ROOT / "docs" / "example-plugin" / "pyproject.toml",
        ),
    }


def gguf_seed(path: Path) -> bytes:
    """A small sound GGUF file."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_uint32("general.alignment", 32)
    writer.add_tensor("token_embd.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


TARGETS = (
    "a measurements line",
    "facts of a baseline",
    "a GGUF file",
    "losses",
    "a safetensors header",
    "[tool.harness]",
)


def fuzz(target: str, corpus: Path, flags: list[str]) -> None:
    """Run libFuzzer in this process; it ends it."""
    import atheris

    with atheris.instrument_imports(include=["harness"]):
        from harness.core.errors import HarnessError

        read, seed = readers(Path(tempfile.mkdtemp(dir=corpus.parent)))[target]
    (corpus / "seed").write_bytes(seed[:LONGEST])

    def once(data: bytes) -> None:
        try:
            read(data)
        except HarnessError:
            return

    atheris.Setup([sys.argv[0], str(corpus), *flags], once)
    atheris.Fuzz()


def measure(seconds: int) -> dict[str, Any]:
    """Every target for so many seconds: executions, and what crashed; {} where atheris is not installed."""
    if find_spec("atheris") is None:
        return {}
    found: dict[str, Any] = {}
    for target in TARGETS:
        with tempfile.TemporaryDirectory(prefix="harness-guided-") as name:
            (Path(name) / "corpus").mkdir()
            flags = [f"-max_total_time={seconds}", f"-timeout={SECONDS_A_CALL}", f"-rss_limit_mb={MEMORY_MIB}"]
            flags += [f"-max_len={LONGEST}", "-print_final_stats=1", f"-artifact_prefix={name}/"]
            command = [sys.executable, "-m", "studies.reliability.guided", target, str(Path(name) / "corpus"), *flags]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
            ran = EXECUTED.search(done.stderr)
            found[target] = {"executions": int(ran[1]) if ran else 0, "crashed": done.returncode != 0}
            if done.returncode:
                found[target]["told"] = done.stderr.strip()[-600:]
                print(f"{target}: {done.stderr[-3000:]}", file=sys.stderr)
    return found


if __name__ == "__main__":
    fuzz(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
