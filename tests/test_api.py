"""The public names: which there are, that they are light and described, and that they measure as pytest does."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import harness
from harness import HarnessError, Row, Verdict
from harness.core.options import SETTINGS, Declared
from harness.core.specification import Specification
from harness.inputs.models import checkpoints
from harness.methods import absmax_int8
from harness.methods.quantizing import stored
from harness.methods.quantizing.codes import Recipe
from harness.metrics.measuring import devices
from harness.results.directory import ReportDirectory
from harness.run import live
from harness.run.measure import PER_SESSION, options_of

pytest_plugins = ("pytester",)

DATA = Path(__file__).parent / "report" / "data" / "made-session"
PUBLIC = """
measure plan Options read_report compare render Case Row Figure Verdict Method Parameter Arguments Checkpoint
QuantizedWeight weight_method reference_method layer_method Metric Member Subject Window TokenPlan HarnessError
__version__
""".split()
TEXT: dict[str, Any] = {"datasets": "synthetic", "protocols": "chunk:64", "max_tokens": 1024}
# what a docstring must speak of, with the fields and arguments that it names
SPOKEN = {
    "measure": "HarnessError list[Row] (1, L) logits report_dir tokenizer reference",
    "plan": "HarnessError",
    "compare": "HarnessError worse status",
    "render": "Markdown",
    "read_report": "HarnessError rows planned environments",
    "weight_method": "(out, in) fp32 bits quantize dequantize",
    "layer_method": "(out, in) bits replace tensors read",
    "Window": "(L,) int64",
    "Figure": "unit interval",
    "Row": "value reason",
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of nobody's, so that no pyproject.toml and no baselines are around."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def checkpoint() -> Any:
    return checkpoints.materialise(Specification("tiny-gpt2"), Declared(Path()))


@pytest.fixture
def module(checkpoint: Any) -> nn.Module:
    return checkpoints.open_model(checkpoint, "fp32", "cpu")


class Int8(nn.Module):
    """A caller's own quantizer: (in, out) weights of a Conv1D as codes, a scale a column."""

    def __init__(self, layer: Conv1D) -> None:
        super().__init__()
        scale = layer.weight.abs().amax(dim=0) / 127
        self.register_buffer("codes", (layer.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        codes: Any = self.codes
        weight: Tensor = codes.float() * self.scale  # (in, out)
        product: Tensor = x @ weight
        return torch.add(product, self.bias)


def quantized(module: nn.Module) -> nn.Module:
    for name, layer in list(module.named_modules()):
        if isinstance(layer, Conv1D):
            module.set_submodule(name, Int8(layer))
    return module


# the names


def test_the_public_names_are_these_and_no_others() -> None:
    assert sorted(harness.__all__) == sorted(PUBLIC) == dir(harness)
    assert all(getattr(harness, name) is not None for name in PUBLIC)
    with pytest.raises(AttributeError, match="has no attribute 'Session'"):
        _ = harness.Session


def test_a_name_of_the_star_import_is_each_of_them() -> None:
    space: dict[str, Any] = {}
    exec("from harness import *", space)
    assert set(PUBLIC) <= space.keys()


@pytest.mark.parametrize("name", sorted(set(PUBLIC) - {"__version__"}))
def test_every_name_is_described(name: str) -> None:
    value = getattr(harness, name)
    text = inspect.getdoc(value) or ""
    generated = f"{name}("  # what dataclasses write where nobody does
    assert len(text) > 20
    assert not text.startswith(generated)
    for word in SPOKEN.get(name, "").split():
        assert word in f"{text} {inspect.signature(value)}", f"{name} says nothing of {word}"


def test_importing_and_reading_load_no_torch() -> None:
    program = """
import sys, harness
heavy = {"torch", "transformers", "numpy", "matplotlib", "pytest"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
report = harness.read_report(sys.argv[1])
assert harness.render(report).startswith("# Quantization report")
assert harness.render(harness.compare(report, sys.argv[1])).startswith("# A against B")
assert harness.Method and harness.weight_method and harness.plan(models="tiny-gpt2", methods="nf4", device="cpu")
assert not {"torch", "transformers", "matplotlib", "pytest"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program, str(DATA)], check=True)


def test_the_options_are_those_of_the_command_line() -> None:
    names = [setting.name for setting in SETTINGS if setting.name not in PER_SESSION]
    for call in (harness.measure, harness.plan):
        assert set(names) <= set(inspect.signature(call).parameters)
        for setting in SETTINGS:
            assert setting.name in PER_SESSION or f"    {setting.name}: {setting.help}" in str(call.__doc__)


# the plan


def test_a_plan_is_pytests_plan(project: Path) -> None:
    cases = harness.plan(models="tiny-gpt2", methods=["nf4"], metrics="perplexity", device="cpu", **TEXT)
    assert [case.id for case in cases] == [
        "tiny-gpt2/fp32/synthetic/chunk:64/perplexity/cpu",
        "tiny-gpt2/nf4/synthetic/chunk:64/perplexity/cpu",
        "tiny-gpt2/nf4/synthetic/chunk:64/perplexity.delta/cpu",
    ]
    assert len(harness.plan(models="tiny-gpt2", methods="nf4", metrics="perplexity", shard="2/2", **TEXT)) < 3
    behaviour = harness.plan(methods="nf4", metrics="invariant,memory", models="tiny-gpt2", device="cpu")
    assert {case.family for case in behaviour} == {"invariant", "memory"}


def test_values_are_texts_numbers_or_lists(project: Path) -> None:
    options = options_of({"models": ["gpt2", "tiny-olmo"], "max_tokens": 512, "batch_size": "auto", "resume": True})
    assert (list(map(str, options.models)), options.max_tokens) == (["gpt2", "tiny-olmo"], 512)
    assert (options.batch_size, options.resume) == (0, True)
    assert options.baselines == project / "baselines"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"model": "gpt2"}, "unknown option 'model'; did you mean 'models'?"),
        ({"max_tokens": "many"}, "max_tokens='many': 'many' is no whole number above zero"),
        ({"device": ["cpu", "cuda"]}, "is no device"),
        ({"methods": "nf5"}, "unknown method 'nf5'; did you mean 'nf4'?"),
        ({"models": "nobody"}, "unknown model 'nobody'"),
        ({"require_baselines": True}, "unknown option 'require_baselines'"),
    ],
)
def test_mistakes_are_one_line(project: Path, given: dict[str, Any], told: str) -> None:
    for call in (harness.plan, harness.measure):
        with pytest.raises(HarnessError, match=r"^[^\n]+$") as caught:
            call(**given)
        assert told in str(caught.value)


def test_a_damaged_baseline_is_said_before_anything_is_measured(project: Path) -> None:
    (project / "baselines").mkdir()
    (project / "baselines" / "bounds.toml").write_text("schema = 1\n[[nonsense]]\n")
    with pytest.raises(HarnessError, match="nonsense"):
        harness.measure("tiny-gpt2", methods="nf4")


def test_the_projects_own_declarations_hold(project: Path) -> None:
    (project / "pyproject.toml").write_text('[tool.harness.options]\nmethods = "nf4"\nmetrics = "memory.storage"\n')
    assert {case.method for case in harness.plan(models="tiny-gpt2")} == {"fp32", "nf4"}


# named models


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], Path]:
    folder = tmp_path_factory.mktemp("measured") / "report"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder.parent)
        chosen: dict[str, Any] = {
            "models": "tiny-gpt2",
            "methods": "absmax-int8",
            "metrics": "perplexity,memory.storage",
        }
        return harness.measure(**chosen, report_dir=folder, **TEXT), folder


def test_measured_rows_are_those_of_the_report(measured: tuple[list[Row], Path]) -> None:
    rows, folder = measured
    assert [(row.method, row.metric) for row in rows] == [
        ("fp32", "memory.storage"),
        ("fp32", "perplexity"),
        ("absmax-int8", "memory.storage"),
        ("absmax-int8", "perplexity"),
        ("absmax-int8", "perplexity.delta"),
    ]
    assert all(row.value is not None and row.environment for row in rows)
    kept = harness.read_report(folder)
    assert list(kept.rows) == rows
    assert list(kept.planned) == [row.case for row in rows]
    assert rows[0].environment in kept.environments
    assert (folder / "report.md").is_file()
    assert list(folder.glob("*.svg"))


def test_they_are_judged(measured: tuple[list[Row], Path]) -> None:
    rows, _ = measured
    storage, delta = rows[2], rows[-1]
    assert storage.verdict_reference is Verdict.WITHIN_BOUND
    assert storage.detail["predicted_equal"]
    assert delta.verdict_reference is Verdict.WITHIN_BOUND
    assert delta.verdict is Verdict.UNRECORDED


def test_rows_of_this_process_are_compared_token_by_token(measured: tuple[list[Row], Path]) -> None:
    rows, folder = measured
    moved = [replace(row, nll=row.detail["reference_nll"]) if row.metric == "perplexity.delta" else row for row in rows]
    found = harness.compare(rows, moved)
    assert found.paired == 1
    assert harness.compare(folder, rows).status == 0
    assert "| `absmax-int8` |" in harness.render(found)


def test_rows_render_without_a_directory(measured: tuple[list[Row], Path]) -> None:
    rows, folder = measured
    text = harness.render(rows)
    assert rows[0].environment in text
    assert ".svg" not in text
    assert harness.render(folder).count("\n## ") == text.count("\n## ")
    with pytest.raises(HarnessError, match="a str is no row"):
        harness.render(["harness-report"])  # type: ignore[list-item]


def test_a_case_that_cannot_be_measured_is_a_row(project: Path) -> None:
    (project / "broken.py").write_text(
        "import dataclasses\nfrom harness import reference_method\n"
        "def load(*given):\n    raise KeyError('a bug')\n"
        "FP32 = reference_method(name='fp32', summary='it breaks', bits=32)\n"
        "METHOD = dataclasses.replace(FP32, name='broken', load=load)\n"
    )
    (project / "pyproject.toml").write_text('[tool.harness]\nmethods = ["broken.py"]\n')
    with pytest.warns(RuntimeWarning, match="KeyError: 'a bug'"):
        rows = harness.measure("tiny-gpt2", methods="broken", metrics="memory.storage")
    assert [row.verdict for row in rows] == [Verdict.UNRECORDED, Verdict.MISSING]
    assert "a bug" in rows[1].reason
    assert not (project / "harness-report").exists()  # what nobody asked for is temporary


def test_a_script_needs_no_guard(project: Path) -> None:
    script = project / "script.py"
    script.write_text(
        "import harness\nrows = harness.measure('tiny-gpt2', methods='nf4', metrics='memory.storage')\n"
        "print(len(rows), 'torch' in __import__('sys').modules)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"


def test_a_directory_that_is_written_is_refused(measured: tuple[list[Row], Path]) -> None:
    _, folder = measured
    directory = ReportDirectory(folder)
    directory.own()
    with pytest.raises(HarnessError, match="another session writes"):
        harness.measure("tiny-gpt2", methods="nf4", metrics="memory.storage", report_dir=folder)
    directory.release()


def test_a_call_that_measures_nothing_leaves_the_earlier_report(measured: tuple[list[Row], Path]) -> None:
    _, folder = measured
    before = (folder / "measurements.jsonl").read_bytes()
    with pytest.raises(HarnessError, match="nothing to measure"):
        harness.measure("tiny-gpt2", methods="fp32", metrics="divergence", report_dir=folder, **TEXT)
    assert (folder / "measurements.jsonl").read_bytes() == before


# live modules


def test_a_live_module_is_measured_as_a_checkpoint_is(project: Path, checkpoint: Any, module: nn.Module) -> None:
    """The same figures as the method of the same arithmetic has in processes of its own."""
    chosen: dict[str, Any] = {
        "metrics": "perplexity,divergence.kl,memory.storage,latency.decode",
        "repetitions": 2,
        **TEXT,
    }
    mine = quantized(checkpoints.open_model(checkpoint, "fp32", "cpu")).train()
    tokenizer = checkpoints.tokenizer(checkpoint)
    measured = harness.measure({"mine": mine}, tokenizer, reference=module, **chosen)
    rows = {(row.method, row.metric): row for row in measured}
    assert mine.training
    stored = harness.measure(
        "tiny-gpt2", methods="absmax-int8", metrics="perplexity,divergence.kl,memory.storage", **TEXT
    )
    for row in stored:
        here = rows["reference" if row.method == "fp32" else "mine", row.metric]
        tolerance: dict[str, Any] = {"rel": 1e-4, "abs": 1e-6} if row.dataset else {"rel": 0.05}
        assert here.value == pytest.approx(row.value, **tolerance), row.metric
        assert (here.unit, here.token_hash, here.protocol_id) == (row.unit, row.token_hash, row.protocol_id)
    delta = rows["mine", "perplexity.delta"]
    assert delta.interval is not None
    assert delta.bits_per_weight == pytest.approx(8.2, abs=0.1)
    assert delta.census["quantized_modules"] == 8
    assert rows["mine", "latency.decode"].detail["log_ratio"] is not None
    assert rows["reference", "memory.storage"].bits_per_weight == 32
    assert "predicted" not in rows["mine", "memory.storage"].detail


def test_two_live_versions_are_compared_token_by_token(project: Path, checkpoint: Any, module: nn.Module) -> None:
    tokenizer = checkpoints.tokenizer(checkpoint)
    chosen: dict[str, Any] = {"metrics": "perplexity", **TEXT}
    before = harness.measure(module, tokenizer, **chosen)
    with torch.no_grad():
        next(module.parameters()).mul_(1.05)
    after = harness.measure(module, tokenizer, **chosen)
    assert harness.compare(before, after).paired == 1
    assert before[0].revision != after[0].revision
    assert "harness.measure(" in harness.render(before)
    assert "--regen-all" not in harness.render(before)


def test_what_needs_a_process_of_its_own_is_missing_with_a_reason(
    project: Path, checkpoint: Any, module: nn.Module
) -> None:
    rows = harness.measure(module, checkpoints.tokenizer(checkpoint), metrics="memory.load_peak,memory.run_peak")
    assert [row.verdict for row in rows] == [Verdict.MISSING] * 2
    assert all("needs a process of its own" in row.reason for row in rows)


def test_without_a_reference_nothing_is_paired(project: Path, checkpoint: Any, module: nn.Module) -> None:
    rows = harness.measure(module, checkpoints.tokenizer(checkpoint), metrics="perplexity,divergence", **TEXT)
    assert [(row.method, row.reference, row.metric) for row in rows] == [("live", "live", "perplexity")]
    assert rows[0].bits_per_weight is None


def test_a_bug_of_the_module_keeps_its_traceback(project: Path, checkpoint: Any, module: nn.Module) -> None:
    def stumble(*given: Any) -> None:
        raise KeyError("in the caller's forward")

    module.register_forward_pre_hook(stumble)
    with pytest.warns(RuntimeWarning, match="Traceback"):
        rows = harness.measure(module, checkpoints.tokenizer(checkpoint), metrics="perplexity", **TEXT)
    assert "in the caller's forward" in rows[0].reason
    again = functools.partial(harness.measure, module, checkpoints.tokenizer(checkpoint), metrics="perplexity", **TEXT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as a test suite does
        with pytest.raises(RuntimeWarning):
            again(report_dir=project / "kept")
    assert "in the caller's forward" in harness.read_report(project / "kept").rows[0].reason


def test_a_live_module_lies_where_it_lies_whatever_the_project_declares(project: Path) -> None:
    (project / "pyproject.toml").write_text('[tool.harness.options]\ndevice = "cuda"\n')
    (row,) = harness.measure(small(), object(), metrics="memory.storage")
    assert row.device == "cpu"


def small() -> nn.Module:
    module: nn.Module = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=32))
    return module


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: harness.measure(small()), "needs its tokenizer"),
        (lambda: harness.measure({"a b": small()}, object()), "'a b' is no name for a module"),
        (lambda: harness.measure({"a": "gpt2"}, object()), "'a' is a str: beside live modules all must be live"),
        (lambda: harness.measure(small(), object(), reference="fp32"), "reference= is a str"),
        (lambda: harness.measure("gpt2", object()), "tokenizer= goes with a live module"),
        (lambda: harness.measure({}, object()), "names nothing to measure"),
        (lambda: harness.measure(small(), object(), methods="nf4"), "methods= goes with a named model"),
        (lambda: harness.measure(small(), object(), device="cuda"), "device=cuda and the module is on cpu"),
        (lambda: harness.measure(small().to("meta"), object()), "the modules lie on meta"),
        (lambda: harness.measure(small(), object(), metrics="invariant"), "invariants are of named methods"),
        (lambda: harness.measure({"reference": small()}, object(), reference=small()), "give the module another name"),
        (
            lambda: harness.measure(small(), object(), datasets="text:nowhere.txt", metrics="perplexity"),
            "there is no text file",
        ),
    ],
)
def test_mistakes_with_live_modules_are_one_line(project: Path, call: Any, told: str) -> None:
    with pytest.raises(HarnessError) as caught:
        call()
    assert told in str(caught.value)


def test_tied_and_shared_storage_counts_once() -> None:
    original = small()
    mine = small()
    table = torch.arange(256.0)
    for name, layer in list(mine.named_modules()):
        if isinstance(layer, Conv1D):
            mine.set_submodule(name, Int8(layer))
            mine.get_submodule(name).register_buffer("table", table)
    found = list(live.changed_weights(original, mine))
    assert [weight.kind for weight in found] == ["Conv1D"] * 4
    columns = {"c_attn": 24, "c_fc": 32}  # and 8 of the two others: a scale each
    bare = [weight.elements + 4 * columns.get(weight.name.rpartition(".")[2], 8) for weight in found]
    assert [weight.storage for weight in found] == [bare[0] + table.nbytes, *bare[1:]]
    assert not list(live.changed_weights(original, original))
    assert [weight.kind for weight in live.changed_weights(original, original.bfloat16())] == []


class Experts(nn.Module):
    """Experts packed into one parameter each, a bias beside and a router inside."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = (nn.Parameter(torch.randn(2, 32, 32)) for _ in range(2))
        self.down_proj_bias = nn.Parameter(torch.zeros(2, 32))
        self.router = nn.Linear(32, 2)


def test_packed_experts_are_weights_of_their_own() -> None:
    original = nn.ModuleDict({"experts": Experts()})
    assert not list(live.changed_weights(original, copy.deepcopy(original)))
    mine = copy.deepcopy(original)
    del mine["experts"].down_proj
    mine["experts"].register_buffer("codes", torch.zeros(2, 32, 32, dtype=torch.int8))
    (found,) = live.changed_weights(original, mine)
    assert (found.name, found.kind, found.elements, found.storage) == ("experts.down_proj", "Experts", 2048, 2048)
    assert live.homes(original) == {"experts", "experts.router"}


def test_packed_experts_of_ours_are_found_live() -> None:
    original = nn.ModuleDict({"experts": Experts()})
    mine = copy.deepcopy(original)
    stored.apply(mine, Recipe("absmax-int8", absmax_int8.CODES), ["experts.up_proj"])
    (ours,) = stored.weights(mine)
    (found,) = live.changed_weights(original, mine)
    assert replace(found, dequantize=ours.dequantize) == replace(ours, dequantize=ours.dequantize)
    (again,) = live.changed_weights(mine, mine)  # a module that is its own reference
    assert (again.name, again.elements) == (ours.name, ours.elements)


# the fixture


def test_a_users_own_test_measures(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        def test_mine(harness_measure, tmp_path, monkeypatch):
            monkeypatch.chdir(tmp_path)  # the command line's folders start where pytest did
            rows = harness_measure("tiny-gpt2", methods="nf4", metrics="memory.storage")
            assert [row.device for row in rows] == ["cpu", "cpu"]
            assert rows[1].value < rows[0].value
        """
    )
    done = pytester.runpytest_subprocess("--harness-report-dir", "out", "--harness-device", "cpu")
    done.assert_outcomes(passed=1)
    (kept,) = (pytester.path / "out").rglob("measurements.jsonl")
    assert kept.parent.name == "1"
    assert "test_mine" in kept.parent.parent.name
    assert len([json.loads(line) for line in kept.read_text().splitlines()]) == 2


def test_switches_of_precision_are_put_back() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        module = small().train()
        module.get_submodule("transformer.ln_f").eval()  # one part alone
        with live.evaluating(live.Live({"live": module}, None, object(), "cpu")):
            devices.full_precision()
            assert not module.training
        assert torch.get_float32_matmul_precision() == "medium"
        assert module.training
        assert not module.get_submodule("transformer.ln_f").training
    finally:
        torch.set_float32_matmul_precision(before)
