"""A reference that is another model: how it is named, what is planned, and that every paired figure is against it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import harness
from harness.core.contracts import TokenPlan, Window
from harness.core.errors import HarnessError, UnknownName
from harness.core.options import Declared, Options
from harness.core.records import Row, Verdict
from harness.core.specification import Specification, parse_method, parse_reference
from harness.inputs.models.names import TINY_HOME
from harness.judge.verdicts import command
from harness.run import plan as planning
from harness.run.group import unlike

BASE = TINY_HOME / "gpt2"


@pytest.mark.parametrize(
    ("text", "name", "model", "canonical"),
    [
        ("bf16", "bf16", "", "bf16"),
        ("nf4:block=64", "nf4", "", "nf4:block=64"),
        ("path:/a=b/c:d", "fp32", "path:/a=b/c:d", "fp32=path:/a=b/c:d"),
        ("bf16=hub:org/name@main", "bf16", "hub:org/name@main", "bf16=hub:org/name@main"),
        ("bf16=gpt2", "bf16", "gpt2", "bf16=gpt2"),
    ],
)
def test_a_reference_reads_as_written(text: str, name: str, model: str, canonical: str) -> None:
    found = parse_reference(text)
    assert (found.name, found.model, str(found)) == (name, model, canonical)
    assert parse_method(canonical) == found


def options(folder: Path, **more: Any) -> Options:
    told: dict[str, Any] = {"models": (parse_method("tiny-olmo"),), "metrics": ("perplexity.delta", "memory.storage")}
    return replace(Options(Declared(folder)), **{**told, **more})


def test_the_model_as_it_is_is_planned_beside_another_and_no_own_reference(tmp_path: Path) -> None:
    for asked in ("tiny-gpt2", "fp32=tiny-gpt2"):  # a known name is no method
        cases = planning.plan(options(tmp_path, reference=parse_reference(asked)), cuda_visible=False)
        assert {case.reference for case in cases} == {"fp32=tiny-gpt2"}
        assert [(case.method, case.metric) for case in cases] == [
            ("fp32=tiny-gpt2", "memory.storage"),
            ("fp32", "memory.storage"),
            ("fp32", "perplexity.delta"),
        ]
        assert planning.models_of(cases) == ["tiny-olmo", "tiny-gpt2"]
    named = options(tmp_path, reference=parse_reference("bf16=tiny-gpt2"), methods=(Specification("nf4"),))
    assert {case.method for case in planning.plan(named, cuda_visible=False)} == {"bf16=tiny-gpt2", "nf4"}
    assert {case.reference for case in planning.invariant_plan(named, cuda_visible=False)} == {"bf16"}
    with pytest.raises(UnknownName, match="unknown method 'gtp2'"):
        planning.plan(options(tmp_path, reference=parse_reference("gtp2")), cuda_visible=False)


def test_other_digests_of_one_tokenizer_are_no_other_tokens() -> None:
    """As a GGUF file's beside the one that it was made from: the ids and windows count, not the words of a protocol."""

    def windows(*spans: tuple[int, int]) -> tuple[Window, ...]:
        return tuple(Window(np.arange(*span), 1) for span in spans)

    plan = TokenPlan("chunk:4", "tokenizer a", "h" * 64, 8, windows((0, 4), (4, 8)), "token")
    assert unlike(plan, replace(plan, protocol_id="tokenizer b")) == ""
    assert unlike(plan, replace(plan, token_hash="g" * 64)) == "tokens"
    for cut in (windows((0, 8)), windows((0, 4), (4, 7)), windows((0, 4))):
        assert unlike(plan, replace(plan, windows=cut)) == unlike(replace(plan, windows=cut), plan) == "windows"


def test_the_command_of_its_row_plans_it_again(tmp_path: Path) -> None:
    first = planning.plan(options(tmp_path, reference=parse_reference("path:base")), cuda_visible=False)[0]
    words = command(Row.of(first)).split()
    assert words[words.index("--harness-methods") + 1] == "fp32"
    assert words[words.index("--harness-reference") + 1] == "fp32=path:base"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, the smaller half of each matrix's weights zero."""
    folder = shutil.copytree(BASE, tmp_path_factory.mktemp("made") / "pruned")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and ("attn" in name or "mlp" in name):
            tensors[name] = torch.where(tensor.abs() < tensor.abs().float().median(), 0.0, tensor).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


Measure = Callable[..., dict[tuple[str, str], Row]]


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measure:
    monkeypatch.chdir(tmp_path)

    def rows(models: Path, metrics: str, folder: str = "report", **more: Any) -> dict[tuple[str, str], Row]:
        usual: dict[str, Any] = {"datasets": "synthetic", "protocols": "chunk:64", "max_tokens": 1024, "repetitions": 6}
        usual |= {"device": "cpu", "report_dir": folder}
        found = harness.measure(f"path:{models}", metrics=metrics, **{**usual, **more})
        return {(row.method, row.metric): row for row in found}

    return rows


def test_every_paired_figure_is_against_the_other_model(measured: Measure, pruned: Path, tmp_path: Path) -> None:
    metrics = "perplexity,divergence.kl,memory.storage,latency.prefill"
    base = f"fp32=path:{BASE}"
    found = measured(pruned, metrics, reference=f"path:{BASE}")
    assert [row.reason for row in found.values() if row.value is None] == []
    own, theirs = (
        found["fp32", "perplexity"],
        measured(BASE, "perplexity", "alone", methods="fp32")["fp32", "perplexity"],
    )
    assert found[base, "perplexity"].value == theirs.value
    assert (found[base, "perplexity"].nll, found[base, "perplexity"].identity) == (theirs.nll, theirs.identity)
    delta = found["fp32", "perplexity.delta"]
    assert own.value is not None
    assert theirs.value is not None
    assert delta.value == pytest.approx(math.log(own.value / theirs.value), abs=1e-6)
    assert own.value > 1.01 * theirs.value
    assert (delta.reference, delta.verdict) == (base, Verdict.UNRECORDED)
    assert delta.detail["reference_identity"] == theirs.identity
    kl, prefill = found["fp32", "divergence.kl"], found["fp32", "latency.prefill"]
    assert kl.value is not None
    assert kl.value > 0.01
    assert "log_ratio" in prefill.detail
    assert found["fp32", "memory.storage"].value == found[base, "memory.storage"].value
    assert "(reference)" in (tmp_path / "report" / "report.md").read_text()
    again = measured(pruned, metrics, reference=f"path:{BASE}", resume=True)
    assert all(again[name].seconds == row.seconds for name, row in found.items() if "latency" not in name[1])


def test_another_tokenizer_and_another_vocabulary_are_one_line(measured: Measure, pruned: Path, tmp_path: Path) -> None:
    other = shutil.copytree(BASE, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    first, second = list(words)[:2]
    words[first], words[second] = words[second], words[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(HarnessError, match=r"pruned and its reference path:.*other read other tokens of synthetic"):
        measured(pruned, "perplexity", reference=f"path:{other}")
    wider = shutil.copytree(BASE, tmp_path / "wider")  # eight rows that no token names, as padding to a multiple does
    tensors = load_file(wider / "model.safetensors")
    name = next(name for name in tensors if name.endswith("wte.weight"))
    tensors[name] = torch.cat([tensors[name], torch.zeros(8, tensors[name].shape[1], dtype=tensors[name].dtype)])
    save_file(tensors, wider / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((wider / "config.json").read_text())
    (wider / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 8}))
    found = measured(pruned, "perplexity.delta,divergence.kl", reference=f"path:{wider}")
    assert found["fp32", "perplexity.delta"].value is not None
    told = found["fp32", "divergence.kl"]
    assert told.value is None
    assert f"sets 64 logits of path:{pruned} against 72 of path:{wider}: give both one vocabulary" in told.reason
