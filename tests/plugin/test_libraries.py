"""Optional libraries, the user's own files and GGUF in whole sessions."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.plugin.conftest import Project

Pick = Callable[[list[dict[str, Any]], str], dict[str, dict[str, Any]]]
FAKE = {  # a distribution that is there, though what it needs is not
    "site/llmcompressor/__init__.py": "",
    "site/llmcompressor-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: llmcompressor\nVersion: 1.0\n",
}
BROKEN = "llmc-gptq-int4:length=16:windows=2"
MINE = '''
"""A quantizer of the project's own."""
from harness.methods.quantizing.weight_method import weight_method


def quantize(weight):
    scale = (weight.abs().amax(dim=1, keepdim=True) / 31).clamp_min(1e-12)
    return {"codes": (weight / scale).round_().char(), "scale": scale}


def dequantize(stored, shape):
    return stored["codes"].float() * stored["scale"]


METHOD = weight_method(name="mine", summary="", bits=6, quantize=quantize, dequantize=dequantize, core=False)
'''
TALLY = '''
"""A metric of the project's own: how many modules were quantized."""
from harness.core.contracts import Member, Metric
from harness.core.records import Figure


def measure(subject, member):
    return Figure(sum(1 for _ in subject.method.quantized(subject.model)), "modules")


METRIC = Metric("tally", (Member("tally", "modules", "neither", textual=False),), measure)
'''


@pytest.mark.skipif(
    any(map(importlib.util.find_spec, ("torchao", "compressed_tensors"))), reason="they are installed here"
)
def test_what_is_not_installed_is_missing_and_what_is_broken_has_its_traceback(
    project: Project, by_metric: Pick
) -> None:
    for name, text in FAKE.items():
        project.write(name, text)
    result = project.run("--methods", f"torchao-int8,{BROKEN}", "--metrics", "memory.storage")
    assert result.ret == 1
    rows = project.rows()
    missing = by_metric(rows, "torchao-int8")["memory.storage"]
    assert (missing["verdict"], missing["value"]) == ("missing", None)
    assert missing["reason"] == "the method 'torchao-int8' needs the package 'torchao': pip install torchao"
    broken = by_metric(rows, BROKEN)["memory.storage"]
    assert broken["reason"] == "ModuleNotFoundError: No module named 'compressed_tensors'"
    result.stdout.fnmatch_lines(["*Traceback (most recent call last)*", "*No module named 'compressed_tensors'*"])
    assert "pip install torchao" in project.report()


def test_a_project_s_own_files(project: Project, by_metric: Pick) -> None:
    project.write("pyproject.toml", '[tool.harness]\nmethods = ["quant/mine.py"]\nmetrics = ["tally.py"]\n')
    project.write("quant/mine.py", MINE)
    project.write("tally.py", TALLY)
    assert project.run("--methods", "mine", "--metrics", "tally,memory.storage,perplexity.delta").ret == 0
    found = by_metric(project.rows(), "mine")
    assert found["tally"]["value"] == 8
    assert found["memory.storage"]["detail"]["predicted_equal"] is True
    assert 0 < found["perplexity.delta"]["value"] < 0.1
    key = found["perplexity.delta"]["key"]
    project.write("quant/mine.py", MINE.replace("/ 31", "/ 15"))  # another quantizer under the same name
    assert project.run("--methods", "mine", "--metrics", "perplexity.delta", "--resume").ret == 0
    again = by_metric(project.rows(), "mine")["perplexity.delta"]
    assert again["key"] != key
    assert again["value"] != found["perplexity.delta"]["value"]
    project.write("quant/mine.py", "import nothing_of_that_name\n")
    result = project.look("--methods", "mine")
    assert result.ret == 4
    result.stderr.fnmatch_lines(["*quant/mine.py (declared under [[]tool.harness[]]) fails to import: ModuleNotFound*"])


def test_a_session_started_elsewhere_calibrates_on_its_project_s_text(
    project: Project, by_metric: Pick, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.write("pyproject.toml", '[tool.harness.datasets]\nmine = "text:mine.txt"\n')
    project.write("mine.txt", "one line and another line of this very text\n" * 20)
    elsewhere = project.write("elsewhere/pyproject.toml", '[tool.harness.datasets]\nmine = "text:gone.txt"\n').parent
    monkeypatch.chdir(elsewhere)
    method, root = "gptq-int4:length=16:text=mine:windows=2", ("--rootdir", str(project.path))
    cases, folder = str(project.path / "test_cases.py"), ("--report-dir", str(project.path / "harness-report"))
    wanted = ("--methods", "nf4", "--reference", method, "--metrics", "memory.storage,divergence.kl")
    assert project.run(cases, *root, *folder, *wanted).ret == 0  # the reference is loaded beside nf4 as well
    assert by_metric(project.rows(), method)["memory.storage"]["detail"]["calibration"]["text"] == "mine"


def test_a_session_without_numba_measures_and_says_so(project: Project, by_metric: Pick) -> None:
    for index, folder in enumerate(("with", "without")):
        if index:
            project.write("site/numba.py", "raise ImportError('not for this NumPy')\n")
        arguments = ("--methods", "nf4", "--metrics", "perplexity,memory.storage", "--report-dir", folder)
        assert project.run(*arguments).ret == 0
        facts = json.loads((project.path / folder / "environments.json").read_text())
        assert {one["loops"] for one in facts.values()} == {("compiled", "torch")[index]}
        assert f", loops {('compiled', 'torch')[index]}" in " ".join(project.report(folder).split())
    ours, theirs = (by_metric(project.rows(folder), "nf4") for folder in ("with", "without"))
    assert all(ours[name]["value"] == row["value"] for name, row in theirs.items())  # windows have many rows
    assert ours["memory.storage"]["detail"]["libraries"] == {"numba": version("numba")}


def test_gguf_and_gptq_in_a_session(project: Project, by_metric: Pick) -> None:
    wanted = "gguf-q8_0,gguf-q4_0,gptq-int4:windows=4:length=64,linear-int4"
    assert project.run("--methods", wanted, "--metrics", "perplexity,memory").ret == 0
    rows = project.rows()
    eight, four = (by_metric(rows, name) for name in ("gguf-q8_0", "gguf-q4_0"))
    assert four["memory.file"]["value"] < eight["memory.file"]["value"]
    assert four["memory.storage"]["detail"]["predicted_equal"] is True
    gptq = by_metric(rows, "gptq-int4:length=64:windows=4")
    assert gptq["perplexity.delta"]["detail"]["calibration"]["text"] == "model"
    assert gptq["perplexity.delta"]["detail"]["calibration"]["windows"] == 4
    assert gptq["memory.storage"]["value"] == by_metric(rows, "linear-int4")["memory.storage"]["value"]
    assert "file MiB" in project.report()
