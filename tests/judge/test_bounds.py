"""Bounds: the packaged defaults, a user's file over them, and every way to write one wrongly."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from harness.core.environment import Environment
from harness.core.errors import BadFile
from harness.core.records import Case
from harness.judge import bounds
from harness.judge.bounds import Bounds, Rule, compute_of, load, ran


def case(method: str = "nf4", metric: str = "perplexity.delta", device: str = "cpu", model: str = "gpt2") -> Case:
    return Case(model, method, "lee", "chunk:512", metric, device)


@pytest.fixture
def defaults(tmp_path: Path) -> Bounds:
    return load(tmp_path)


@pytest.mark.parametrize(
    ("method", "ratio", "said"),
    [
        ("absmax-int8", 1.005, "at most 0.5%"),
        ("zeropoint-int8", 1.005, "at most 0.5%"),
        ("bnb-int8", 1.05, "at most 5%"),
        ("absmax-int8:mlp", 1.005, "at most 0.5%"),
        ("bnb-int8:dtype=bf16", 1.05, "at most 5%"),
        ("bf16", 1.005, "at most 0.5%"),
        ("fp16", 1.002, "at most 0.2%"),
    ],
)
def test_what_may_be_lost_by_default(defaults: Bounds, method: str, ratio: float, said: str) -> None:
    rule = defaults.against_reference(case(method))
    assert rule is not None
    assert rule.limit == pytest.approx(math.log(ratio))
    assert str(rule) == said


@pytest.mark.parametrize("method", ["nf4", "fp4", "linear-int4", "bnb-nf4", "absmax-int8-tensor", "fp32"])
def test_nothing_is_promised_of_four_bits_or_one_scale_a_tensor(defaults: Bounds, method: str) -> None:
    assert defaults.against_reference(case(method)) is None


def test_against_another_model_only_a_rule_that_names_references_speaks(tmp_path: Path, defaults: Bounds) -> None:
    other = case("absmax-int8")._replace(reference="fp32=path:base")
    assert defaults.against_reference(other) is None
    assert compute_of("bf16=path:base", "cuda") == "bf16"
    (tmp_path / "bounds.toml").write_text(
        "schema = 1\n[[reference]]\nmetrics = ['perplexity.delta']\nreferences = ['*=path:base']\nratio = 1.02\n"
        "reason = 'what 4 bits may lose of it'\n"
    )
    rule = load(tmp_path).against_reference(other)
    assert rule is not None
    assert rule.ratio == 1.02
    assert load(tmp_path).against_reference(case("nf4")) is None  # its own reference is none of those


def test_only_the_paired_loss_is_bounded(defaults: Bounds) -> None:
    for metric in ("perplexity", "latency.decode", "memory.storage", "divergence.kl"):
        assert defaults.against_reference(case("absmax-int8", metric)) is None


def test_allowances_and_floors(defaults: Bounds) -> None:
    assert defaults.allowance(case(metric="latency.decode")) == 1.10
    assert defaults.allowance(case(metric="memory.storage")) == 1.0
    assert defaults.floor(case(metric="latency.decode")) == 0.0
    for metric in ("perplexity", "perplexity.delta"):  # their noise is another table's
        assert defaults.floor(case(metric=metric)) == 0.0
        assert defaults.allowance(case(metric=metric)) == 1.0


PACKING = Environment(instructions="avx2 avx512 avx512_bf16 amx", bitsandbytes="0.50.2")


@pytest.mark.parametrize(
    ("method", "device", "world", "compute"),
    [
        ("nf4", "cpu", None, "fp32"),
        ("nf4", "cuda", None, "fp16"),  # the device's default, though nobody spelled it
        ("nf4:dtype=bf16", "cuda", None, "bf16"),
        ("fp32", "cuda", None, "fp32"),
        ("bf16", "cpu", None, "bf16"),
        ("bnb-int8", "cpu", None, "int8"),
        ("absmax-int8-w8a8:dtype=bf16", "cuda", None, "int8"),
        ("absmax-int8:compute=bf16", "cpu", None, "bf16"),
        ("absmax-int8:compute=fused:dtype=fp16", "cpu", None, "fp16"),
        ("bnb-nf4:compute=fp32:dtype=fp16", "cuda", None, "fp32"),
        ("bnb-nf4:batch=1:compute=dtype:dtype=fp32", "cpu", PACKING, "bf16"),
        ("bnb-nf4:compute=fp32", "cpu", PACKING, "bf16"),
        ("bnb-nf4", "cpu", Environment(instructions="avx2 avx512", bitsandbytes="0.50.2"), "fp32"),
        ("bnb-nf4", "cpu", Environment(instructions="avx2 avx512 avx512_bf16", bitsandbytes="0.48.2"), "fp32"),
        ("nf4", "cpu", PACKING, "fp32"),
    ],
)
def test_rules_follow_what_runs(
    defaults: Bounds, method: str, device: str, world: Environment | None, compute: str
) -> None:
    assert compute_of(method, device, world) == compute
    one, run = case(method, "divergence.kl", device), ran(case(method, device=device), "", world)
    assert defaults.allowance(one, run) == (1.01 if compute == "fp32" else 1.25)
    meant = [rule for rule in defaults.noises if rule.computes == (compute,) and device in (rule.devices or (device,))]
    assert defaults.noise(one, run) == (meant[-1].token, meant[-1].shift)


def test_noise_may_be_said_for_a_device_class(tmp_path: Path) -> None:
    (tmp_path / "bounds.toml").write_text(
        'schema = 1\n[[noise]]\ndevices = ["cpu:avx2"]\ntoken = 0.5\nshift = 0.25\nreason = "an old processor"\n'
    )
    found, old = load(tmp_path), Environment(instructions="avx2")
    assert found.noise(case(), ran(case(), "", old)) == (0.5, 0.25)
    assert found.noise(case(), ran(case(), "", PACKING)) == load(tmp_path / "none").noise(case())


def test_a_users_rule_holds_over_the_packages(tmp_path: Path) -> None:
    (tmp_path / "bounds.toml").write_text(
        'schema = 1\n[[reference]]\nmodels = ["tiny-*"]\nmethods = ["bnb-int8"]\nratio = 1.03\nreason = "tiny"\n'
        '[[reference]]\nmetrics = ["divergence.same_top"]\nat_least = 0.9\nreason = "agreement"\n'
    )
    found = load(tmp_path)
    tiny, other = case("bnb-int8", model="tiny-gpt2"), case("bnb-int8")
    assert [str(found.against_reference(each)) for each in (tiny, other)] == ["at most 3%", "at most 5%"]
    rule = found.against_reference(case(metric="divergence.same_top"))
    assert rule == Rule("agreement", at_least=0.9, metrics=("divergence.same_top",))
    assert str(rule) == "at least 0.9"
    assert rule.limit == 0.9
    assert found.noise(other) == bounds.packaged().noise(other)


def test_the_repositorys_own_file_reads() -> None:
    load(Path(__file__).parents[2] / "baselines")


def test_every_default_gives_a_reason_a_person_can_weigh() -> None:
    own = bounds.packaged()
    rules = (*own.reference, *own.record, *own.floors, *own.noises)
    assert rules
    assert all(len(rule.reason.split()) >= 8 for rule in rules)


RULE = '[[reference]]\nratio = 1.1\nreason = "r"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schema = ", "cannot be read as TOML"),
        (RULE, "no schema number: begin with schema 1"),
        ("schema = true", "schema must be a whole number, not True"),
        ("schema = 99", r"schema 99 is newer than this harness reads \(1\): upgrade the harness"),
        ("schema = 1\nreferences = []", r"'references' \(known: schema, reference, record, floor, noise\)"),
        ("schema = 1\n[reference]\nratio = 1.1", "reference must be a list of tables, not {'ratio': 1.1}"),
        ("schema = 1\n" + RULE + "model = []", "reference 1: no place for 'model'"),
        ('schema = 1\n[[floor]]\nratio = 1.1\nreason = "r"', "floor 1: no place for 'ratio'"),
        ("schema = 1\n" + RULE + "at_most = 1", "needs one of ratio, at_most, at_least"),
        ('schema = 1\n[[record]]\nreason = "r"', "record 1: it needs one of ratio, at_most, at_least"),
        ("schema = 1\n[[reference]]\nratio = 1.1", "reference 1: no 'reason'"),
        (
            'schema = 1\n[[reference]]\nratio = 1.1\nreason = " "',
            "gives no reason: a limit without one cannot be reviewed",
        ),
        ("schema = 1\n" + RULE + 'metrics = "a"', "reference 1.metrics must be a list of texts, not 'a'"),
        ("schema = 1\n" + RULE + "metrics = []", r"metrics must be a list of texts of length >= 1, not \[\]"),
        ('schema = 1\n[[reference]]\nratio = "x"\nreason = "r"', "ratio must be a number, not 'x'"),
        ('schema = 1\n[[reference]]\nat_most = nan\nreason = "r"', "at_most must be a finite number, not nan"),
        ('schema = 1\n[[noise]]\ntoken = 1.0\nreason = "r"', "noise 1: no 'shift'"),
        ('schema = 1\n[[noise]]\ntoken = -1.0\nshift = 0.0\nreason = "r"', "noise 1.token must be a number >= 0"),
        (
            "schema = 1\n" + RULE + 'computes = ["float16"]',
            "reference 1: computes are of fp32, bf16, fp16, int8, not 'float16'",
        ),
        ('schema = 1\n[[record]]\nratio = 0.9\nreason = "r"', "ratio must be a number >= 1.0, not 0.9"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bounds.toml").write_text(text)
    with pytest.raises(BadFile, match=message) as caught:
        load(tmp_path)
    assert str(tmp_path / "bounds.toml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_and_a_folder_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "bounds.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(BadFile, match="cannot be read as TOML"):
        load(tmp_path)
    (tmp_path / "elsewhere" / "bounds.toml").mkdir(parents=True)
    with pytest.raises(BadFile, match="cannot be read as TOML"):
        load(tmp_path / "elsewhere")
