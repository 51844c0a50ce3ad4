"""Loading: peak memory and time of quantizing random checkpoints of public models' true shapes, made on the spot."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.core.files import cache_dir
from harness.report import markup
from harness.run.local import server_environment
from studies import pages
from studies.performance.engine import kept
from studies.performance.peers import ROOT

METHODS = {
    "olmo-1b": ("absmax-int8:dtype=bf16", "linear-int4:dtype=bf16", "bnb-int8:dtype=bf16", "bnb-nf4:dtype=bf16"),
    "phi-3-mini": ("absmax-int8:dtype=bf16", "linear-int4:dtype=bf16", "bnb-int8:dtype=bf16"),
}
SHARD_BYTES = 2 * 10**9
DEVIATION = 0.02  # of the random weights: that of the models' initialisation
WEIGHT, REPETITIONS = (8192, 2048), 9  # quantized apart from a load
PAGE = 4096  # bytes
READING = "reading"  # in place of a method


def make(model: str, folder: Path) -> int:
    """Write a checkpoint of random bf16 weights, shard by shard; its bytes. Tensors repeat one block of numbers."""
    import torch
    from safetensors.torch import save_file

    from harness.inputs.models import checkpoints
    from harness.inputs.models.names import config_of

    config = config_of(model)
    whole = checkpoints.sketch_model(config, "bf16").state_dict(keep_vars=True)
    unique = {id(tensor): (name, tensor) for name, tensor in reversed(list(whole.items()))}  # a tied tensor once
    state = dict(reversed(list(unique.values())))
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    block = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).mul_(DEVIATION).bfloat16()
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in state.items():
        if filled and filled + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    files: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        filling = {name: block.repeat(-(-state[name].numel() // len(block)))[: state[name].numel()] for name in names}
        save_file({name: filling[name].view(state[name].shape).contiguous() for name in names}, folder / file)
        files |= dict.fromkeys(names, file)
    total: int = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def ours(method: str) -> bool:
    return not method.startswith("bnb")


def forget(folder: Path) -> None:
    """Drop the files from the page cache, so that they come from the disk."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(folder: Path) -> float:
    """Reading the files' bytes once, into one buffer."""
    room = bytearray(1 << 24)
    start = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(room):
                pass
    return time.perf_counter() - start


def parts(model: Any, storage: int) -> dict[str, Any]:
    """What a load is made of, apart: ns to quantize a weight that lies in memory, s to touch memory as new as ours."""
    import torch

    from harness.methods.quantizing import encode, stored

    stores = (stored.store_of(module) for module in model.modules())
    recipe = next(store.recipe for store in stores if store is not None)
    rows = torch.randn(*WEIGHT).mul_(DEVIATION).bfloat16()

    def once() -> float:
        start = time.perf_counter()
        encode.quantize(recipe, rows, torch.bfloat16)
        return time.perf_counter() - start

    threads, found = torch.get_num_threads(), []
    for count in (1, threads):
        torch.set_num_threads(count)
        found.append(1e9 * statistics.median(once() for _ in range(REPETITIONS)) / rows.numel())
    start = time.perf_counter()
    torch.empty(storage, dtype=torch.uint8)[::PAGE] = 1
    return {"alone": found[0], "together": found[1], "memory": time.perf_counter() - start}


def load(method: str, folder: str) -> dict[str, Any]:
    """In a process of its own: load once; seconds, peak over what was resident, storage, the largest tensor.

    READING only reads the files, behind the same imports: a host that takes free memory back lends it anew to both.
    """
    from harness.core import catalog
    from harness.core.contracts import Checkpoint
    from harness.core.specification import parse
    from harness.inputs.models import checkpoints, sizes
    from harness.methods.quantizing import arguments, int8
    from harness.metrics.measuring import devices

    checkpoint = Checkpoint(method, Path(folder), "")
    shapes = checkpoints.sketch_model(checkpoints.read_config(checkpoint), "bf16").state_dict().values()
    int8.preload()  # as every group's process finds it done
    if method == READING:
        return {"seconds": read_seconds(Path(folder))}
    specification, device = parse(method), devices.Cpu()
    known = catalog.methods()[specification.name]
    given = arguments.resolve(specification, known, "cpu")
    device.reset_peak()
    before, start = device.peak()["resident"], time.perf_counter()
    model = known.load(checkpoint, given, "cpu")
    seconds = time.perf_counter() - start
    peak, storage = device.peak()["resident"], sizes.storage_bytes(model)
    largest = max(tensor.nbytes for tensor in shapes)
    found = {"seconds": seconds, "peak": peak - before, "process": peak, "storage": storage, "largest": largest}
    quantized = ours(method) and known.bits < 16  # a reference only casts
    return found | ({"parts": parts(model, storage)} if quantized else {})


def loaded(method: str, home: str) -> dict[str, Any]:
    """`load` in a process of its own, set up as a group's is."""
    world = {**os.environ, **server_environment(len(os.sched_getaffinity(0)))}
    command = [sys.executable, "-W", "ignore", "-m", "studies.performance.loading", "--load", method, home]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=world)
    if done.returncode:
        return {"failed": (done.stderr.strip() or f"ended with exit status {done.returncode}")[-300:]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(models: Sequence[str]) -> dict[str, Any]:
    """Every method on every model."""
    return {"loading": {model: measured(model) for model in models or METHODS}}


def measured(model: str) -> list[dict[str, Any]]:
    """Every method on one model; the checkpoint is deleted afterwards."""
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=cache_dir()) as home:
        size = make(model, Path(home))
        for method in METHODS[model]:
            forget(Path(home))
            reading = {name: loaded(READING, home)["seconds"] for name in ("cold", "cached")}
            forget(Path(home))
            row = loaded(method, home)
            found.append({"model": model, "method": method, "file": size, "reading": reading, **row})
            if "failed" not in row and ours(method):
                again = loaded(method, home)
                found[-1] |= {"cached": again["seconds"], "parts": again["parts"]}
    return found


def render(results: Mapping[str, Any]) -> str:
    """The table."""
    rows, failed = [], ""
    for one in [one for found in results["loading"].values() for one in found]:
        if "failed" in one:
            failed += f"\n- {one['model']} under `{one['method']}` failed: {markup.escape(one['failed'])}"
            continue
        room, times = 1.25 * one["storage"] + one["largest"], one["seconds"] / one["reading"]["cold"]
        own = ours(one["method"])
        rows.append(
            [
                one["model"],
                f"`{one['method']}`",
                *(f"{one[name] / 2**30:.2f}" for name in ("file", "storage", "peak", "process")),
                f"{room / 2**30:.2f}" + (f": {kept(one['peak'] <= room)}" if own else ""),
                f"{one['seconds']:.1f}, {one['reading']['cold']:.1f}",
                f"{times:.1f}" + (f" (at most 2: {kept(times <= 2)})" if own else ""),
                f"{one['cached']:.1f}, {one['reading']['cached']:.1f}: {one['cached'] / one['reading']['cached']:.1f}"
                if own
                else "",
            ]
        )
    shown = [
        f"- `{one['method']}`, {one['model']}: {one['parts']['alone']:.2f} ns a weight by one thread, "
        f"{one['parts']['together']:.2f} by all; touching as much new memory as the model takes "
        f"{one['parts']['memory']:.1f} s, of the load's {one['cached']:.1f} s from the page cache"
        for found in results["loading"].values()
        for one in found
        if "parts" in one
    ]
    where = "\n\nWhat a load from the page cache is made of:\n\n" + "\n".join(shown) if shown else ""
    head = [
        "model", "method", "file GiB", "storage after", "peak over start", "peak of the process",
        "allowed: 1.25 storage + largest", "from disk: load, reading s", "load / reading",
        "from the page cache: load, reading s, ratio",
    ]  # fmt: skip
    return (
        "## Loading\n\nRandom bf16 weights in the models' true shapes, written on the spot and deleted. The file is "
        "read and loaded from the disk, its pages dropped from the cache before, and once more from the cache, where "
        "reading is a copy in memory and nothing that computes can keep up. Each load, and each reading, in a process "
        "of its own behind the same imports; ours stream, bitsandbytes goes through transformers with a device map. "
        "Ours asks the system for the next tensors while it quantizes one.\n\n"
        f"{markup.table(head, rows)}\n{failed}{where}"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load"]:
        print(json.dumps(load(*sys.argv[2:4])))
        raise SystemExit(0)
    raise SystemExit(
        pages.run(
            pages.Document("loading", "Peak memory and time of loading", measure, render, script="performance.loading")
        )
    )
