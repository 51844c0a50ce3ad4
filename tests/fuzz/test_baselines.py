"""Baseline files from strangers: facts, figures, bounds and losses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from harness.core.environment import Environment
from harness.core.records import Case
from harness.judge import baselines, bounds, known_faults
from harness.judge import baselines as facts
from harness.run import rebaseline
from tests.fuzz.bounds import quick, slow, survives
from tests.fuzz.damage import altered, damaged

ROOT = Path(__file__).parents[2] / "baselines"
HOME = ROOT / "tiny-gpt2"
FACTS = HOME / "nf4.yaml"
FIGURES = min(HOME.glob("nf4@*.yaml"))
CASES = [
    Case("tiny-gpt2", "nf4", "synthetic", "chunk:512", "perplexity", "cpu"),
    Case("tiny-gpt2", "nf4", "", "", "memory.storage", "cpu"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "baselines" / "tiny-gpt2").mkdir(parents=True)
    return tmp_path / "baselines"


def used(folder: Path) -> None:
    """Everything that a session reads of a folder."""
    baselines.validate(folder)
    recorded = baselines.Baselines(folder)
    for case in CASES:
        recorded.find(case, Environment())
        facts.changes(recorded.facts(case), {"weights": {"cpu": {"bytes": {"memory.storage": 1}}}})


@pytest.mark.parametrize("source", [FACTS, FIGURES], ids=lambda path: path.name)
@quick
@given(data=st.data())
def test_damaged_bytes(folder: Path, source: Path, data: st.DataObject) -> None:
    (folder / "tiny-gpt2" / source.name).write_bytes(data.draw(damaged(source.read_bytes())))
    survives(used, folder)


@pytest.mark.parametrize("source", [FACTS, FIGURES], ids=lambda path: path.name)
@slow
@given(data=st.data())
def test_documents_of_any_shape(folder: Path, source: Path, data: st.DataObject) -> None:
    document = yaml.safe_load(source.read_text())
    text = yaml.safe_dump(data.draw(altered(document, 10)), allow_unicode=True)
    (folder / "tiny-gpt2" / source.name).write_text(text, encoding="utf-8", errors="surrogatepass")
    survives(used, folder)


TRAPS = {
    "deep lists": "[" * 20_000,
    "deep dashes": "- " * 20_000 + "x",
    "deep tables": "{a: " * 20_000,
    "deep questions": "? " * 20_000,
    "laughs": "a: &a [x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)),
    "code": "!!python/object/apply:os.system ['touch pwned']",
    "itself": "&a [*a]",
    "date": "schema: 1\nmodel: 2026-01-01",
    "key": "? [a, b]\n: 1",
    "nul": "schema: 1\x00",
}


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("name", ["nf4.yaml", "nf4@cpu+avx512.yaml"])
def test_traps(folder: Path, monkeypatch: pytest.MonkeyPatch, trap: str, name: str) -> None:
    monkeypatch.chdir(folder)
    (folder / "tiny-gpt2" / name).write_text(TRAPS[trap])
    assert survives(used, folder) is None
    assert not (folder / "pwned").exists()


@pytest.mark.parametrize(
    ("whole", "load"), [(ROOT / "bounds.toml", bounds.load), (known_faults.SHIPPED, known_faults.load)]
)
@quick
@given(data=st.data())
def test_damaged_rules(folder: Path, whole: Path, load: object, data: st.DataObject) -> None:
    (folder / whole.name).write_bytes(data.draw(damaged(whole.read_bytes())))
    survives(load, folder)  # type: ignore[arg-type]
    (folder / whole.name).unlink()


@slow
@given(data=st.data())
def test_a_proposal_from_damaged_measurements(folder: Path, data: st.DataObject) -> None:
    made = Path(__file__).parents[1] / "report" / "data" / "made-session"
    report = folder.parent / "report"
    shutil.copytree(made, report, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(("measurements.jsonl", "environments.json")))
    (report / name).write_bytes(data.draw(damaged((made / name).read_bytes())))
    survives(rebaseline.propose, report, folder)
