from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from harness import published
from harness.core.contracts import TokenPlan, Window
from harness.core.errors import BadFile, MissingAsset
from harness.core.options import Declared
from harness.core.records import Row
from harness.inputs.texts.corpora import Corpus
from harness.published import Claim, Finding, Judgement, Publication, beside, of_baselines, of_rows
from harness.published.claims import SHIPPED, Convention, TensorGroup
from harness.published.counting import Anatomy, Tensor, block, count, covers, describe, reachable
from harness.published.settling import as_port, led_by, within
from harness.results.directory import PUBLISHED, ReportDirectory, published_json, published_of

BASELINES = Path(__file__).parents[2] / "baselines"
FIVE = ("1460b23e4c53a2d4", "1e290afccbc8fef6", "402d78b58c8735bf", "f30b6a73be1e93ea", "ff868124287232a4")
REPORT = Publication("r", "gpt2", "some text", "some protocol", {"latency": "the card", "perplexity": "the text"})
SMALL = Anatomy(  # one layer of a 2 x 3 projection with a bias, a tied 5 x 2 head, 4 positions
    tensors=(
        Tensor("transformer.wte.weight", 10, 5, "tied"),
        Tensor("transformer.h.0.attn.c_attn.weight", 6, 3, "projection"),
        Tensor("transformer.h.0.attn.c_attn.bias", 3, 0, "vector"),
        Tensor("transformer.h.1.attn.c_attn.weight", 6, 3, "projection"),
        Tensor("transformer.wpe.weight", 8, 4, "embedding"),
    ),
    layers=2,
    positions=4,
    vocabulary=5,
    rotary_elements=7,
    modules={},
    buffer_bytes=0,
)
LINEAR = (TensorGroup(("*.c_attn.weight",), 8),)

MINIMAL = """
schema = 1
report = "r"
model = "gpt2"
text = "t"
protocol = "p"
[[claim]]
part = "a"
method = "m"
[claim.figures.memory]
published = "1.50"
unit = "MiB"
"""


def write(folder: Path, text: str, name: str = "r.toml") -> Path:
    (folder / name).write_text(text)
    return folder


def claim(**changes: object) -> Claim:
    base = Claim(REPORT, "a", "m", "", "memory", "1.50", "MiB")
    return replace(base, **changes)


def test_reads_a_file_with_its_digits(tmp_path: Path) -> None:
    (found,) = published.read(write(tmp_path, MINIMAL))
    assert (found.value, found.digits, found.unit, found.id) == (Decimal("1.50"), 2, "MiB", "r/a/m/memory")
    assert found.in_base_units == Decimal(1.5 * 2**20)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("schema = 1", "schema = 2", "schema 2 is newer than this harness reads (1)"),
        ('report = "r"', 'report = "other"', "write report = 'r'"),
        ('unit = "MiB"', 'unit = "miles"', "unit is one of"),
        ('published = "1.50"', "published = 1.50", "r.toml: a, m, memory: published must be text, not 1.5"),
        ('published = "1.50"', 'published = "much"', "published must be a number in quotes, not 'much'"),
        ('model = "gpt2"', "", "no 'model'"),
        ('method = "m"', 'method = "m"\ncolour = 1', "claim 1: no place for 'colour'"),
        (
            'unit = "MiB"',
            'unit = "MiB"\nconvention = { remainder = "fp8" }',
            "convention.remainder must be one of 'fp32', 'fp16'",
        ),
        ('unit = "MiB"', 'unit = "MiB"\nreading = "odd"', "reading must be one of '', 'port'"),
        ('method = "m"', 'method = "m"\nrule = "mine"', "a, m: rule: unknown table 'mine'"),
        (
            "[[claim]]",
            '[rules.r]\nsource = "program"\ntext = "t"\naverage = "batch"\n[[claim]]',
            "average 'batch' needs a batch of 2 or more",
        ),
        ("[[claim]]", '[rules.r]\nsource = "hearsay"\ntext = "t"\n[[claim]]', "must be one of 'report', 'program'"),
        ('text = "t"', 'text = "t"\ntimed = "lunch"', "timed must be one of"),
        ("schema = 1", "schema", "cannot be read as TOML"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(BadFile) as caught:
        published.read(write(tmp_path, MINIMAL.replace(old, new, 1)))
    assert message in str(caught.value)
    assert "r.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_claims_say_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(MissingAsset, match="--claims"):
        published.read(tmp_path)


def test_two_claims_of_one_name_are_refused(tmp_path: Path) -> None:
    line = MINIMAL[MINIMAL.index("[[claim]]") :]
    with pytest.raises(BadFile, match="r/a/m/memory twice"):
        published.read(write(tmp_path, MINIMAL + line))


def test_the_carried_files_hold_every_memory_figure() -> None:
    memory = Counter(item.report.name for item in published.read(SHIPPED) if item.metric == "memory")
    assert {name: memory[name] for name in FIVE} == {
        "1460b23e4c53a2d4": 5,
        "1e290afccbc8fef6": 3,
        "402d78b58c8735bf": 7,
        "f30b6a73be1e93ea": 7,
        "ff868124287232a4": 6,
    }


def test_every_carried_figure_has_a_reviewed_verdict() -> None:
    words = {str(finding) for finding in Finding}
    assert all(item.verdict in words for item in published.read(SHIPPED))


def test_every_figure_of_the_five_reports_carries_where_it_is_known_from() -> None:
    claims = [item for item in published.read(SHIPPED) if item.report.name in FIVE]
    assert len(claims) == 134
    for item in claims:
        assert item.report.title, item.id
        assert item.report.told, item.id
        if item.report.provenance.program:
            assert item.rule or not item.metric.startswith("perplexity"), item.id
            assert item.timing or item.unit not in ("s", "ms"), item.id


def test_claims_lie_where_the_project_says_else_in_the_package(tmp_path: Path) -> None:
    declared = Declared(tmp_path, claims=("mine.toml",))
    assert published.places(declared) == (tmp_path / "mine.toml",)
    assert published.places(Declared(tmp_path)) == (SHIPPED,)
    (tmp_path / "baselines" / "published").mkdir(parents=True)
    assert published.places(Declared(tmp_path)) == (tmp_path / "baselines" / "published",)
    write(tmp_path, MINIMAL)
    assert [item.id for item in published.read(tmp_path / "r.toml")] == ["r/a/m/memory"]
    with pytest.raises(MissingAsset, match="--claims"):
        published.read(tmp_path / "nothing.toml")


def test_a_paper_of_ones_own_may_bring_its_architecture(tmp_path: Path) -> None:
    """Two layers of width 8 over a vocabulary of 10 and 4 positions: what nobody's catalogue holds."""
    own = MINIMAL.replace('model = "gpt2"', 'model = "mine"').replace(
        "[[claim]]",
        '[architecture]\nmodel_type = "gpt2"\nvocab_size = 10\nn_positions = 4\nn_embd = 8\nn_layer = 2\nn_head = 2\n'
        "[[claim]]",
    )
    (found,) = published.read(write(tmp_path, own.replace('"1.50"\nunit = "MiB"', '"0.007600"\nunit = "MB"')))
    layer = 4 * 8 + 8 * 24 + 24 + 8 * 8 + 8 + 8 * 32 + 32 + 32 * 8 + 8  # norms, attention, MLP
    assert found.printed(4 * (10 * 8 + 4 * 8 + 2 * layer + 2 * 8)) == Decimal("0.007488")
    (wrong,) = published.judge([replace(found, convention=Convention())])
    assert wrong.finding is Finding.REFUTED
    assert "gives 0.007488" in wrong.note


def test_printed_is_the_claims_unit_and_digits() -> None:
    assert claim(published="474.70").printed(497_759_232) == Decimal("474.70")
    assert claim(published="474.7").printed(497_759_232) == Decimal("474.7")
    assert claim(published="497.759232", unit="MB").printed(497_759_232) == Decimal("497.759232")


def test_count_by_hand() -> None:
    assert count(SMALL, Convention()).total == 4 * 33
    found = count(SMALL, Convention(quantized=LINEAR, remainder="fp16", scales="fp32 per output channel"))
    assert (found.quantized, found.remainder, found.scales) == (12, 2 * 21, 4 * 6)
    four_bits = count(SMALL, Convention(quantized=(TensorGroup(("*.c_attn.weight",), 4, (1, 1)),)))
    assert (four_bits.quantized, four_bits.remainder) == (3, 4 * 27)


def test_count_of_what_else_reports_count() -> None:
    masks = count(SMALL, Convention(masks="bool a position pair and an fp32 scalar a layer"))
    assert masks.masks == 2 * (16 + 4)
    assert count(SMALL, Convention(rotary="fp32 per layer")).rotary == 2 * 7 * 4
    copied = Convention(quantized=LINEAR, scales="fp32 per output channel", head="copied at 8 bits")
    assert count(SMALL, copied).head_copy == 10 + 4 * 5
    assert count(SMALL, Convention(head="copied at 32 bits")).head_copy == 40
    assert count(SMALL, Convention(rotary="fp32 per layer and one more")).rotary == 3 * 7 * 4
    bias = Convention(quantized=(TensorGroup(("*.c_attn.*",), 8),), scales="fp32 per output channel, one a vector")
    assert count(SMALL, bias).scales == 4 * (3 + 1 + 3)
    assert count(SMALL, Convention(quantized=LINEAR, scales="fp32 per 64 and a table")).scales == 2 * 64


def test_an_allocator_hands_out_blocks() -> None:
    """512 bytes; from 10 MiB on segments of 2 MiB, kept whole where 1 MiB or less is left over."""
    mib = 2**20
    assert [block(size) for size in (1, 512, 513, 9 * mib)] == [512, 512, 1024, 9 * mib]
    assert [block(size) for size in (27 * mib, 28 * mib)] == [28 * mib, 28 * mib]
    assert block(10 * mib + 512) == 10 * mib + 512  # nearly 2 MiB are left, which are split off
    assert block(197_001_216) == 188 * mib  # an embedding of Phi-3-mini in fp16: 187.875 MiB


def test_what_lies_on_the_first_card() -> None:
    first = count(SMALL, Convention(holds=(0, 0)))
    assert first.remainder == 4 * (10 + 6 + 3 + 8)
    assert count(SMALL, Convention(holds=(0, 1))).total == count(SMALL, Convention()).total
    assert count(SMALL, Convention(allocated=True)).total == 5 * 512


def test_sums_of_any_choice_of_tensors() -> None:
    sums = reachable([1, 3, 3])
    assert [number for number in range(9) if sums >> number & 1] == [0, 1, 3, 4, 6, 7]


def test_a_group_that_takes_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no parameter is called"):
        count(SMALL, Convention(quantized=(TensorGroup(("*.q_proj.weight",), 8),)))


def test_layers_and_words() -> None:
    late = TensorGroup(("*.weight",), 8, (11, 12))
    named = ("model.layers.11.mlp.up_proj.weight", "model.layers.10.mlp.up_proj.weight", "lm_head.weight")
    assert [covers(late, name) for name in named] == [True, False, False]
    words = describe(Convention(quantized=(TensorGroup(("*.a",), 8, (0, 11)),), masks=Convention().masks))
    assert words == "*.a in layers 0-11 at 8 bits, the rest in fp32, no scales"


def judgements() -> list[Judgement]:
    infinite = claim(metric="perplexity", published="inf", unit="ppl")
    return [
        Judgement(claim(), Finding.REPRODUCED, "a | b *c*", Decimal("1.5"), 3 * 2**20, "do"),
        Judgement(infinite, Finding.REFUTED, "why"),
    ]


def entries() -> list[dict[str, Any]]:
    return [published.entry(judgement) for judgement in judgements()]


def test_json_is_strict_and_complete() -> None:
    first, second = json.loads(published_json(entries()))["claims"]
    assert set(first) >= {
        "report", "part", "method", "metric", "published", "unit", "convention", "ours", "verdict", "note", "command",
    }  # fmt: skip
    assert (first["published"], first["ours"], first["verdict"]) == (1.5, 1.5, "reproduced")
    assert (second["published"], second["ours"], second["verdict"]) == ("inf", None, "refuted")


def test_table_and_section_count_and_escape() -> None:
    counted = "2 figures: 1 reproduced, 1 refuted. Memory: 1 of 1 figures reproduced."
    table, section = published.table(entries()), published.section(entries())
    assert table.endswith(counted)
    assert section.startswith(counted)
    assert r"a \| b \*c\*" in section
    assert "1.50 MiB" in table
    assert "Ratios of times" not in section


def test_entries_survive_a_report_directory(tmp_path: Path) -> None:
    assert published_of(tmp_path) == ()
    ReportDirectory(tmp_path).put({PUBLISHED: published_json(entries())})
    assert published.section(published_of(tmp_path)) == published.section(entries())


@pytest.mark.parametrize("text", ["{", "[]", '{"claims": [{}]}', '{"claims": [{"report": 1}]}'])
def test_a_bad_file_of_entries_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "published.json").write_text(text)
    with pytest.raises(BadFile, match="run `pytest -m published` again") as caught:
        published_of(tmp_path)
    assert "\n" not in str(caught.value)


def row(metric: str, method: str, ratio: float) -> Row:
    logs = {"log_ratio": np.log(ratio), "log_ratio_low": np.log(ratio / 2), "log_ratio_high": np.log(ratio * 2)}
    return Row("tiny", method, metric, "cpu", "fp32", value=1.0, unit="s", detail=logs)


def timed(timed: str, specification: str, ratio: str, **changes: object) -> dict[str, Any]:
    """The entry of a time whose published ratio to its reference is `ratio`."""
    report = dataclasses.replace(REPORT, timed=timed)
    found = claim(report=report, specification=specification, metric="latency_s", published="8", unit="s", **changes)
    return published.entry(Judgement(found, Finding.UNDERSPECIFIED, "why", ratio=Decimal(ratio)))


def test_ratios_stand_beside_what_the_report_timed() -> None:
    measured = of_rows(
        [
            row("latency.forward", "nf4:attention", 5.0),
            row("latency.forward", "nf4", 2.0),
            row("latency.prefill", "nf4", 3.0),
            row("latency.decode", "fp4", 9.0),
            row("latency.generate", "fp4", math.nan),
        ]
    )
    forward, generate, other = beside(
        [timed("forward", "nf4", "2.1"), timed("generate", "fp4:names=*.x", "0.5"), timed("forward", "fp4", "1")],
        measured,
    )
    assert (forward["our_ratio"]["value"], forward["our_ratio"]["metric"]) == (pytest.approx(2), "latency.forward")
    assert forward["why_ratio"] == "alike"
    assert generate["our_ratio"]["metric"] == "latency.decode"
    assert "faster there, slower here" in generate["why_ratio"]
    assert "latency.decode stands in for the report's generate" in generate["why_ratio"]
    assert "ours with every projection quantized" in generate["why_ratio"]
    assert other["our_ratio"] is None  # fp4 was not timed over a forward
    section = published.section([forward, generate, other])
    assert r"| 8 s | 2.100 | 2.000 \[1.000, 4.000\] | latency.forward | alike |" in section
    assert "tiny, cpu" in section
    assert section.count("latency.decode") == 2


def test_a_reason_says_which_way_and_how_far() -> None:
    measured = of_rows([row("latency.forward", "bnb-nf4", 8.0)])
    slower, refuted = timed("forward", "bnb-nf4", "1.5"), timed("forward", "bnb-nf4", "0.5")
    told = beside([slower, {**refuted, "verdict": "refuted"}], measured)
    assert told[0]["why_ratio"].startswith("slower in both, 5.3 times the published ratio here; bitsandbytes")
    assert "none of what they are called" in told[1]["why_ratio"]
    real = beside([{**refuted, "verdict": "refuted", "true_ratio": 8.1}], measured)
    assert real[0]["why_ratio"] == "alike"  # by the run's other outputs
    assert "8.100 (printed 0.500)" in published.section(real)


def test_ratios_of_recorded_figures() -> None:
    found = of_baselines(BASELINES)
    assert {("absmax-int8", "latency.prefill"), ("bnb-nf4", "latency.decode")} <= set(found)
    assert all(ratio.low <= ratio.value <= ratio.high for ratio in found.values())
    assert "smollm2-135m" in found["bnb-nf4", "latency.decode"].where
    assert of_baselines(BASELINES / "nothing") == {}


def test_within_holds_to_the_printed_digits_or_the_slack() -> None:
    anchor = claim(published="37.37", unit="ppl")
    assert within(anchor, 37.3749)
    assert not within(anchor, 37.3751)
    assert within(replace(anchor, slack="0.02"), 37.389)
    assert not within(replace(anchor, slack="0.02"), 37.391)


def test_the_ports_reading() -> None:
    corpus = Corpus("w", (" = A = \n", "", "text \n"), "wikitext", "rev")
    assert as_port(corpus).joined("half").texts == (" = A = \n \ntext \n",)
    window = Window(np.array([3, 4, 5], dtype=np.int64), 2)
    plan = led_by(TokenPlan("half:3", "id", "hash", 3, (window,), "token"), 9)
    assert plan.windows[0].ids.tolist() == [9, 4, 5]
    assert window.ids.tolist() == [3, 4, 5]
