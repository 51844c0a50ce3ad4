"""What --resume compares: every change that could move a number makes another key, so that no stale row is taken."""

import dataclasses
import importlib
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from harness.core import catalog
from harness.core.environment import Environment
from harness.core.records import Case
from harness.run import group
from harness.run.messages import Stop

HERE = Environment(python="3.11", torch="2.13.0", threads=2, machine="m", instructions="avx2 avx512")
ON_CARD = dataclasses.replace(HERE, device="cuda", gpu="NVIDIA H100", sm="sm_90", machine="m0")
STOP = Stop(0.01, 0.5, "tokens")


class Pretended:
    """A group's facts without a model."""

    def __init__(self, case: Case, **changed: Any) -> None:
        facts = {
            "revision": "weights",
            "method_id": "nf4:linear",
            "protocol_id": "chunk",
            "token_hash": "tokens",
            "config": "10000",
            "base": "weights",
            "environment": HERE,
            "code": "code",
            "repetitions": 10,
            "libraries": {},
            **changed,
        }
        self.case = case
        identity = {"weights": facts["revision"], "config.rope_theta": facts["config"]}
        self.checkpoint = SimpleNamespace(revision="commit", identity=identity)
        base = {**identity, "weights": facts["base"]}
        self.reference_checkpoint = SimpleNamespace(revision="commit", identity=base)
        self.plan = dataclasses.make_dataclass("P", [("protocol_id", str), ("token_hash", str)])(
            facts["protocol_id"], facts["token_hash"]
        )
        self.method_id, self.repetitions, self.libraries = (
            facts[name] for name in ("method_id", "repetitions", "libraries")
        )
        self.environment = facts["environment"]
        with mock.patch.object(group, "CODE", facts["code"]):
            self.world = group.Group.world.func(self)  # type: ignore[attr-defined]


def case(metric: str = "perplexity.delta", **changed: str) -> Case:
    named = {
        "model": "m",
        "method": "nf4",
        "dataset": "lee",
        "protocol": "chunk:512",
        "metric": metric,
        "device": "cpu",
    }
    return Case(**{**named, "reference": "fp32", **changed})


def key(wanted: Case | None = None, stop: Stop | None = None, **changed: Any) -> str:
    wanted = wanted or case()
    return group.Group.key(Pretended(wanted, **changed), wanted, stop)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changed",
    [
        {"revision": "other weights"},
        {"method_id": "nf4:linear:block=128"},
        {"protocol_id": "stride"},
        {"token_hash": "other tokens"},
        {"config": "11000"},
        {"base": "another model"},
        {"code": "a changed metric"},
        {"environment": dataclasses.replace(HERE, torch="2.14.0")},
        {"environment": dataclasses.replace(HERE, machine="another")},
        {"environment": dataclasses.replace(HERE, threads=1)},
        {"environment": dataclasses.replace(HERE, instructions="avx2")},
        {"wanted": case(reference="bf16")},
        {"wanted": case(metric="perplexity")},
        {"stop": STOP},
        {"libraries": {"torchao": "0.18.0"}},
    ],
    ids=str,
)
def test_every_change_makes_another_key(changed: dict[str, Any]) -> None:
    assert key(**changed) != key()
    assert key(**changed) == key(**changed)


@pytest.mark.parametrize("changed", [{"bound": 0.02}, {"variance": None}, {"token_hash": "others"}], ids=str)
def test_an_early_stop_is_keyed_by_what_stops_it(changed: dict[str, Any]) -> None:
    assert key(stop=dataclasses.replace(STOP, **changed)) != key(stop=STOP)


def test_equal_cards_share_what_is_not_timed_wherever_they_are() -> None:
    elsewhere, other = dataclasses.replace(ON_CARD, machine="m1"), dataclasses.replace(ON_CARD, gpu="NVIDIA H200")
    timed = case("latency.decode", dataset="", protocol="", device="cuda")
    for wanted in (case(device="cuda"), case("perplexity", device="cuda")):
        assert key(wanted, environment=elsewhere) == key(wanted, environment=ON_CARD)
        assert key(wanted, environment=other) != key(wanted, environment=ON_CARD)
    assert key(timed, environment=elsewhere) != key(timed, environment=ON_CARD)
    assert Pretended(timed, environment=elsewhere).world == Pretended(timed, environment=ON_CARD).world  # of losses


def test_repetitions_matter_to_timings_alone() -> None:
    timed = case("latency.decode", dataset="", protocol="")
    assert key(timed, repetitions=20) != key(timed)
    assert key(repetitions=20) == key()


@pytest.mark.parametrize("name", ["wait_policy", "spin_count", "thread_library"])
def test_how_threads_wait_matters_to_timings_alone(name: str) -> None:
    other = dataclasses.replace(HERE, **{name: "other"})  # type: ignore[arg-type]
    timed = case("latency.decode", dataset="", protocol="")
    assert key(timed, environment=other) != key(timed)
    assert key(environment=other) == key()


def test_code_of_installed_methods_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "brought_methods.py"
    file.write_text("A = 1\n")
    point = EntryPoint("mine", "brought_methods:METHOD", "harness.methods")
    monkeypatch.setattr(catalog, "entry_points", lambda group: [point] if group == "harness.methods" else [])
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    before = catalog.code_version()
    assert list(catalog.installed_sources()) == [str(file)]
    assert catalog.code_version() == before
    file.write_text("A = 2\n")
    assert catalog.code_version() != before
    assert "brought_methods" not in sys.modules  # read, not run
