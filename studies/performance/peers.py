"""The peers' environment, made once in the cache by pip, and workers in it or in ours."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.core.files import cache_dir, locked
from harness.core.values import digest
from harness.run.local import server_environment

PINS = ("torch==2.13.0", "transformers==5.23.0", "lm_eval[hf]==0.4.13", "torchao==0.18.0", "optimum-quanto==0.2.7")
OURS = ("msgspec", "platformdirs")  # that the harness's modules import there
ROOT = Path(__file__).resolve().parents[2]


def environment() -> Path:
    """The interpreter of the peers: $PEERS_PYTHON, else a virtual environment in the cache, built on first use."""
    chosen = os.environ.get("PEERS_PYTHON")
    if chosen:
        return Path(chosen)
    home = cache_dir() / "environments" / f"peers-{digest([*PINS, *OURS])[:12]}"
    python, whole = home / "bin" / "python", home / "whole"
    with locked(home.with_suffix(".lock")):
        if not whole.is_file():
            print(f"installing {', '.join(PINS)} into {home}", file=sys.stderr)
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PINS, *OURS], check=True)
            whole.touch()
    return python


class Unable(Exception):
    """A worker could not do what was asked, and says why."""


class Worker:
    """One model in a process; `ask` waits for the answer."""

    def __init__(
        self, kind: str, subject: str, folder: Path, dtype: str = "fp32", more: Mapping[str, str] | None = None
    ) -> None:
        python = Path(sys.executable) if kind == "harness" else environment()
        threads = len(os.sched_getaffinity(0))
        own = server_environment(threads) if kind == "harness" else {}  # peers as their users run them
        world = {**os.environ, **own, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        world |= more or {}
        command = [str(python), "-W", "ignore", "-m", "studies.performance.worker", kind, subject, str(folder), dtype]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=world
        )
        self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"ended with exit status {self._process.wait()}"}
        if "error" in answer:
            raise Unable(answer["error"])
        return answer["value"]

    def ask(self, do: str, **arguments: Any) -> Any:
        """One request's answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


Works = Mapping[str, tuple[Worker, Mapping[str, Any]]]  # by name: who does it, and the request


def interleaved(works: Works, repetitions: int) -> dict[str, list[float]]:
    """Seconds of every work, one after another in turns whose order alternates; one run of each before them."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(-1, repetitions):
        for name in list(works)[:: 1 if turn % 2 else -1]:
            worker, request = works[name]
            seconds = worker.ask(**request)
            if turn >= 0:
                found[name].append(seconds)
    return found


def middle(seconds: Sequence[float]) -> float:
    """The median."""
    return statistics.median(seconds)


def embedded() -> Path:
    """The plain folder of the embedded model."""
    from harness.core.options import Declared
    from harness.core.specification import parse
    from harness.inputs.models import checkpoints

    return checkpoints.materialise(parse("smollm2-135m"), Declared(Path())).directory
