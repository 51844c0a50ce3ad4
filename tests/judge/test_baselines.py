"""Baseline files: names that never collide, round trips, which file serves, what is refused, and what is written."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.core.contracts import Member
from harness.core.environment import Environment
from harness.core.errors import BadFile
from harness.core.records import Case, Row, Verdict
from harness.judge import baselines as facts
from harness.judge.baselines import (
    Baselines,
    Recorded,
    exact_document,
    exact_facts,
    exact_path,
    holds,
    overlay_path,
    provenance,
    read_exact,
    read_overlay,
    record,
    rounded,
    stem,
    to_record,
    token_limit,
    validate,
    write_overlay,
)
from harness.results import losses as nllfiles

WORLD = Environment(torch="2.13.0", bitsandbytes="0.50.2", instructions="avx2 avx512", threads=2, machine="a" * 16)
PERPLEXITY = Member("perplexity", "ppl", "lower")
STORAGE = Member("memory.storage", "B", "lower", exact=True, textual=False)
CASE = Case("gpt2", "nf4", "lee", "chunk:512", "perplexity", "cpu")
DECODE = Case("gpt2", "nf4", "", "", "latency.decode", "cpu")
PROTOCOL = "text: lee, revision abc; tokens: the first 4096, tokenizer x, bos=0; windows: 512"


def row(value: float = 30.5, **more: Any) -> Row:
    facts: dict[str, Any] = {"protocol_id": PROTOCOL, "token_hash": "f" * 64, "revision": "r" * 40}
    facts |= {"detail": {"tokens": 4096, "floor": 1e-4}, "environment": WORLD.id, "unit": "ppl", "count": 4088}
    return Row.of(CASE, **{**facts, "value": value, **more})


def latency(value: float = 0.05, **more: Any) -> Row:
    detail = {"log_ratio": 0.5, "log_ratio_low": 0.4, "log_ratio_high": 0.6, "aa_floor": 0.02, "p90": 1.0}
    facts: dict[str, Any] = {"unit": "s", "samples": (0.04, 0.05, 0.06), "count": 3, "detail": detail}
    return Row.of(DECODE, **{**facts, "value": value, "environment": WORLD.id, **more})


def worlds(*environments: Environment) -> dict[str, Any]:
    return {world.id: world.to_dict() for world in environments}


# names

words = st.text(st.sampled_from("ab-_.+@%/ ~=*é"), min_size=1, max_size=6)
specifications = st.one_of(
    words.filter(str.strip).map(lambda text: f"path:{text}"),
    st.lists(st.from_regex(r"[a-z0-9][a-z0-9_.-]{0,5}", fullmatch=True), min_size=1, max_size=3).map(":".join),
).map(str.strip)


@settings(max_examples=60)
@given(specifications, specifications)
def test_two_specifications_never_share_a_file(first: str, second: str) -> None:
    assert (stem(first) == stem(second)) == (first == second)
    assert "/" not in stem(first)
    assert "@" not in stem(first)


def test_names_that_other_tools_confuse_are_two() -> None:
    assert stem("gpt2-nf4") != stem("gpt2_nf4")
    assert stem("nf4:block=128") == "nf4+block=128"
    assert stem("hub:org/name@main") == "hub+org%2Fname%40main"


def test_a_very_long_name_stays_within_a_file_system_and_apart() -> None:
    first, second = (stem(f"path:{'x' * 300}{end}") for end in "ab")
    assert len(first) == len(second) == 120
    assert first != second


def test_paths() -> None:
    assert exact_path(Path("baselines"), CASE) == Path("baselines/gpt2/nf4.yaml")
    assert overlay_path(Path("baselines"), "gpt2", "nf4", "cpu:avx512") == Path("baselines/gpt2/nf4@cpu+avx512.yaml")


# entries

finite = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12)
entries = st.builds(
    Recorded,
    metric=st.sampled_from(["perplexity", "latency.decode"]),
    device=st.just("cpu"),
    value=finite,
    unit=st.just("ppl"),
    count=st.integers(0, 2**40),
    dataset=texts,
    protocol=texts,
    spread=st.none() | finite,
    interval=st.none() | st.just((-math.inf, math.inf)) | finite.map(lambda low: (low, math.inf)),
    floor=st.none() | finite,
    token_hash=st.sampled_from(["", "0123456789", "12e5", "null", "1_000", "2026-11-22"]),
    detail=st.dictionaries(st.sampled_from(["log_ratio", "aa_floor"]), finite, max_size=2),
    recorded=st.just("2026-11-22T03:00:00Z"),
    environment=st.builds(Environment, torch=texts, threads=st.integers(0, 99), dirty=st.booleans()),
)


@settings(max_examples=60)
@given(entries)
def test_an_entry_survives_the_file(tmp_path_factory: pytest.TempPathFactory, entry: Recorded) -> None:
    path = overlay_path(tmp_path_factory.mktemp("baselines"), "gpt2", "nf4", "cpu:avx512")
    write_overlay(path, "gpt2", "nf4", "cpu:avx512", [entry])
    assert read_overlay(path) == ("cpu:avx512", (entry,))


def test_floats_are_kept_to_ten_digits_and_whole_numbers_whole() -> None:
    assert rounded({"a": [1 / 3, 123456789012345.0, 5], "b": (0.1 + 0.2,)}) == {
        "a": [0.3333333333, 123456789012345.0, 5], "b": (0.3,),
    }  # fmt: skip
    assert math.isnan(rounded(math.nan))


GOOD = {"metric": "perplexity", "device": "cpu", "value": 1.0, "unit": "ppl", "environment": "w"}


def read_entry(folder: Path, entry: dict[str, Any]) -> None:
    path = overlay_path(folder, "gpt2", "nf4", "cpu:avx512")
    path.parent.mkdir()
    file = {"schema": 1, "model": "gpt2", "method": "nf4", "class": "cpu:avx512"}
    path.write_text(yaml.safe_dump({**file, "entries": [entry], "environments": {"w": WORLD.to_dict()}}))
    read_overlay(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flor": 1}, "entry 1: no place for 'flor'"),
        ({"value": "1e-05"}, "entry 1: value must be a number, not '1e-05'"),
        ({"value": True}, "entry 1: value must be a number, not True"),
        ({"value": math.nan}, "entry 1: value must be finite, not nan"),
        ({"floor": math.inf}, "entry 1: floor must be finite, not inf"),
        ({"count": 1.5}, "entry 1: count must be a whole number, not 1.5"),
        ({"metric": 3}, "entry 1: metric must be text, not 3"),
        ({"interval": [2.0, 1.0]}, "entry 1: interval must be two numbers, the lower first"),
        ({"interval": [1.0]}, "entry 1: interval must be a list of numbers of length 2"),
        ({"detail": []}, "entry 1: detail must be a table, not "),
        ({"file": "x"}, "entry 1: no place for 'file'"),
        ({"environment": [1]}, r"entry 1: its environment '\[1\]' is not in the file"),
        ({"environment": "v"}, "entry 1: its environment 'v' is not in the file"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadFile, match=message):
        read_entry(tmp_path, {**GOOD, **change})


@pytest.mark.parametrize("name", sorted(GOOD.keys() - {"environment"}))
def test_a_needed_field_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadFile, match=f"entry 1: no '{name}'"):
        read_entry(tmp_path, {key: value for key, value in GOOD.items() if key != name})


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_only_a_finite_figure_is_recorded(value: float | None) -> None:
    with pytest.raises(ValueError, match="only a finite figure can be recorded"):
        Recorded.of_row(row(), WORLD, "now") and Recorded.of_row(replace(row(), value=value), WORLD, "now")


# finding and recording


def test_what_is_recorded_is_found(tmp_path: Path) -> None:
    losses = np.linspace(1, 2, 9, dtype=np.float32)
    sha = nllfiles.save(tmp_path / "session", losses)
    reference = nllfiles.save(tmp_path / "session", losses + 1)
    measured = row(nll=sha, detail={"tokens": 4096, "floor": 1e-4, "reference_nll": reference, "window_counts": [9]})
    folder = tmp_path / "baselines"
    paths = record(folder, [measured, latency()], worlds(WORLD), tmp_path / "session")
    assert [path.name for path in paths] == [
        "nf4@cpu+avx512.yaml", f"nf4@{WORLD.environment_class.replace(':', '+')}.yaml",
    ]  # fmt: skip
    found = Baselines(folder).find(CASE, WORLD)
    assert found is not None
    assert (found.value, found.floor, found.nll, found.carries) == (30.5, 1e-4, sha, True)
    assert found.detail == {"tokens": 4096, "reference_nll": reference}
    assert found.file == "gpt2/nf4@cpu+avx512.yaml"
    assert found.environment == WORLD
    time = Baselines(folder).find(DECODE, WORLD)
    assert time is not None
    assert (time.repeats, time.detail["aa_floor"], time.carries) == (3, 0.02, True)
    assert "p90" not in time.detail
    for name in (sha, reference):
        assert nllfiles.load(folder / "gpt2" / "nll", name) is not None
    validate(folder)


def test_nothing_recorded_is_nothing_found(tmp_path: Path) -> None:
    assert Baselines(tmp_path / "absent").find(CASE, WORLD) is None
    record(tmp_path, [row()], worlds(WORLD), tmp_path)
    store = Baselines(tmp_path)
    for other in ("dataset", "protocol", "metric", "model", "method"):
        assert store.find(CASE._replace(**{other: "other"}), WORLD) is None
    assert store.find(CASE._replace(device="cuda"), replace(WORLD, device="cuda", sm="sm_90")) is None


def test_recording_again_changes_only_what_moved(tmp_path: Path) -> None:
    record(tmp_path, [row(), replace(row(31.0), protocol="stride:512:256")], worlds(WORLD), tmp_path)
    path = tmp_path / "gpt2" / "nf4@cpu+avx512.yaml"
    before = path.read_text()
    later = replace(WORLD, torch="2.14.0")
    record(tmp_path, [row(environment=later.id)], worlds(later), tmp_path)
    assert path.read_text() == before  # the same figure keeps its provenance
    record(tmp_path, [row(30.75, environment=later.id)], worlds(later), tmp_path)
    document = yaml.safe_load(path.read_text())
    assert [entry["value"] for entry in document["entries"]] == [30.75, 31.0]
    assert {world["torch"] for world in document["environments"].values()} == {"2.13.0", "2.14.0"}


def test_a_recorded_change_is_seen_by_a_store_that_has_read_the_file(tmp_path: Path) -> None:
    store = Baselines(tmp_path)
    for value in (30.0, 31.25):
        record(tmp_path, [row(value)], worlds(WORLD), tmp_path)
        found = store.find(CASE, WORLD)
        assert found is not None
        assert found.value == value


def test_losses_that_no_file_names_any_more_are_removed(tmp_path: Path) -> None:
    session, home = tmp_path / "session", tmp_path / "b" / "gpt2" / "nll"
    first, second = (nllfiles.save(session, np.full(3, value, dtype=np.float32)) for value in (1, 2))
    record(tmp_path / "b", [row(nll=first)], worlds(WORLD), session)
    assert {path.stem for path in home.iterdir()} == {first}
    record(tmp_path / "b", [row(31.0, nll=second)], worlds(WORLD), session)
    assert {path.stem for path in home.iterdir()} == {second}


def test_timings_of_two_machines_stand_beside_each_other(tmp_path: Path) -> None:
    other = replace(WORLD, machine="b" * 16)
    rows = [latency(0.05), latency(0.01, environment=other.id)]
    record(tmp_path, rows, worlds(WORLD, other), tmp_path)
    store = Baselines(tmp_path)
    for world, value in ((WORLD, 0.05), (other, 0.01)):
        found = store.find(DECODE, world)
        assert found is not None
        assert (found.value, found.environment.machine) == (value, world.machine)
    third = store.find(DECODE, replace(WORLD, machine="c" * 16))
    assert third is not None  # the judge names the machine
    assert third.carries


def test_another_class_is_found_and_does_not_carry(tmp_path: Path) -> None:
    record(tmp_path, [row(), latency()], worlds(WORLD), tmp_path)
    older = replace(WORLD, instructions="avx2")
    found = Baselines(tmp_path).find(CASE, older)
    assert found is not None
    assert (found.carries, found.difference) == (False, "device class: cpu:avx512 -> cpu:avx2")
    newer = replace(WORLD, torch="2.14.0", numpy="3", python="3.12", datasets="6")
    time = Baselines(tmp_path).find(DECODE, newer)
    assert time is not None
    assert (time.carries, time.difference) == (
        False, "python: absent -> 3.12, torch: 2.13.0 -> 2.14.0, datasets: absent -> 6 and 1 more",
    )  # fmt: skip
    loss = Baselines(tmp_path).find(CASE, newer)
    assert loss is not None
    assert loss.carries


def test_the_most_specific_file_serves_and_the_right_class_before_the_near_one(tmp_path: Path) -> None:
    older = replace(WORLD, instructions="avx2")
    record(tmp_path, [row(40.0, environment=older.id)], worlds(older), tmp_path)
    record(tmp_path, [row(30.0)], worlds(WORLD), tmp_path)
    store = Baselines(tmp_path)
    found = store.find(CASE, WORLD)
    assert found is not None
    assert found.value == 30.0
    special = overlay_path(tmp_path, "gpt2", "nf4", WORLD.environment_class)
    entry = Recorded.of_row(row(30.25), WORLD, "2026-11-22T03:00:00Z")
    write_overlay(special, "gpt2", "nf4", WORLD.environment_class, [entry])
    found = store.find(CASE, WORLD)
    assert found is not None
    assert (found.value, found.file) == (30.25, f"gpt2/{special.name}")


def test_the_same_reference_serves_before_another(tmp_path: Path) -> None:
    record(tmp_path, [row(30.0), replace(row(31.0), reference="bf16")], worlds(WORLD), tmp_path)
    store = Baselines(tmp_path)
    values = [store.find(CASE._replace(reference=name), WORLD) for name in ("fp32", "bf16", "fp16")]
    assert [found and (found.value, found.reference) for found in values[:2]] == [(30.0, "fp32"), (31.0, "bf16")]
    assert values[2] is not None


def test_a_record_serves_every_name_of_the_same_windows(tmp_path: Path) -> None:
    told = f"{PROTOCOL[:-3]}disjoint of {{}}, tail kept; scored: all; aggregate: exp; normaliser: token"
    ids = {width: told.format(width) for width in (256, 512)}
    record(tmp_path, [row(protocol_id=ids[256])], worlds(WORLD), tmp_path)  # chunk:512 of a model that reads 256
    store = Baselines(tmp_path)
    for name in ("chunk:512", "chunk:256", "chunk:2048"):
        found = store.serving(replace(row(protocol_id=ids[256]), protocol=name), WORLD)
        assert found is not None
        assert (found.value, found.protocol) == (30.5, "chunk:512")
    assert store.serving(replace(row(protocol_id=ids[512]), protocol="chunk:256"), WORLD) is None
    assert store.serving(replace(row(protocol_id=""), protocol="chunk:256"), WORLD) is None
    record(tmp_path, [replace(row(31.0, protocol_id=ids[256]), protocol="chunk:256")], worlds(WORLD), tmp_path)
    for name, value in (("chunk:256", 31.0), ("chunk:512", 30.5)):  # each its own, where there is one
        found = Baselines(tmp_path).serving(replace(row(protocol_id=ids[256]), protocol=name), WORLD)
        assert found is not None
        assert found.value == value


def test_the_tiny_models_record_of_chunk_512_serves_chunk_256() -> None:
    folder = Path(__file__).parents[2] / "baselines"
    path = folder / "tiny-gpt2" / "fp32@cpu+avx2.yaml"
    kept = next(one for one in read_overlay(path)[1] if (one.metric, one.protocol) == ("perplexity", "chunk:512"))
    case = Case("tiny-gpt2", "fp32", "synthetic", "chunk:256", "perplexity", "cpu")
    asked = Row.of(case, protocol_id=kept.protocol_id)
    found = Baselines(folder).serving(asked, kept.environment)
    assert found is not None
    assert (found.value, found.protocol_id) == (kept.value, kept.protocol_id)


def test_another_limit_of_tokens_is_recorded_beside_and_never_found_instead(tmp_path: Path) -> None:
    ids = {name: f"text: lee; tokens: {name}, tokenizer x" for name in ("the first 1024", "the first 4096", "all")}
    short, long = (row(value, protocol_id=ids[name]) for value, name in ((40.0, "the first 1024"), (30.0, "all")))
    record(tmp_path, [short, long], worlds(WORLD), tmp_path)
    store = Baselines(tmp_path)
    found = [store.find(CASE, WORLD, token_limit(protocol)) for protocol in ids.values()]
    assert [one and one.value for one in found] == [40.0, None, 30.0]


def test_exact_facts_are_of_the_model_that_figures_were_recorded_of(tmp_path: Path) -> None:
    case = CASE._replace(dataset="", protocol="", metric="memory.storage")
    path = exact_path(tmp_path, case)
    path.parent.mkdir()
    facts = exact_facts(Row.of(case, value=1000.0, unit="B"), STORAGE)
    path.write_text(yaml.safe_dump(exact_document(None, facts, provenance(WORLD.to_dict()))))
    for recorded in ("", "a" * 64):
        found = Baselines(tmp_path).find(case, WORLD)
        assert found is not None
        assert (found.value, found.identity) == (1000.0, recorded)
        record(tmp_path, [row(identity="a" * 64)], worlds(WORLD), tmp_path)


def test_losses_that_git_lfs_did_not_fetch_are_absent_and_recorded_again(tmp_path: Path) -> None:
    sha = nllfiles.save(tmp_path / "session", np.zeros(4, dtype=np.float32))
    path = tmp_path / "gpt2" / "nll" / f"{sha}.npz"
    for _ in range(2):
        record(tmp_path, [row(nll=sha)], worlds(WORLD), tmp_path / "session")
        assert nllfiles.load(path.parent, sha) is not None
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 99\n")
        assert nllfiles.load(path.parent, sha) is None
        validate(tmp_path)


def test_what_a_regeneration_writes() -> None:
    def chosen(flag: str, **more: Any) -> bool:
        return bool(to_record([row(**more)], flag))

    for verdict in (Verdict.INPUT_CHANGED, Verdict.WORSE, Verdict.NOT_COMPARABLE, Verdict.UNRECORDED):
        assert chosen("force", verdict_baseline=verdict)
    for verdict in (Verdict.SAME, Verdict.WITHIN_NOISE, Verdict.UNUSABLE):
        assert not chosen("force", verdict_baseline=verdict)
        assert chosen("all", verdict_baseline=verdict)
    assert chosen("all", verdict_reference=Verdict.OUT_OF_BOUND)
    marked = [
        Recorded.of_row(row(verdict_reference=word), WORLD, "now").detail for word in (None, Verdict.OUT_OF_BOUND)
    ]
    assert [one.get("out_of_bound") for one in marked] == [None, True]
    assert not chosen("all", value=math.nan)
    assert not to_record([replace(row(), value=None, verdict=Verdict.MISSING)], "all")
    bytes_ = Row.of(CASE._replace(metric="memory.storage", dataset="", protocol=""), value=1.0)
    assert not to_record([bytes_], "all")
    assert to_record([latency()], "all")
    assert not to_record([latency(detail={"log_ratio": 0.5, "log_ratio_low": None})], "all")


# files that are refused


def spoil(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("schema: 1", "schema: 9", r"schema 9 is newer than this harness reads \(1\): upgrade the harness$"),
        ("schema: 1", "schema: one", "schema must be a whole number, not 'one'; restore it from version control"),
        ("schema: 1", "schema: [", "cannot be read as YAML"),
        ("class: cpu:avx512", "klass: x", r"no place for 'klass' \(known: schema, model, method, class"),
        ("class: cpu:avx512", "class: 5", "class must be text, not 5"),
        ("class: cpu:avx512", "class: cpu:avx2", "is of nf4 on cpu:avx2: a baseline must keep its name"),
        ("value: 30.5", "value: 3O.5", "entry 1: value must be a number, not '3O.5'; restore it"),
        ("threads: 2", "threads: two", r"environments\.\w{12}\.threads must be a whole number, not 'two'"),
    ],
)
def test_a_broken_overlay_is_one_line_that_names_the_file(tmp_path: Path, old: str, new: str, message: str) -> None:
    record(tmp_path, [row()], worlds(WORLD), tmp_path)
    path = tmp_path / "gpt2" / "nf4@cpu+avx512.yaml"
    spoil(path, old, new)
    with pytest.raises(BadFile, match=message) as caught:
        validate(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(BadFile, match=message):
        Baselines(tmp_path).find(CASE, WORLD)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00", b"- 1\n- 2\n", b"2026-99-99", b"a: &a [*a]"])
def test_bytes_that_are_no_baseline(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "gpt2").mkdir()
    for name in ("nf4.yaml", "nf4@cpu+avx512.yaml"):
        (tmp_path / "gpt2" / name).write_bytes(data)
        with pytest.raises(BadFile, match="restore it from version control, or delete it and record again"):
            validate(tmp_path)
        (tmp_path / "gpt2" / name).unlink()


def test_a_broken_loss_file_or_bound_is_told_at_the_start(tmp_path: Path) -> None:
    sha = nllfiles.save(tmp_path / "session", np.zeros(4, dtype=np.float32))
    record(tmp_path, [row(nll=sha)], worlds(WORLD), tmp_path / "session")
    path = tmp_path / "gpt2" / "nll" / f"{sha}.npz"
    nllfiles.save(tmp_path / "other", np.ones(4, dtype=np.float32))
    path.write_bytes(next((tmp_path / "other").iterdir()).read_bytes())
    with pytest.raises(BadFile, match=sha):
        validate(tmp_path)
    path.unlink()
    validate(tmp_path)  # without its losses a change is decided by the recorded value
    (tmp_path / "bounds.toml").write_text("schema = 7")
    with pytest.raises(BadFile, match="schema 7 is newer"):
        validate(tmp_path)


def test_writing_a_committed_overlay_again_changes_no_byte(tmp_path: Path) -> None:
    committed = sorted((Path(__file__).parents[2] / "baselines").glob("tiny-*/*@*.yaml"))
    assert committed
    for path in committed:
        reach, entries = read_overlay(path)
        write_overlay(tmp_path / path.name, path.parent.name, path.stem.partition("@")[0], reach, entries)
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_overlays_that_hold_no_lists(tmp_path: Path) -> None:
    record(tmp_path, [row()], worlds(WORLD), tmp_path)
    path = tmp_path / "gpt2" / "nf4@cpu+avx512.yaml"
    document = yaml.safe_load(path.read_text())
    for name, value in (("entries", {}), ("entries", [1]), ("environments", []), ("environments", {"w": 3})):
        path.write_text(yaml.safe_dump({**document, name: value}))
        with pytest.raises(BadFile, match="restore it"):
            read_overlay(path)


def test_a_folder_without_baselines_is_valid(tmp_path: Path) -> None:
    validate(tmp_path)
    validate(tmp_path / "absent")


# exact facts

CENSUS = {"quantized": [{"modules": "h.*.attn", "count": 12}], "bytes_by_dtype": {"uint8": 5}, "bits_per_weight": 4.5}


def storage(value: int = 1000, **more: Any) -> Row:
    case = CASE._replace(metric="memory.storage", dataset="", protocol="")
    detail = {"predicted": value, "predicted_equal": True}
    return Row.of(case, **{"value": float(value), "unit": "B", "census": CENSUS, "detail": detail, **more})


def test_facts_of_bytes_and_of_texts() -> None:
    assert exact_facts(storage(), STORAGE) == {
        "schema": 1, "model": "gpt2", "method": "nf4",
        "weights": {"cpu": {"bytes": {"memory.storage": 1000}, "census": CENSUS}},
    }  # fmt: skip
    assert exact_facts(row(), PERPLEXITY)["texts"] == {
        "lee": {"chunk:512": {"first 4096": {"token_hash": "f" * 64, "tokens": 4096}}}
    }
    assert exact_facts(latency(), replace(PERPLEXITY, timed=True)) == {}
    reached = storage(census={**CENSUS, "matrices": {"share": 0.5}})  # it follows from the rest
    assert exact_facts(reached, STORAGE) == exact_facts(storage(), STORAGE)


def test_the_prediction_is_the_fact_where_a_measurement_differs() -> None:
    wrong = storage(detail={"predicted": 900, "predicted_equal": False})
    assert exact_facts(wrong, STORAGE)["weights"]["cpu"]["bytes"] == {"memory.storage": 900}


def test_how_much_of_a_text_was_read() -> None:
    assert token_limit(PROTOCOL) == "first 4096"
    assert token_limit("text: lee; tokens: all, tokenizer x") == "all"
    assert token_limit("") == "all"


def test_this_sessions_facts_join_those_recorded() -> None:
    first = exact_document(None, exact_facts(storage(), STORAGE), {"recorded": "then"})
    assert not holds(None, first)
    assert not holds(first, exact_facts(row(), PERPLEXITY))
    assert not holds(first, exact_facts(replace(storage(), device="cuda"), STORAGE))
    both = exact_document(first, exact_facts(row(), PERPLEXITY), {"recorded": "now"})
    assert holds(both, exact_facts(row(token_hash="e" * 64), PERPLEXITY))
    assert both["weights"] == first["weights"]
    assert both["provenance"] == {"recorded": "now"}
    other_length = row(protocol_id=PROTOCOL.replace("4096", "512"))
    assert not holds(both, exact_facts(other_length, PERPLEXITY))


def test_provenance_stays_while_every_fact_is_equal() -> None:
    facts = exact_facts(storage(), STORAGE)
    first = exact_document(None, facts, {"recorded": "then"})
    assert exact_document(first, facts, {"recorded": "now"}) == first
    moved = exact_document(first, exact_facts(storage(1001), STORAGE), {"recorded": "now"})
    assert moved["provenance"] == {"recorded": "now"}
    assert moved["weights"]["cpu"]["bytes"] == {"memory.storage": 1001}


def test_what_left_the_census_does_not_stay_behind() -> None:
    first = exact_document(None, exact_facts(storage(), STORAGE), {"recorded": "then"})
    thin = {**CENSUS, "bytes_by_dtype": {"int8": 5}}
    after = exact_document(first, exact_facts(storage(census=thin), STORAGE), {"recorded": "now"})
    assert after["weights"]["cpu"]["census"]["bytes_by_dtype"] == {"int8": 5}


def test_an_exact_file_survives_yaml_and_serves_every_environment(tmp_path: Path) -> None:
    world = json.loads(json.dumps(WORLD.to_dict()))
    document = exact_document(None, exact_facts(storage(), STORAGE), provenance(world))
    path = exact_path(tmp_path, CASE)
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(document))
    assert read_exact(path) == document
    assert read_exact(path.with_name("absent.yaml")) is None
    case = CASE._replace(metric="memory.storage", dataset="", protocol="")
    found = Baselines(tmp_path).find(case, Environment(instructions="avx2"))
    assert found is not None
    assert (found.value, found.file, found.carries, found.environment) == (1000, "gpt2/nf4.yaml", True, WORLD)
    assert found.recorded == document["provenance"]["recorded"]
    assert Baselines(tmp_path).find(case._replace(device="cuda"), WORLD) is None
    validate(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"weights": [1]},
        {"weights": None},
        {"weights": {"cpu": {"bytes": {"memory.storage": "many"}}}},
        {"weights": {"cpu": {"bytes": {"memory.storage": True}}}},
        {"texts": {"lee": {"chunk:512": {4096: {"tokens": 1}}}}},
        {"texts": {"lee": 3}},
        {"provenance": "yesterday"},
        {"provenance": {"environment": {"threads": "two"}}},
    ],
)
def test_exact_facts_of_the_wrong_shape(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "nf4.yaml"
    path.write_text(yaml.safe_dump({"schema": 1, "model": "gpt2", "method": "nf4", **change}))
    with pytest.raises(BadFile, match=r"nf4\.yaml: (weights|texts|provenance).* (must be|a key must)") as caught:
        read_exact(path)
    assert "\n" not in str(caught.value)


def test_changed_facts_are_named_with_both_values() -> None:
    head = {"schema": 1, "model": "m", "method": "nf4"}
    census = {"quantized_modules": 8, "names": "a" * 64, "left_elements": 5}
    texts = {"lee": {"chunk:512": {"first 4096": {"token_hash": "f" * 64, "tokens": 4096}}}}
    before = {**head, "weights": {"cpu": {"bytes": {"memory.storage": 1000}, "census": census}}, "texts": texts}
    assert facts.changes(before, before) == []
    assert facts.changes(None, before) == []  # nothing recorded, nothing changed
    fewer = {**census, "quantized_modules": 7, "names": "b" * 64}
    other = {"lee": {"chunk:512": {"first 4096": {"token_hash": "e" * 64, "tokens": 4096}}}}
    now = {**head, "weights": {"cpu": {"bytes": {"memory.storage": 1048}, "census": fewer}}, "texts": other}
    assert facts.changes(before, now) == [
        "memory.storage on cpu: 1000 -> 1048",
        "census on cpu, quantized_modules: 8 -> 7",
        "census on cpu, names: aaaaaaaaaaaa... -> bbbbbbbbbbbb...",
        "token_hash of lee/chunk:512/first 4096: ffffffffffff... -> eeeeeeeeeeee...",
    ]
