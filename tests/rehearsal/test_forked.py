"""No group's process is forked from one that has started CUDA, and each sees the cards that its asker sees.

On a CPU build of torch a pretended CUDA build writes down who asks for a card, in the fork server and behind it; under
`tox run -e cuda` torch is a CUDA build and says itself whether a fork is bad. The driver is the stub in both.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.rehearsal import cuda_build, driver

ROOT = Path(__file__).parents[2]
PRETENDED = torch.version.cuda is None
BAD = "CUDA was initialised before this process was forked: "
# asks groups of one fork server, while CUDA_VISIBLE_DEVICES changes around it as Ray changes it around a worker
ASK = """
import json, os
from pathlib import Path
from harness.metrics.measuring.checks import LAYER
from harness.core.options import Declared, Options
from harness.core.records import Case
from harness.run.local import Runner

if __name__ == "__main__":
    runner = Runner(Options(Declared(Path())), threads=1, lock=Path("lock"))
    for visible, device in (("1", "cuda"), ("0", "cuda"), ("0", "cpu")):
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
        case = Case(LAYER, "nf4", "", "", "invariant.any", device)
        reply = runner.ask(case, "key", (case, None))
        print(json.dumps([runner._process.process.pid, reply.kind, reply.text]), flush=True)
        runner.close()
"""


@dataclass
class Seen:
    """What one fork server's groups answered (pid, kind, text), and what was written down about them."""

    answers: list[tuple[int, str, str]]
    forks: dict[int, str]  # by pid: 'good' or 'bad'
    touched: set[int]  # pids that asked torch for a card
    started: dict[int, set[str]]  # by pid, CUDA_VISIBLE_DEVICES as it stood when the driver started


def ask(folder: Path, **more: str) -> Seen:
    folder.mkdir(exist_ok=True)
    (folder / "ask.py").write_text(ASK)
    (folder / "sitecustomize.py").write_text(cuda_build.SITE)
    log, build = folder / "driver.log", folder / "build.log"
    found = driver.variables(2, log=log)
    world = driver.world(found, PYTHONPATH=f"{ROOT}:{folder}", CUDA_BUILD_LOG=str(build), **more)
    done = subprocess.run(
        [sys.executable, "ask.py"], cwd=folder, env=world, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in build.read_text().splitlines()]
    return Seen(
        [tuple(json.loads(line)) for line in done.stdout.splitlines()],
        {int(pid): rest for pid, what, rest in lines if what == "forked"},
        {int(pid) for pid, what, _ in lines if what == "touched"},
        driver.started(log),
    )


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    return ask(tmp_path_factory.mktemp("forked"))


def test_nobody_asks_for_a_card_before_a_group_is_forked(seen: Seen) -> None:
    pids = {pid for pid, _, _ in seen.answers}
    assert len(pids) == 3
    assert {pid: seen.forks.get(pid) for pid in pids} == dict.fromkeys(pids, "good")
    assert seen.touched <= seen.forks.keys()  # never the server
    assert not [text for _, _, text in seen.answers if text.startswith(BAD)]


def test_every_group_sees_the_cards_of_the_moment(seen: Seen) -> None:
    shown = [seen.started.get(pid) for pid, _, _ in seen.answers]
    assert shown == [{"1"}, {"0"}, {""}]  # on the processor: no card at all


@pytest.mark.skipif(not PRETENDED, reason="the stub runs no context: a CUDA build's group ends at its first look")
def test_every_group_starts(seen: Seen) -> None:
    assert [kind for _, kind, _ in seen.answers] == ["key"] * 3, seen.answers
    assert seen.touched >= {pid for pid, _, _ in seen.answers}  # else nothing was tried


def test_a_bad_fork_is_one_line_that_says_so(tmp_path: Path) -> None:
    answers = ask(tmp_path / "touched", CUDA_BUILD_TOUCH="1").answers
    for _, kind, text in answers[:2]:
        assert kind == "error"
        assert text.startswith(BAD)
        assert "\n" not in text
    assert answers[2][1] == "key"  # the processor's cases go on
