"""Comparing two sessions: each verdict with its numbers by hand, what is refused, and the exit status."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import harness
from harness.core import catalog
from harness.core.contracts import Member
from harness.core.errors import BadFile, HarnessError, MissingAsset
from harness.core.records import Case, Row, Verdict
from harness.core.stats import student_quantile
from harness.core.values import digest
from harness.judge.bounds import Bounds, load
from harness.judge.two_reports import Comparison, Entry, compare
from harness.report.comparison import render_comparison
from harness.results.directory import Nll

COUNTS = [4] * 10  # ten windows of four tokens
MEMBERS = {
    member.name: member
    for member in (
        Member("perplexity", "ppl", "lower"),
        Member("perplexity.delta", "nat", "lower", paired=True),
        Member("memory.storage", "B", "lower", exact=True),
        Member("memory.run_peak", "B", "lower"),
        Member("latency.decode", "s", "lower", timed=True),
        Member("divergence.same_top", "share", "higher"),
        Member("divergence.kl", "nat", "lower"),
        Member("odd.number", "", "neither"),
    )
}
Losses = Mapping[str, NDArray[np.float32]]


@pytest.fixture(autouse=True)
def catalogued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "member", MEMBERS.get)


def row(metric: str, value: float | None, method: str = "nf4", **more: Any) -> Row:
    text = metric.partition(".")[0] in ("perplexity", "divergence", "odd")
    case = Case("m", method, "lee" if text else "", "chunk:4" if text else "", metric, "cpu")
    more.setdefault("verdict", Verdict.MISSING if value is None else Verdict.SAME)
    more.setdefault("unit", MEMBERS[metric].unit)
    return Row.of(case, value=value, **more)


def nowhere(sha: str) -> NDArray[np.float32] | None:
    return None


def lookup(losses: Losses | None) -> Nll:
    return lambda name: (losses or {}).get(name)


def both(a: Row, b: Row, losses_a: Losses | None = None, losses_b: Losses | None = None) -> Entry:
    (entry,) = compare([a], [b], lookup(losses_a), lookup(losses_b)).entries
    return entry


def sha(values: NDArray[np.float32]) -> str:
    return digest(values.astype("<f4").tobytes().hex())


def text(metric: str, values: NDArray[np.float32], value: float | None = None, **more: Any) -> Row:
    value = math.exp(float(values.mean())) if value is None else value
    return row(metric, value, nll=sha(values), detail={"window_counts": COUNTS}, **more)


def shifted(base: NDArray[np.float32], shift: float, wobble: float = 0.0) -> NDArray[np.float32]:
    """The base plus a shift, and a wobble that alternates between windows."""
    signs = np.repeat([1, -1] * 5, 4)
    return (base + np.float32(shift) + np.float32(wobble) * signs).astype(np.float32)


BASE = np.random.default_rng(5).uniform(1, 4, 40).astype(np.float32)


@pytest.mark.parametrize(
    ("shift", "wobble", "verdict"),
    [
        (0.02, 0.002, Verdict.WORSE),
        (-0.02, 0.002, Verdict.BETTER),
        (0.002, 0.02, Verdict.WORSE),  # tokens beyond what fp32 rounds, though the mean did not move
        (5e-7, 0.0, Verdict.WITHIN_NOISE),
    ],
)
def test_perplexity_is_decided_token_by_token(shift: float, wobble: float, verdict: Verdict) -> None:
    after = shifted(BASE, shift, wobble)
    entry = both(text("perplexity", BASE), text("perplexity", after), {sha(BASE): BASE}, {sha(after): after})
    assert entry.verdict is verdict
    assert entry.paired
    assert entry.change == pytest.approx(shift, abs=2e-6)
    # forty tokens that moved by shift +- wobble: s = wobble sqrt(40/39), and 1e-6 a run
    reach = student_quantile(0.95, 39) * math.hypot(wobble / math.sqrt(39), 1e-6)
    assert entry.low == pytest.approx(shift - reach, abs=2e-5)
    assert entry.high == pytest.approx(shift + reach, abs=2e-5)


def test_identical_losses_are_the_same_even_without_the_files() -> None:
    assert both(text("perplexity", BASE), text("perplexity", BASE)).verdict is Verdict.SAME
    entry = both(text("perplexity", BASE), replace(text("perplexity", BASE), nll=""))
    assert (entry.verdict, entry.reason) == (Verdict.WITHIN_NOISE, "values only, nothing was paired")


def test_values_alone_decide_on_the_same_tokens() -> None:
    entry = both(row("perplexity", 20.0), row("perplexity", 22.0))
    assert (entry.verdict, entry.paired) == (Verdict.WORSE, False)
    assert entry.change == pytest.approx(math.log(1.1))
    assert entry.reason == "values only, nothing was paired"


def test_fewer_than_eight_windows_decide_too() -> None:
    after = shifted(BASE, 0.004)
    a, b = (replace(text("perplexity", values), detail={"window_counts": [20, 20]}) for values in (BASE, after))
    entry = both(a, b, {sha(BASE): BASE}, {sha(after): after})
    assert (entry.verdict, entry.reason, entry.paired) == (Verdict.WORSE, "paired over 40 tokens", True)


def test_a_change_in_one_window_alone_is_seen() -> None:
    """As against a record: over windows t is 1 whatever its size, yet the figure is another."""
    after = BASE.copy()
    after[36:] += 1
    entry = both(text("perplexity", BASE), text("perplexity", after), {sha(BASE): BASE}, {sha(after): after})
    assert entry.verdict is Verdict.WORSE


def test_another_figure_from_the_same_losses_is_no_longer_the_same() -> None:
    a, b = text("perplexity", BASE, 20.0), text("perplexity", BASE, 20.1)
    entry = both(a, b, {sha(BASE): BASE}, {sha(BASE): BASE})
    assert (entry.verdict, entry.reason) == (Verdict.WORSE, "bit-identical losses, but what is made of them changed")
    assert both(a, replace(b, value=20.0 + 1e-12)).verdict is Verdict.SAME  # a sum in another order


def test_window_counts_that_do_not_fit_the_losses_are_not_paired() -> None:
    after = shifted(BASE, 0.02)
    a, b = (replace(text("perplexity", values), detail={"window_counts": [4] * 9}) for values in (BASE, after))
    assert not both(a, b, {sha(BASE): BASE}, {sha(after): after}).paired


def test_a_delta_is_paired_through_the_references_of_both_sides() -> None:
    moved = shifted(BASE, 0.5)  # the libraries moved the reference, and the candidate with it
    candidate_a, candidate_b = shifted(BASE, 0.1), shifted(moved, 0.1 + 0.03, 0.001)
    losses = {sha(values): values for values in (BASE, moved, candidate_a, candidate_b)}
    sides = []
    for reference, candidate in ((BASE, candidate_a), (moved, candidate_b)):
        detail = {"window_counts": COUNTS, "reference_nll": sha(reference)}
        delta = replace(text("perplexity.delta", candidate, 0.1), detail=detail)
        sides.append([text("perplexity", reference, method="fp32"), delta])
    found = {entry.case.metric: entry for entry in compare(sides[0], sides[1], lookup(losses), lookup(losses)).entries}
    assert found["perplexity"].change == pytest.approx(0.5, abs=1e-6)
    assert found["perplexity.delta"].change == pytest.approx(0.03, abs=1e-5)
    assert found["perplexity.delta"].verdict is Verdict.WORSE
    del losses[sha(moved)]
    alone = compare(sides[0][1:], sides[1][1:], lookup(losses), lookup(losses)).entries
    assert not alone[0].paired


@pytest.mark.parametrize(
    ("a", "b", "verdict", "reason"),
    [
        (20.0, math.nan, Verdict.WORSE, "not finite in B"),
        (math.inf, 20.0, Verdict.BETTER, "not finite in A"),
        (math.nan, math.inf, Verdict.UNUSABLE, "not finite on both sides"),
    ],
)
def test_values_that_are_not_finite(a: float, b: float, verdict: Verdict, reason: str) -> None:
    entry = both(row("perplexity", a), row("perplexity", b))
    assert (entry.verdict, entry.reason) == (verdict, reason)


@pytest.mark.parametrize("field", ["protocol_id", "token_hash"])
def test_other_tokens_or_protocols_are_a_changed_input_by_field(field: str) -> None:
    entry = both(row("perplexity", 20.0, **{field: "one"}), row("perplexity", 20.0, **{field: "two"}))
    assert entry.verdict is Verdict.INPUT_CHANGED
    assert entry.reason == f"{field.replace('_', ' ')}: one -> two"
    assert Comparison((entry,)).status == 1


def test_missing_on_either_side() -> None:
    full, empty = row("perplexity", 20.0), row("perplexity", None, reason="out of memory")
    assert (both(full, empty).verdict, both(full, empty).reason) == (Verdict.MISSING, "missing in B: out of memory")
    assert (both(empty, full).verdict, both(empty, full).reason) == (Verdict.UNUSABLE, "missing in A: out of memory")
    assert both(empty, empty).reason == "missing in both: out of memory"


@pytest.mark.parametrize(
    ("metric", "a", "b", "verdict", "reason"),
    [
        ("memory.storage", 1000, 1000, Verdict.SAME, "equal values"),
        ("memory.storage", 1000, 1001, Verdict.WORSE, "+1 B, exact"),
        ("memory.storage", 1001, 1000, Verdict.BETTER, "-1 B, exact"),
        ("memory.run_peak", 1000, 1090, Verdict.WITHIN_NOISE, "observed once; noise up to 10%"),
        ("memory.run_peak", 1000, 1110, Verdict.WORSE, "observed once; noise up to 10%"),
        ("memory.run_peak", 1000, 910, Verdict.WITHIN_NOISE, "observed once; noise up to 10%"),
        ("memory.run_peak", 1000, 890, Verdict.BETTER, "observed once; noise up to 10%"),
        ("odd.number", 1, 2, Verdict.WORSE, "values differ and no direction is better"),
        ("divergence.kl", 1, 1.02, Verdict.WORSE, "exact on this text; noise up to 0.01000 nat"),
        ("divergence.kl", 1, 1.005, Verdict.WITHIN_NOISE, "exact on this text; noise up to 0.01000 nat"),
        ("divergence.same_top", 0.8, 0.79, Verdict.WORSE, "exact on this text; noise up to 0.002000 share"),
        ("divergence.same_top", 0.8, 0.8 + 1e-12, Verdict.SAME, "equal values"),
    ],
)
def test_bytes_and_other_values(metric: str, a: float, b: float, verdict: Verdict, reason: str) -> None:
    entry = both(row(metric, float(a)), row(metric, float(b)))
    assert (entry.verdict, entry.reason) == (verdict, reason)


def test_a_metric_that_nobody_here_brings_is_only_told_equal_or_not() -> None:
    a = Row.of(Case("m", "nf4", "", "", "speed.unheard", "cpu"), value=1.0, unit="x")
    found = [compare([a], [replace(a, value=value)], nowhere, nowhere).entries[0].verdict for value in (1.0, 1.1)]
    assert found == [Verdict.SAME, Verdict.UNUSABLE]


@pytest.mark.parametrize("whose", ["A", "B"])
def test_a_loss_that_its_reference_broke_decides_nothing(whose: str) -> None:
    fine = row("perplexity.delta", 0.1)
    lost = row("perplexity.delta", math.nan, detail={"non_finite": 0, "reference_non_finite": 3})
    entry = both(lost, fine) if whose == "A" else both(fine, lost)
    assert (entry.verdict, entry.reason) == (
        Verdict.UNUSABLE,
        f"not finite in {whose}: its reference's losses are not",
    )
    own = replace(lost, detail={"non_finite": 2, "reference_non_finite": 3})
    assert both(fine, own).verdict is Verdict.WORSE


def test_parts_of_a_text_are_compared_only_where_they_are_the_same_part() -> None:
    detail = {"tokens_used": 40, "tokens_available": 80, "decided": "below", "whole": False}
    a, whole = row("perplexity.delta", 0.1, detail=detail), row("perplexity.delta", 0.1)
    more = replace(a, detail={**detail, "tokens_used": 60})
    for earlier, later in ((a, whole), (whole, a), (more, a)):
        entry = both(earlier, later)
        assert entry.verdict is Verdict.NOT_COMPARABLE
        assert entry.reason == "stopped early (below) after 40 of 80 tokens: no whole-text figure"
    assert both(a, replace(a, value=0.1 + 1e-6)).verdict is Verdict.WITHIN_NOISE


def test_a_text_is_named_by_its_content_and_not_by_its_file() -> None:
    a, b = (row("perplexity", 20.0, protocol_id=f"text: text:{name}, revision abc; tokens: all") for name in "xy")
    assert both(a, b).verdict is Verdict.SAME
    assert both(a, replace(b, protocol_id=b.protocol_id.replace("abc", "abd"))).verdict is Verdict.INPUT_CHANGED


def time(ratio: float, reach: float, floor: float = 0.02, **more: Any) -> Row:
    middle = math.log(ratio)
    ends = {"log_ratio": middle, "log_ratio_low": middle - reach, "log_ratio_high": middle + reach}
    return row("latency.decode", 0.1, detail={**ends, "aa_floor": floor, "prompt_tokens": 128, **more})


@pytest.mark.parametrize(
    ("before", "after", "reach", "verdict"),
    [
        (1.0, 1.2, 0.03, Verdict.WORSE),  # at least 1.2 exp(-0.042) = 1.15, above the allowed 1.10
        (1.2, 1.0, 0.03, Verdict.BETTER),
        (1.0, 1.03, 0.03, Verdict.WITHIN_NOISE),
        (1.0, 1.12, 0.03, Verdict.WITHIN_NOISE),  # 1.07 to 1.17: narrow enough to have shown a tenth, and did not
        (1.0, 1.03, 0.2, Verdict.WITHIN_NOISE),
        (1.0, 1.03, 0.3, Verdict.UNUSABLE),  # half as much again could hide in it
    ],
)
def test_times_are_compared_through_their_ratio(before: float, after: float, reach: float, verdict: Verdict) -> None:
    entry = both(time(before, reach), time(after, reach))
    assert entry.verdict is verdict
    assert entry.change == pytest.approx(math.log(after / before))
    assert entry.high == pytest.approx(math.log(after / before) + reach * math.sqrt(2))
    assert entry.low == pytest.approx(math.log(after / before) - reach * math.sqrt(2))


def test_a_change_within_the_larger_floor_is_noise() -> None:
    assert both(time(1.0, 0.01), time(1.2, 0.01)).verdict is Verdict.WORSE
    assert both(time(1.0, 0.01), time(1.2, 0.01, floor=0.25)).verdict is Verdict.WITHIN_NOISE


def test_a_repositorys_own_bounds_decide_what_is_noise(tmp_path: Path) -> None:
    def floors(nats: float) -> Bounds:
        rule = f'schema = 1\n[[floor]]\nmetrics = ["perplexity"]\nat_most = {nats}\nreason = "test"\n'
        (tmp_path / "bounds.toml").write_text(rule)
        return load(tmp_path)

    after = shifted(BASE, 0.02, 0.002)
    losses = lookup({sha(BASE): BASE, sha(after): after})
    rows = [text("perplexity", BASE)], [text("perplexity", after)]
    found = [compare(*rows, losses, losses, bounds=floors(nats)) for nats in (0.001, 0.05)]
    assert [item.entries[0].verdict for item in found] == [Verdict.WORSE, Verdict.WITHIN_NOISE]


def test_other_weights_or_arguments_are_noted() -> None:
    a, b = (row("memory.storage", 1.0, revision=name, method_id=f"nf4:{name}") for name in ("old", "new"))
    notes = compare([a], [b], nowhere, nowhere).notes
    assert notes == ("weights of m differ: old -> new", "arguments of nf4 differ: nf4:old -> nf4:new")


def test_times_without_a_ratio_or_of_other_lengths() -> None:
    assert both(time(1.0, 0.1), row("latency.decode", 0.2, detail={"prompt_tokens": 128})).verdict is Verdict.UNUSABLE
    assert both(time(1.0, 0.1), time(1.0, 0.1, log_ratio_usable=False)).verdict is Verdict.UNUSABLE
    entry = both(time(1.0, 0.1), time(1.0, 0.1, prompt_tokens=512))
    assert entry.reason == "prompt_tokens: 128 -> 512"


def test_the_references_own_time_is_shown_and_not_judged() -> None:
    entry = both(row("latency.decode", 0.1, "fp32"), row("latency.decode", 0.2, "fp32"))
    assert entry.verdict is None
    assert entry.change == pytest.approx(math.log(2))
    comparison = Comparison((entry,))
    assert comparison.status == 0
    assert "1 only shown" in render_comparison(comparison)


@pytest.mark.parametrize(
    ("verdicts", "status"),
    [
        (["same", "within noise", "better"], 0),
        (["same", "worse", "unusable"], 1),
        (["missing"], 1),
        (["same", "unusable"], 3),
        (["not comparable"], 3),
    ],
)
def test_the_exit_status(verdicts: list[str], status: int) -> None:
    entry = both(row("memory.storage", 1.0), row("memory.storage", 1.0))
    assert Comparison(tuple(replace(entry, verdict=Verdict(verdict)) for verdict in verdicts)).status == status


def test_nothing_in_common_is_a_users_mistake() -> None:
    with pytest.raises(HarnessError, match="nothing to compare: A has 1 cases, B has 1, and none is in both"):
        compare([row("memory.storage", 1.0)], [row("memory.storage", 1.0, "fp4")], nowhere, nowhere)


def test_the_environment_is_no_obstacle_and_its_difference_is_printed() -> None:
    a, b = row("memory.storage", 1.0, environment="1"), row("memory.storage", 1.0, environment="2")
    comparison = compare(
        [a, row("memory.storage", 2.0, "fp4")],
        [b],
        nowhere,
        nowhere,
        environments_a={"1": {"versions": {"bitsandbytes": "0.48.2", "torch": "2.9"}, "threads": 2}},
        environments_b={"2": {"versions": {"bitsandbytes": "0.50.2", "torch": "2.9"}}},
    )
    assert comparison.environment == ("versions.bitsandbytes: 0.48.2 -> 0.50.2", "threads: 2 -> (none)")
    assert comparison.only_a == (row("memory.storage", 2.0, "fp4").case,)
    found = render_comparison(comparison)
    assert found.startswith("# A against B\n\n**Same**: 1 case: 1 same. Every figure is equal.\n\n- Memory: 1 same.\n")
    assert "- versions.bitsandbytes: 0.48.2 -> 0.50.2" in found
    assert "Only in A: 1 case (m, fp4)." in found


def test_the_rendered_comparison_puts_harm_first_and_escapes() -> None:
    entries = compare(
        [row("memory.storage", 2.0**20, "a|b"), time(1.0, 1.0)],
        [row("memory.storage", 2.0**21, "a|b"), time(1.1, 1.0)],
        nowhere,
        nowhere,
        notes=["\x1b[31mred"],
    )
    found = render_comparison(entries)
    assert found.startswith("# A against B\n\n**Harm**: 2 cases: 1 worse, 1 unusable.")
    worse, unusable = found.index("- **worse**: `m`, a\\|b, `memory.storage`: 2.0000: "), found.index("- **unusable**")
    assert worse < unusable
    assert "| a\\|b" in found
    assert "1.00 MiB | 2.00 MiB |" in re.sub(" +", " ", found)
    assert "\x1b" not in found


def write(folder: Path, values: NDArray[np.float32], identity: str = "") -> Path:
    (folder / "nll").mkdir(parents=True)
    np.savez_compressed(folder / "nll" / f"{sha(values)}.npz", nll=values)
    line = replace(text("perplexity", values), environment="e", revision="r", identity=identity).to_json()
    (folder / "identities.json").write_text(json.dumps({identity: {"config.rope_theta": identity}}))
    (folder / "measurements.jsonl").write_text(line + "\n")
    (folder / "environments.json").write_text(json.dumps({"e": {"threads": len(folder.name)}}))
    return folder


def test_directories_are_paired_and_bare_files_are_not(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", BASE), write(tmp_path / "bb", shifted(BASE, 0.02, 0.002))
    paired = harness.compare(a, b)
    assert (paired.status, paired.paired) == (1, 1)
    assert paired.environment == ("threads: 1 -> 2",)
    assert "1 compared token by token." in render_comparison(paired)
    bare = harness.compare(a / "measurements.jsonl", b / "measurements.jsonl")
    assert (bare.status, bare.paired) == (1, 0)  # on the same tokens the two values say it too
    assert "**Nothing was paired: values only.**" in render_comparison(bare)


def test_an_edited_config_is_a_changed_input_named_by_the_fact(tmp_path: Path) -> None:
    a, b = (write(tmp_path / name, BASE, name) for name in ("10000", "9000"))
    (entry,) = harness.compare(a, b).entries
    assert (entry.verdict, entry.reason) == (Verdict.INPUT_CHANGED, "config.rope_theta: 10000 -> 9000")


def test_bad_paths_and_corrupted_losses_are_one_line(tmp_path: Path) -> None:
    a = write(tmp_path / "a", BASE)
    with pytest.raises(MissingAsset, match="holds no measurements"):
        harness.compare(a, tmp_path / "absent")
    b = write(tmp_path / "b", shifted(BASE, 0.02))
    next((b / "nll").iterdir()).write_bytes(b"PK")
    with pytest.raises(BadFile, match="cannot be read"):
        harness.compare(a, b)


def test_comparing_loads_no_torch_and_no_matplotlib(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", BASE), write(tmp_path / "b", BASE)
    program = (
        "import sys, harness; found = harness.compare(sys.argv[1], sys.argv[2]); harness.render(found)\n"
        "print(found.status, {'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program, str(a), str(b)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0 set()"


def test_a_report_against_itself_is_the_same(tmp_path: Path) -> None:
    a = write(tmp_path / "a", BASE)
    found = render_comparison(harness.compare(a, a))
    assert found.startswith("# A against B\n\n**Same**: 1 case: 1 same. Every figure is equal.\n\n- Quality: 1 same.\n")


def test_nothing_that_compares_is_no_harmless_outcome() -> None:
    a, b = (row("perplexity", 20.0, unit=name) for name in ("ppl", "nat"))
    found = render_comparison(compare([a], [b], nowhere, nowhere))
    assert found.startswith("# A against B\n\n**Nothing to compare with**: 1 case: 1 not comparable.")


def test_times_are_shown_as_ratios_and_the_references_in_milliseconds() -> None:
    pairs = [(time(1.0, 0.03), time(1.2, 0.03))]
    pairs.append((row("latency.decode", 0.1, "fp32"), row("latency.decode", 0.2, "fp32")))
    found = render_comparison(compare([a for a, _ in pairs], [b for _, b in pairs], nowhere, nowhere))
    plain = re.sub(" +", " ", found)
    assert "| `nf4` | `latency.decode` | 1.0000 [0.9704, 1.0305] | 1.2000 [1.1645, 1.2365] | 1.2000 [" in plain
    assert "| `fp32` | `latency.decode` | 100 ms | 200 ms |" in plain
