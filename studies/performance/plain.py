"""Times a model as the documentation of transformers and bitsandbytes shows it, with nothing of the harness.

`python plain.py FOLDER METHOD REPETITIONS [generate | load]` prints JSON: seconds of each repetition and bytes of
the peaks.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

folder, method, repetitions, *more = sys.argv[1:]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CONFIGS = {
    "bnb-int8": BitsAndBytesConfig(load_in_8bit=True),
    "bnb-nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


def seconds(
    work: Callable[[], object], prepare: Callable[[], object] = lambda: None, count: int = int(repetitions)
) -> list[float]:
    """Two runs that do not count, then the others."""
    taken = []
    for _ in range(count + 2):
        prepare()
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return taken[2:]


def peak() -> int:
    """The highest resident memory, bytes; the mark is set back."""
    kilobytes = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return int(kilobytes.split()[1]) * 1024


def load() -> Any:
    """As the documentation shows it."""
    options = {"quantization_config": CONFIGS[method], "device_map": "cpu"} if method in CONFIGS else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES.get(method, torch.float32), **options).eval()


peak()
model = load()
found: dict[str, object] = {"load_peak": peak()}
if more != ["load"]:
    ids = torch.randint(0, model.config.vocab_size, (1, 128), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model(torch.arange(512)[None], use_cache=False)
        found["run_peak"] = peak()
        found["prefill"] = seconds(lambda: model(ids, use_cache=True, logits_to_keep=1))
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        step = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        found["decode"] = seconds(
            lambda: model(ids[:, -1:], **step), lambda: cache.get_seq_length() > 128 and cache.crop(-1)
        )
        if more:
            asked = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
            found["generate"] = seconds(lambda: model.generate(ids[:, :32], **asked), count=3)
start = time.perf_counter()
model = load()  # the first one also imported the architecture's and the library's modules
found["load"] = time.perf_counter() - start
print(json.dumps(found))
