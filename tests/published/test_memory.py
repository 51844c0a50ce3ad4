from __future__ import annotations

import functools
import json
import shutil
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from harness import published
from harness.__main__ import parser
from harness.core import catalog
from harness.core.errors import BadFile, BadSpecification, HarnessError, MissingAsset, UnknownName
from harness.core.specification import parse
from harness.inputs.models import names
from harness.inputs.models import sizes as fits
from harness.inputs.models import sizes as memory
from harness.methods.quantizing.arguments import resolve
from harness.published import Claim, Finding, Judgement, beside, of_baselines
from harness.published.claims import SHIPPED
from harness.published.counting import anatomy, by_tensor, kinds, search, truth
from harness.report import document
from harness.run import prediction

ROOT = Path(__file__).parents[2]
FIVE = ("1460b23e4c53a2d4", "1e290afccbc8fef6", "402d78b58c8735bf", "f30b6a73be1e93ea", "ff868124287232a4")
GPT2_P, GPT2_L = 124_439_808, 84_934_656  # parameters; elements of the four Conv1D weights of twelve layers
OLMO_P, OLMO_L = 1_176_764_416, 1_073_741_824
PHI_P, PHI_L = 3_821_079_552, 3_623_878_656


@functools.cache
def claims() -> tuple[Claim, ...]:
    return published.read(SHIPPED)


@functools.cache
def judged() -> dict[str, Judgement]:
    return {judgement.claim.id: judgement for judgement in published.judge(claims())}


def flipped(claim: Claim) -> Claim:
    """The claim with its last printed digit one off."""
    return replace(claim, published=str(claim.value + Decimal(1).scaleb(-claim.digits)))


def judge_alone(claim: Claim) -> Judgement:
    mates = [other for other in claims() if other.report.name == claim.report.name]
    others = [claim if other.id == claim.id else other for other in mates]
    return next(judgement for judgement in published.judge(others) if judgement.claim.id == claim.id)


def one(name: str) -> Claim:
    return next(claim for claim in claims() if claim.id == name)


@pytest.mark.parametrize(
    ("model", "elements", "linear"),
    [("gpt2", GPT2_P, GPT2_L), ("olmo-1b", OLMO_P, OLMO_L), ("phi-3-mini", PHI_P, PHI_L)],
)
def test_architectures_have_the_published_number_of_parameters(model: str, elements: int, linear: int) -> None:
    about = anatomy(model)
    assert sum(tensor.elements for tensor in about.tensors) == elements
    assert sum(tensor.elements for tensor in about.tensors if tensor.role == "projection") == linear
    assert truth(model, "fp32").parameters == 4 * elements


def of_the_five() -> list[Judgement]:
    return [judgement for judgement in judged().values() if judgement.claim.report.name in FIVE]


def test_27_of_28_memory_figures_are_reproduced() -> None:
    findings = [judgement.finding for judgement in of_the_five() if judgement.claim.metric == "memory"]
    assert len(findings) == 28
    assert findings.count(Finding.REPRODUCED) == 27
    assert findings.count(Finding.REFUTED) == 1


def test_every_memory_figure_of_six_further_programs_is_reproduced() -> None:
    others = [item for item in judged().values() if item.claim.report.name not in FIVE]
    memory = [item for item in others if item.claim.metric.startswith("memory")]
    assert len(memory) == 38
    assert {item.finding for item in memory} == {Finding.REPRODUCED}


def test_at_most_twenty_of_134_figures_stay_underspecified_each_with_one_missing_fact() -> None:
    five = of_the_five()
    assert len(five) == 134
    left = [item for item in five if item.finding is Finding.UNDERSPECIFIED]
    assert len(left) <= 20
    assert all(item.note.startswith("not said: ") for item in left)


@pytest.mark.parametrize(
    ("name", "true", "ratio"),
    [
        ("f30b6a73be1e93ea/custom/fp32/perplexity", 14.9789, None),
        ("f30b6a73be1e93ea/custom/int8_whole_model/perplexity", 15.2027, 1.0149),
        ("f30b6a73be1e93ea/custom/int8_first_12_of_16_layers/perplexity", 15.0472, 1.0046),
        ("f30b6a73be1e93ea/library/bnb-int8/perplexity", 15.1966, 1.0145),
        ("f30b6a73be1e93ea/library/bnb-fp4/perplexity", 16.6870, 1.1140),
        ("f30b6a73be1e93ea/library/bnb-nf4/perplexity", 15.8185, 1.0561),
        ("1e290afccbc8fef6/library/fp32/perplexity", 86.4906, None),
        ("1e290afccbc8fef6/library/bnb-int8/perplexity", 95.5648, 1.1049),
        ("1e290afccbc8fef6/library/bnb-fp4/perplexity", 120.470, 1.3929),
        ("1e290afccbc8fef6/library/bnb-nf4/perplexity", 101.425, 1.1727),
        ("402d78b58c8735bf/library/bnb-nf4/perplexity", 33.9442, 1.0736),
        ("gpt-neo-125m-ptb/custom/fp32/perplexity", 268.516, None),
    ],
)
def test_a_perplexity_stands_for_a_true_one(name: str, true: float, ratio: float | None) -> None:
    found = judged()[name]
    assert found.true is not None
    assert float(found.true) == pytest.approx(true, rel=2e-5)
    if ratio is not None:
        assert float(found.true_ratio or 0) == pytest.approx(ratio, abs=6e-5)
    assert found.finding is Finding.NEEDS_WEIGHTS


@pytest.mark.parametrize(
    ("name", "total", "said"),
    [
        ("bnb-int8", 4_056_176_640, "the same to the byte"),
        ("bnb-fp4", 2_449_954_816, "the count is 2,097,152 above"),
        ("bnb-nf4", 839_533_568, "the embedding and layers 0-9 of 32"),
    ],
)
def test_what_a_card_held_is_its_allocators_blocks(name: str, total: int, said: str) -> None:
    found = judged()[f"1e290afccbc8fef6/library/{name}/gpu_gb"]
    assert found.finding is Finding.REPRODUCED
    assert found.ours == Decimal(total) / 2**30
    assert said in found.note


def test_double_quantization_is_counted() -> None:
    assert judged()["402d78b58c8735bf/library/bnb-nf4/memory"].storage == 122_877_888
    assert judged()["402d78b58c8735bf/library/bnb-fp4/memory"].storage == 126_789_120


def test_times_are_judged_by_what_they_timed() -> None:
    row = judged()["f30b6a73be1e93ea/custom/int8_whole_model/cuda_ms"]
    assert "mean-per-event" in row.note
    assert float(row.true_ratio or 0) == pytest.approx(1.037, abs=1e-3)
    dropout = judged()["402d78b58c8735bf/custom/int8_selective/latency_s"]
    assert "dropout-while-timing" in dropout.note
    assert "not-synchronized" in dropout.note
    processor = judged()["1e290afccbc8fef6/library/fp32/latency_s"]
    assert "compares machines" in processor.note
    assert judged()["ff868124287232a4/library/bnb-fp4/latency_s"].command.endswith("--device cuda")


def test_no_choice_of_whole_tensors_gives_158_97() -> None:
    odd = one("1460b23e4c53a2d4/custom/int8_FFN_and_attention/memory")
    found = by_tensor(odd)
    assert (found.tensors, found.step, len(found.tried), found.fits) == (148, 768, 9, ())
    assert by_tensor(replace(odd, published="118.97")).fits  # all that is named weight at 1 byte
    assert by_tensor(replace(odd, published="231.70")).fits


def test_the_page_is_what_the_command_prints() -> None:
    entries = [published.entry(judgement) for judgement in judged().values()]
    page = published.page(beside(entries, of_baselines(ROOT / "baselines")))
    kept = (ROOT / "docs" / "published.md").read_text()
    assert kept == page, "run: python -m harness published --markdown > docs/published.md"


def test_computed_verdicts_are_the_reviewed_ones() -> None:
    assert {name: str(item.finding) for name, item in judged().items()} == {item.id: item.verdict for item in claims()}


def test_a_wrong_digit_flips_every_reproduced_figure() -> None:
    reproduced = [item.claim for item in judged().values() if item.finding is Finding.REPRODUCED]
    wrong = {flipped(claim).id: flipped(claim) for claim in reproduced}
    again = published.judge([wrong.get(claim.id, claim) for claim in claims()])
    kept = [item.claim.id for item in again if item.claim.id in wrong and item.finding is Finding.REPRODUCED]
    assert len(reproduced) > 40
    assert not kept
    assert {item.finding for item in again if item.claim.id in wrong and item.claim.metric == "memory"} == {
        Finding.REFUTED
    }


def test_by_hand_in_a_formula_of_its_own() -> None:
    """Parameters of a 16-bit model: 2 (P - L) + b L; masks of GPT-2: 12 of 1024 x 1024 bool and a fp32 scalar."""
    masks = 12 * (1024 * 1024 + 4)
    expected = {
        "402d78b58c8735bf/library/bnb-int8/memory": (2 * (GPT2_P - GPT2_L) + GPT2_L, 2**20),
        "402d78b58c8735bf/library/bnb-nf4/memory": (2 * (GPT2_P - GPT2_L) + GPT2_L // 2, 2**20),
        "f30b6a73be1e93ea/library/bnb-fp4/memory": (2 * (OLMO_P - OLMO_L) + OLMO_L // 2, 10**6),
        "ff868124287232a4/library/bnb-nf4/memory": (4 * GPT2_P + masks - 7 * GPT2_L // 2, 10**6),
        "1e290afccbc8fef6/custom/fp32/memory": (4 * PHI_P + 32 * 48 * 4, 10**6),
    }
    for name, (total, unit) in expected.items():
        assert judged()[name].ours == Decimal(total) / unit


def test_the_difference_to_storage_adds_up() -> None:
    """Block scales: an fp32 absmax for 64 weights and a table of 16 for each of 48 weights."""
    judgement = judged()["402d78b58c8735bf/library/bnb-fp4/memory"]
    assert judgement.storage is not None
    assert judgement.storage - (2 * (GPT2_P - GPT2_L) + GPT2_L // 2) == 4 * GPT2_L // 64 + 48 * 16 * 4
    assert "5,311,488 bytes scales and tables left out" in judgement.note
    head = judged()["f30b6a73be1e93ea/custom/int8_whole_model/memory"]
    assert f"{50304 * 2048 + 4 * 50304:,} bytes the tied head counted again" in head.note


def test_what_a_selective_figure_cannot_tell_apart() -> None:
    note = judged()["402d78b58c8735bf/custom/int8_selective/memory"].note
    assert note.count("would give the same bytes") == 2


def test_the_search_covers_its_space_and_finds_what_is_in_it() -> None:
    about = anatomy("gpt2")
    sizes = kinds(about)
    assert len(sizes) == 9
    assert sum(sizes.values()) == GPT2_P
    odd = one("1460b23e4c53a2d4/custom/int8_FFN_and_attention/memory")
    assert (odd.report.model, odd.published, odd.unit) == ("gpt2", "158.97", "MiB")
    found = search(odd)
    assert (found.size, found.hits) == (3**9 * 2 * 4, ())
    assert found.closest[0].bytes / 2**20 == pytest.approx(158.7723, abs=1e-4)
    planted = search(replace(odd, published="118.68"))  # every tensor at one byte
    assert any(hit.bytes == GPT2_P and set(hit.widths.values()) == {1} for hit in planted.hits)
    for hit in planted.hits:
        total = sum(sizes[kind] * width for kind, width in hit.widths.items())
        total += 12 * (1024 * 1024 + 4) * hit.masks + sizes["wte"] * hit.head_again
        assert total == hit.bytes


def test_a_figure_that_the_search_hits_is_no_longer_underivable() -> None:
    odd = one("1460b23e4c53a2d4/custom/int8_FFN_and_attention/memory")
    assert judge_alone(replace(odd, published="158.77")).finding is Finding.REPRODUCED
    assert "148 tensors" in judged()[odd.id].note
    assert "157,464 counts searched" in judged()[odd.id].note
    assert "118.97 + 40.00" in judged()[odd.id].note


@pytest.mark.parametrize(
    ("name", "published_as", "finding"),
    [
        ("f30b6a73be1e93ea/custom/fp32/cuda_ms", "72470", Finding.REFUTED),  # still a mean of events
        ("1460b23e4c53a2d4/custom/int8_whole_model/latency_ms", "0.001", Finding.REFUTED),  # 125 TB/s
        ("f30b6a73be1e93ea/custom/fp32/cuda_ms", "0.7247", Finding.REFUTED),
        ("402d78b58c8735bf/library/fp32/latency_s", "0.00001", Finding.REFUTED),
        ("402d78b58c8735bf/custom/int8_whole_model/perplexity", "50257", Finding.REFUTED),  # beyond the anchors
        ("402d78b58c8735bf/custom/int8_whole_model/perplexity", "31.70", Finding.NEEDS_WEIGHTS),
        ("1460b23e4c53a2d4/custom/int8_whole_model/perplexity", "3700.0", Finding.UNDERSPECIFIED),
        ("1460b23e4c53a2d4/custom/int8_whole_model/perplexity", "3740.0", Finding.REFUTED),  # 100 times an anchor
        ("ff868124287232a4/custom/fp32/perplexity", "30.0", Finding.REFUTED),  # by its labels, whatever it says
        ("1e290afccbc8fef6/library/fp32/cpu_gb", "14.17", Finding.REFUTED),  # less than the weights
        ("1e290afccbc8fef6/library/bnb-nf4/gpu_gb", "2.28", Finding.REFUTED),
        ("1e290afccbc8fef6/library/fp32/gpu_gb", "0.01", Finding.REFUTED),
        ("1e290afccbc8fef6/custom/fp32/census.Linear", "128", Finding.REFUTED),
    ],
)
def test_other_digits_other_verdicts(name: str, published_as: str, finding: Finding) -> None:
    assert judge_alone(replace(one(name), published=published_as)).finding is finding


def test_what_cannot_be_settled_names_what_is_missing_or_a_command() -> None:
    for judgement in judged().values():
        if judgement.finding is Finding.UNDERSPECIFIED:
            assert "not said: " in judgement.note, judgement.claim.id
        if judgement.finding in (Finding.NEEDS_WEIGHTS, Finding.NEEDS_GPU):
            assert judgement.command.startswith(("pytest ", "python -m harness run ")), judgement.claim.id


def test_olmo_forward_needs_650_terabytes_a_second() -> None:
    note = judged()["f30b6a73be1e93ea/custom/fp32/cuda_ms"].note
    assert "at 650 TB/s" in note  # 4 * P bytes / 0.007247 ms
    assert "6.5 TB/s" in note


def run_published(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    parsed = parser().parse_args(["published", *arguments])
    return parsed.run(parsed), capsys.readouterr().out


def test_the_command_puts_the_figures_into_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "report"
    shutil.copytree(ROOT / "tests" / "report" / "data" / "made-session", folder)
    status, text = run_published(capsys, "--report-dir", str(folder))
    assert status == 0
    assert text.splitlines()[-1] == f"report: {folder / 'report.md'}"
    report, page = ((folder / name).read_text() for name in ("report.md", "published.md"))
    assert "Memory: 64 of 65 figures reproduced." in report
    assert "See [published.md](published.md)." in report
    assert "ours on smollm2-135m, cpu." in page  # the session's own ratios, not the recorded ones
    assert document.rewrite(folder).read_text() == report


def test_the_command_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    for arguments in (("--report-dir", str(tmp_path)), ("--claims", str(tmp_path))):
        parsed = parser().parse_args(["published", *arguments])
        with pytest.raises(MissingAsset):
            parsed.run(parsed)


# harness memory, and whether it fits


def run_memory(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    parsed = parser().parse_args(["memory", *arguments])
    return parsed.run(parsed), capsys.readouterr().out


def small_config(folder: Path) -> Path:
    config = {
        "model_type": "llama", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_memory_of_a_folder_and_of_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = small_config(tmp_path)
    status, text = run_memory(capsys, str(folder), "--method", "absmax-int8", "--json")
    answer = json.loads(text)
    layer = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 128  # q, k and v, o, gate, up and down
    scales = 64 + 2 * 32 + 64 + 2 * 128 + 64
    rest = 2 * 128 * 64 + 5 * 64  # embedding, head, norms
    assert status == 0
    assert answer["memory.parameters"] == 4 * rest
    assert answer["linear_elements"] == 2 * layer
    assert answer["bits_per_weight"] == pytest.approx(8 + 32 * scales / layer)
    buffers = answer["memory.storage"] - 4 * rest - 2 * (layer + 4 * scales)
    assert buffers in (4 * 8, 2 * 4 * 8)  # inverse frequencies of 16 / 2 pairs, once or with their original
    assert run_memory(capsys, str(folder / "config.json"), "--method", "absmax-int8", "--json")[1] == text


def test_memory_says_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = run_memory(capsys, "phi-3-mini", "--method", "nf4", "--dtype", "fp16", "--fits", "24GiB")
    assert (status, "fits into 24.00 GiB" in text) == (0, True)
    status, text = run_memory(capsys, "phi-3-mini", "--method", "nf4", "--dtype", "fp16", "--fits", "7GiB")
    assert (status, "does not fit into 7.00 GiB" in text) == (1, True)  # the unquantized model alone is 7.12 GiB
    status, _ = run_memory(capsys, "phi-3-mini", "--method", "bnb-nf4", "--dtype", "fp16", "--fits", "7GiB")
    assert status == 0  # quantized while it is read


def test_memory_of_a_16_bit_reference_needs_no_method(capsys: pytest.CaptureFixture[str]) -> None:
    answer = json.loads(run_memory(capsys, "gpt2", "--dtype", "fp16", "--json")[1])
    assert (answer["memory.parameters"], answer["dtype"], answer["bits_per_weight"]) == (2 * GPT2_P, "fp16", 16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("gpt2", "--method", "nf5"), UnknownName, "did you mean 'nf4'"),
        (("gpt2", "--method", "nf4", "--fits", "24"), BadSpecification, "as in 24GiB"),
        (("gpt2", "--method", "nf4", "--fits", "0GiB"), BadSpecification, "no size above zero"),
        (("gpt2", "--method", "nf4:dtype=fp16", "--dtype", "fp32"), BadSpecification, "give the dtype once"),
        (("nowhere/config.json", "--method", "nf4"), MissingAsset, "is not there"),
        (("gpt3", "--method", "nf4"), UnknownName, "gpt2"),
    ],
)
def test_memory_refuses_in_one_line(
    arguments: tuple[str, ...], error: type[HarnessError], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(error) as caught:
        run_memory(capsys, *arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no readable config.json"),
        ("[]", "names no model_type"),
        ('{"model_type": "nonesuch"}', "does not take it as 'nonesuch'"),
        ('{"model_type": "gpt2", "quantization_config": {}}', "quantized already"),
        ('{"model_type": "vit"}', "no causal language model"),
    ],
)
def test_memory_refuses_a_bad_config(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(HarnessError, match=message) as caught:
        run_memory(capsys, str(tmp_path), "--method", "nf4")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, BadFile) or "causal" in message


@pytest.mark.parametrize(
    ("kind", "method"),
    [("bloom", "absmax-int8"), ("gemma2", "absmax-int8"), ("mamba", "bnb-int8"), ("opt", "bnb-int8")],
)
def test_memory_of_models_with_other_attention_or_none(
    kind: str, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))  # all else by default
    answer = json.loads(run_memory(capsys, str(tmp_path), "--method", method, "--json")[1])
    assert answer["linear_elements"] > 0
    assert 8 < answer["bits_per_weight"] <= 8.5  # a scale a row; rows of 64 weights at the shortest


@pytest.mark.parametrize("text", ["24GiB", "24 GiB", "24576MiB", "25769803776B"])
def test_sizes(text: str) -> None:
    assert fits.parse_size(text) == 24 * 2**30


@pytest.mark.parametrize("name", ["absmax-int8", "nf4", "linear-int4-affine"])
def test_the_peak_traced_on_meta_is_that_of_real_tensors(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = prediction.read_config(small_config(tmp_path) / "config.json")
    method = catalog.methods()[name]
    arguments = resolve(parse(name), method, "cpu")
    with torch.device("meta"):
        sketched = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    real = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for model in (sketched, real):
        model.eval().requires_grad_(False)
    predicted = fits.traced_peak(sketched, method, arguments)
    assert predicted > memory.storage_bytes(real)
    beyond = predicted - fits.traced_peak(real, method, arguments)
    assert 0 <= beyond <= 128 * 64  # the mask of the largest weight, where the peak lies at another moment
    assert memory.storage_bytes(sketched) == memory.storage_bytes(real)


def test_known_names_list_each_other() -> None:
    with pytest.raises(UnknownName, match="known: gpt2, olmo-1b, phi-3-mini"):
        names.config_of("gpt4")
