"""A proposal from a finished session: what is old and new, why it moved, and that nothing is written until told."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from harness.__main__ import main
from harness.core.contracts import Checkpoint
from harness.core.environment import Environment
from harness.core.errors import HarnessError, MissingAsset
from harness.core.identity import identity_digest
from harness.core.records import Case, Row
from harness.judge.baselines import Baselines, read_identities, read_overlay
from harness.results import losses
from harness.run import rebaseline

HERE = Environment(torch="2.13.0", instructions="avx2 avx512", threads=2, machine="a" * 16)
LATER = replace(HERE, torch="2.14.0", threads=4)
COUNTS = [4] * 10
BASE = np.linspace(2, 4, 40).astype(np.float32)
PROTOCOL = "text: lee, revision abc; tokens: the first 40, tokenizer x, bos=0; windows: 4"


def report(
    folder: Path, shift: float, world: Environment, *, storage: int = 1000, method: str = "nf4", theta: str = "10000"
) -> Path:
    """A finished session of one method: a perplexity whose losses lie `shift` above BASE, and exact bytes."""
    nll = BASE + np.float32(shift) + np.tile(np.array([0.001, -0.001], dtype=np.float32), 20)
    sha = losses.save(folder / "nll", nll)
    model = {"weights": "r", "config.rope_theta": theta} if theta else {}
    facts = {"model": "m", "method": method, "device": "cpu", "reference": "fp32", "environment": world.id}
    facts |= {"identity": identity_digest(model)} if model else {}
    text = {"dataset": "lee", "protocol": "chunk:4", "protocol_id": PROTOCOL, "token_hash": "f" * 64, "revision": "r"}
    detail = {"window_counts": COUNTS, "tokens": 40}
    value = float(np.exp(nll.astype(np.float64).mean()))
    rows = [
        Row(metric="perplexity", value=value, unit="ppl", count=40, nll=sha, detail=detail, **text, **facts),  # type: ignore[arg-type]
        Row(metric="memory.storage", value=float(storage), unit="B", detail={"predicted": storage}, **facts),  # type: ignore[arg-type]
        Row(metric="memory.footprint", value=None, unit="B", **facts),  # type: ignore[arg-type]
    ]
    (folder / "measurements.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))
    (folder / "environments.json").write_text(json.dumps({world.id: asdict(world)}))
    (folder / "identities.json").write_text(json.dumps({identity_digest(model): model}))
    (folder / "plan.json").write_text(json.dumps([row.case.told() for row in rows]))
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "report", tmp_path / "baselines"


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_nothing_is_written_until_told(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    made, home = report(folders[0], 0.0, HERE), folders[1]
    home.mkdir()
    assert main(["rebaseline", str(made), "--baselines", str(home)]) == 0
    told = capsys.readouterr().out
    assert "0 figures would change, 1 would be new, 0 stay as recorded; 1 file of exact facts would change." in told
    assert told.endswith("Nothing was written. To record this: the same command with --write.\n")
    assert not files(home)
    assert main(["rebaseline", str(made), "--baselines", str(home), "--write"]) == 0
    assert "wrote " in capsys.readouterr().out
    losses_file = f"m/nll/{next((home / 'm/nll').iterdir()).name}"
    assert set(files(home)) == {"m/nf4.yaml", "m/nf4@cpu+avx512.yaml", "m/identities.yaml", losses_file}
    before = files(home)
    assert main(["rebaseline", str(made), "--baselines", str(home), "--write"]) == 0
    assert "Nothing to record." in capsys.readouterr().out
    assert files(home) == before


def test_the_diff_says_old_new_change_interval_environment_and_repeats(folders: tuple[Path, Path]) -> None:
    made, home = report(folders[0], 0.0, HERE), folders[1]
    rebaseline.write(rebaseline.propose(made, home), home)
    moved = report(folders[0].with_name("later"), 0.01, LATER, storage=1048)
    proposal = rebaseline.propose(moved, home)
    told = rebaseline.render(proposal)
    assert "1 figure would change, 0 would be new, 0 stay as recorded; 1 file of exact facts would change." in told
    line = next(line for line in told.splitlines() if "`perplexity` `lee` `chunk:4`" in line)
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[3:] == ["20.0855 ppl", "20.2874 ppl", "+1.01% [+1%, +1.01%]", "worse", "1 → 1"]
    assert "Environment difference of 1 figure:\n\n- torch: 2.13.0 -> 2.14.0\n- threads: 2 -> 4\n" in told
    assert "- memory.storage on cpu: 1000 -" in told
    rebaseline.write(proposal, home)
    found = Baselines(home).find(proposal.figures[0].row.case, LATER)
    assert found is not None
    assert found.value == pytest.approx(20.2874, abs=1e-4)
    assert len(list((home / "m/nll").iterdir())) == 1  # the old losses are named by nothing any more


def test_a_record_of_another_device_class_stays_beside_the_new_one(folders: tuple[Path, Path]) -> None:
    made, home = report(folders[0], 0.0, HERE), folders[1]
    rebaseline.write(rebaseline.propose(made, home), home)
    elsewhere = report(folders[0].with_name("later"), 0.01, replace(HERE, instructions="avx2 avx512 avx512_bf16"))
    proposal = rebaseline.propose(elsewhere, home)
    told = rebaseline.render(proposal)
    assert "0 figures would change, 1 would be new" in told
    assert "new beside m/nf4@cpu+avx512.yaml" in told
    rebaseline.write(proposal, home)
    assert {path.name for path in (home / "m").glob("*@*.yaml")} == {
        "nf4@cpu+avx512.yaml", "nf4@cpu+avx512_bf16.yaml",
    }  # fmt: skip
    assert len(list((home / "m/nll").iterdir())) == 2


def test_what_cannot_be_recorded_is_said(folders: tuple[Path, Path]) -> None:
    made, home = report(folders[0], float("inf"), HERE), folders[1]
    told = rebaseline.render(rebaseline.propose(made, home))
    assert "Not recorded, and why:" in told
    assert "m/nf4/lee/chunk:4/perplexity/cpu" in told


def test_a_folder_without_measurements_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingAsset, match="holds no measurements"):
        rebaseline.propose(tmp_path, tmp_path)
    (tmp_path / "measurements.jsonl").write_text("")
    with pytest.raises(HarnessError, match="holds no measured case: nothing to record"):
        rebaseline.propose(tmp_path, tmp_path)


def test_a_write_that_fails_leaves_the_files_whole(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    made, home = report(folders[0], 0.0, HERE), folders[1]
    rebaseline.write(rebaseline.propose(made, home), home)
    before = files(home)
    moved = report(folders[0].with_name("later"), 0.01, HERE)

    def torn(source: str, target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", torn)
    with pytest.raises(OSError, match="No space left"):
        rebaseline.write(rebaseline.propose(moved, home), home)
    after = {name: data for name, data in files(home).items() if name in before}
    assert after == before


def identities(home: Path) -> list[dict[str, str]]:
    return list(read_identities(home / "m" / "identities.yaml").values())


def test_what_no_figure_names_any_more_is_forgotten(folders: tuple[Path, Path]) -> None:
    home = folders[1]
    rebaseline.write(rebaseline.propose(report(folders[0], 0.0, HERE), home), home)
    assert identities(home) == [{"config.rope_theta": "10000", "weights": "r"}]
    rebaseline.write(rebaseline.propose(report(folders[0], 0.0, HERE, method="nf8"), home), home)
    moved = report(folders[0].with_name("later"), 0.01, HERE, theta="11000")
    rebaseline.write(rebaseline.propose(moved, home), home)
    assert len(identities(home)) == 2  # nf8's stays
    moved = report(folders[0].with_name("later"), 0.01, HERE, theta="11000", method="nf8")
    rebaseline.write(rebaseline.propose(moved, home), home)
    assert identities(home) == [{"config.rope_theta": "11000", "weights": "r"}]


def test_figures_of_before_gain_their_identity_without_measuring(folders: tuple[Path, Path]) -> None:
    home, facts = folders[1], {"weights": "r", "config.rope_theta": "10000"}
    for world, method in ((HERE, "nf4"), (replace(HERE, instructions="avx2"), "nf8")):
        old = report(folders[0], 0.0, world, theta="", method=method)
        rebaseline.write(rebaseline.propose(old, home), home)
    assert not (home / "m" / "identities.yaml").exists()
    case = Case("m", "nf4", "lee", "chunk:4", "perplexity", "cpu")
    assert Baselines(home).unidentified([case]).startswith("no identity of the model is recorded with 1 figure of m: ")
    before = files(home)

    def absent(model: str) -> Checkpoint:
        raise HarnessError("not here")

    def at_hand(revision: str) -> list[str]:
        return list(rebaseline.identify(home, lambda model: Checkpoint(model, home, revision, identity=facts)))

    assert list(rebaseline.identify(home, absent)) == ["m: 2 figures as they were: it cannot be read here (not here)"]
    ending = "for 0 figures and 0 files of exact facts; 2 figures as they were: of other weights (r)"
    assert at_hand("s")[0].endswith(ending)
    assert files(home) == before
    assert at_hand("r") == [f"m: identity {identity_digest(facts)[:12]} for 2 figures and 2 files of exact facts"]
    assert identities(home) == [facts]
    for path in (home / "m").glob("*@*.yaml"):
        (entry,) = read_overlay(path)[1]
        assert entry.identity == identity_digest(facts)
    after = files(home)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {f"m/{name}.yaml" for name in "identities nf4 nf8 nf4@cpu+avx512 nf8@cpu+avx2".split()}
    assert Baselines(home).unidentified([case]) == ""
    assert at_hand("r") == []
    same = report(folders[0].with_name("later"), 0.0, LATER)  # a session of today keeps what was recorded
    assert rebaseline.propose(same, home).same == 1
