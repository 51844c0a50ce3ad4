"""One model in a process of its own, asked through JSON lines: ours, or a peer's in the peers' environment.

`python worker.py KIND SUBJECT FOLDER DTYPE`: KIND is harness (SUBJECT a method), lm-eval, torchao or quanto. Each line
in is {"do": NAME, ...}, each line out {"value": ...} or {"error": ...}. Times are seconds of `perf_counter`, one run.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

PROMPT, SEED = 128, 20_251_122  # of harness/metrics/latency.py
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def plain(folder: str, dtype: str) -> Any:
    """The unquantized model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], attn_implementation="sdpa").eval()


def torchao(subject: str, folder: str, dtype: str) -> Any:
    """Int8 weights by torchao, or weights and activations; the head left alone, as ours leaves it."""
    from torchao import quantization

    configs = {
        "int8": quantization.Int8WeightOnlyConfig,
        "int8-activations": quantization.Int8DynamicActivationInt8WeightConfig,
    }
    model = plain(folder, dtype)
    quantization.quantize_(
        model,
        configs[subject](),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and "lm_head" not in name,
    )
    return model


def quanto(subject: str, folder: str, dtype: str) -> Any:
    """Int8 or int4 weights by optimum-quanto, the head left alone."""
    from optimum import quanto as library

    model = plain(folder, dtype)
    library.quantize(model, weights={"int8": library.qint8, "int4": library.qint4}[subject], exclude="lm_head")
    library.freeze(model)
    return model


def ours(subject: str, folder: str, dtype: str) -> Any:
    """A method of the harness."""
    from harness.core import catalog
    from harness.core.contracts import Checkpoint
    from harness.core.specification import parse
    from harness.methods.quantizing import arguments

    specification = parse(subject)
    method = catalog.methods()[specification.name]
    given = arguments.resolve(specification, method, "cpu")
    return method.load(Checkpoint(subject, Path(folder), ""), given, "cpu")


def shares(run: Callable[[], Any], operations: int) -> list[tuple[str, float]]:
    """The operations that a run spends itself in on this thread, and their share of its processor time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    events = sorted(seen.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [(event.key.removeprefix("aten::"), event.self_cpu_time_total / total) for event in events[:operations]]


class Bench:
    """What can be asked of a model."""

    def __init__(self, model: Any, folder: str, kind: str) -> None:
        self.model, self.folder, self.kind = model, folder, kind
        vocabulary = model.config.vocab_size
        self.ids = torch.from_numpy(np.random.default_rng(SEED).integers(0, vocabulary, (1, 512)))
        self.cache: Any = None
        self.text = ""
        self.windows: list[Any] = []
        self.language: Any = None

    def storage(self) -> int:
        """Bytes, as the harness counts them."""
        from harness.inputs.models import sizes

        return sizes.storage_bytes(self.model)

    def prefill(self, tokens: int = PROMPT) -> float:
        """A prompt into a cache, logits of its last position."""
        return timed(lambda: self.model(input_ids=self.ids[:, :tokens], use_cache=True, logits_to_keep=1))

    def decode(self, tokens: int = 1) -> float:
        """A token behind a prompt of PROMPT tokens: the mean of some in a row, behind one that is not timed."""
        if self.cache is None:
            self.cache = self.model(input_ids=self.ids[:, :PROMPT], use_cache=True, logits_to_keep=1).past_key_values
        grown = self.cache.get_seq_length() - PROMPT
        if grown:
            self.cache.crop(-grown)
        token = self.ids[:, PROMPT - 1 : PROMPT]

        def run(count: int) -> None:
            for _ in range(count):
                self.model(input_ids=token, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

        run(1)
        return timed(lambda: run(tokens)) / tokens

    def profile(self, work: str, operations: int = 7, **asked: Any) -> list[tuple[str, float]]:
        """The operations that one run of a work spends itself in, and their share of its processor time.

        What other threads run is not seen: scoring is asked for with one window at a time.
        """
        getattr(self, work)(**asked)
        return shares(lambda: getattr(self, work)(**asked), operations)

    def read(self, text: str, protocol: str) -> int:
        """Take a text file to score; its tokens."""
        self.text = Path(text).read_text(encoding="utf-8")
        if self.kind == "lm-eval":
            from lm_eval.models.huggingface import HFLM
            from transformers import AutoTokenizer

            width = int(protocol.partition(":")[2])
            tokenizer = AutoTokenizer.from_pretrained(self.folder)
            self.language = HFLM(
                pretrained=self.model, tokenizer=tokenizer, max_length=width, batch_size=1, device="cpu"
            )
            return len(self.language.tok_encode(self.text, add_special_tokens=False))
        from harness.core.contracts import Checkpoint
        from harness.core.options import Declared
        from harness.core.specification import parse
        from harness.inputs.models import checkpoints
        from harness.inputs.texts import corpora, protocols

        tokenizer = checkpoints.tokenizer(Checkpoint("", Path(self.folder), ""))
        corpus = corpora.read(parse(f"text:{text}"), Declared(Path()))
        plan = protocols.plan(corpus, protocols.parse(parse(protocol)), tokenizer, context=1 << 30, max_tokens=None)
        self.windows = list(plan.windows)
        return plan.tokens

    def score(self, batch: int = 1, beside: bool = True) -> float:
        """Seconds of the whole text's NLL: engine, or lm-eval's own rolling log likelihood."""
        if self.kind != "lm-eval":
            from harness.metrics.measuring import engine

            asked: dict[str, Any] = {"device": "cpu", "batch_size": batch, "concurrent": beside}
            return timed(lambda: engine.score(self.model, self.windows, **asked))
        from lm_eval.api.instance import Instance

        request = Instance("loglikelihood_rolling", {}, (self.text,), 0)
        return timed(lambda: self.language.loglikelihood_rolling([request], disable_tqdm=True))

    def total(self) -> float:
        """lm-eval's own answer: minus the log likelihood of the text, nats."""
        from lm_eval.api.instance import Instance

        request = Instance("loglikelihood_rolling", {}, (self.text,), 0)
        return -float(self.language.loglikelihood_rolling([request], disable_tqdm=True)[0])

    def nll(self, wide: bool = False) -> list[float]:
        """NLL of every token; of lm-eval from its windows' logits, whose softmax is in fp32, or in fp64 if wide."""
        if self.kind == "lm-eval":
            return self._nll_of_peer(torch.float64 if wide else torch.float32)
        from harness.metrics.measuring import engine

        return [float(value) for value in engine.score(self.model, self.windows, device="cpu", concurrent=True)]

    def _nll_of_peer(self, dtype: torch.dtype) -> list[float]:
        from lm_eval import utils

        tokens = self.language.tok_encode(self.text, add_special_tokens=False)
        pieces = utils.get_rolling_token_windows(
            token_list=tokens,
            prefix_token=self.language.prefix_token_id,
            max_seq_len=self.language.max_length,
            context_len=1,
        )
        found: list[float] = []
        for context, scored in map(utils.make_disjoint_window, pieces):
            fed = torch.tensor([(context + scored)[:-1]])
            logits = self.language._model_call(fed)[0, -len(scored) :].to(dtype).log_softmax(-1)
            found += (-logits.gather(1, torch.tensor(scored)[:, None])[:, 0]).tolist()
        return found

    def products(self, rows: int, scored: int, attention: bool = False) -> float:
        """The linear layers alone of one window, with the model's weights and random activations; attention's products.

        Attention's two products a layer run inside torch's fused kernel, its softmax with them.
        """
        head = self.model.get_output_embeddings()
        pairs = []
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                height = scored if module is head else rows
                pairs.append((torch.randn(height, module.in_features).to(module.weight.dtype), module.weight))

        config = self.model.config
        shape = (1, config.num_attention_heads, rows, config.hidden_size // config.num_attention_heads)
        query, key, value = (torch.randn(shape).to(pairs[0][1].dtype) for _ in range(3))

        def run() -> None:
            for x, weight in pairs:
                step = 32 * 2**20 // (4 * weight.shape[0])  # the engine's slices of the head, and one piece elsewhere
                for piece in torch.split(x, step):
                    nn.functional.linear(piece, weight)
            for _ in range(self.model.config.num_hidden_layers if attention else 0):
                nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

        return timed(run)

    def reading(self, mebibytes: int = 512) -> float:
        """Seconds that reading so much memory takes, on all threads: the sum of a tensor that no cache holds."""
        values = torch.ones(mebibytes * 2**18)
        values.sum()
        return timed(values.sum)

    def peak(self, batch: int = 1) -> int:
        """Bytes above the resident model that scoring the text needs."""
        from harness.metrics.measuring import devices, engine

        device = devices.Cpu()
        device.reset_peak()
        before = device.peak()["resident"]
        engine.score(self.model, self.windows, device="cpu", batch_size=batch, concurrent=True)
        return device.peak()["resident"] - before


def timed(work: Callable[[], object]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    kind, subject, folder, dtype = sys.argv[1:5]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    builders = {"torchao": torchao, "quanto": quanto, "harness": ours}
    try:
        model = plain(folder, dtype) if kind == "lm-eval" else builders[kind](subject, folder, dtype)
        bench = Bench(model, folder, kind)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {str(error)[:300]}"}), file=answers, flush=True)
        return
    print(json.dumps({"value": "ready"}), file=answers, flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            asked = json.loads(line)
            try:
                answer = {"value": getattr(bench, asked.pop("do"))(**asked)}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
