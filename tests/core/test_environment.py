"""The captured world: its derived names, what moves them, its round trip, and that nothing personal is in it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.core import environment
from harness.core.environment import (
    CLASS_FIELDS,
    WAITING,
    Environment,
    capture,
    class_difference,
    difference,
    waiting_difference,
)
from harness.core.errors import BadFile, HarnessError
from harness.core.gpus import Gpu

XEON = """processor\t: 0
model name\t: Intel(R) Xeon(R) Processor @ 2.50GHz
flags\t\t: fpu sse2 avx2 avx512f {more}

processor\t: 1
model name\t: Intel(R) Xeon(R) Processor @ 2.50GHz
flags\t\t: fpu sse2 avx2 avx512f {more}
"""
WORLD = Environment(
    python="3.11.9", torch="2.13.0", bitsandbytes="0.48.2", cpu="Xeon", instructions="avx2 avx512", threads=2,
    wait_policy="passive", commit="a" * 40, machine="0123456789abcdef",
)  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "instructions", "device_class"),
    [
        ("", "avx2 avx512", "cpu:avx512"),
        ("avx512_bf16", "avx2 avx512 avx512_bf16", "cpu:avx512_bf16"),
        ("avx512_bf16 amx_tile", "avx2 avx512 avx512_bf16 amx", "cpu:avx512_bf16"),
    ],
)
def test_a_processor_is_classed_by_its_flags(tmp_path: Path, flags: str, instructions: str, device_class: str) -> None:
    (tmp_path / "cpuinfo").write_text(XEON.format(more=flags))
    name, found = environment.processor(tmp_path / "cpuinfo")
    assert (name, found) == ("Intel(R) Xeon(R) Processor @ 2.50GHz", instructions)
    assert Environment(instructions=found).device_class == device_class


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", "fpu sse2", "cpu:x86"),
        ("AMD64", "fpu sse2 avx2", "cpu:avx2"),
        ("aarch64", "asimd", "cpu:aarch64"),
        ("arm64", "", "cpu:arm64"),
    ],
)
def test_processors_without_avx_are_classed_by_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, flags: str, expected: str
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\n")
    assert Environment(instructions=environment.processor(tmp_path / "cpuinfo")[1]).device_class == expected
    assert environment.processor(tmp_path / "absent")[0]


def test_capture_reads_this_processs_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    world = capture("cpu", 2, {"cuda": "12.8", "bitsandbytes_library": "libbitsandbytes_cpu.so"})
    assert (world.device, world.threads, world.wait_policy) == ("cpu", 2, "passive")
    assert (world.numpy, world.python) == (version("numpy"), platform.python_version())
    assert (world.cuda, world.bitsandbytes_library, world.gpu) == ("12.8", "libbitsandbytes_cpu.so", "")
    assert world.cpu
    assert world.device_class.startswith("cpu:")
    assert capture("cpu", 2, {"cuda": "12.8", "bitsandbytes_library": "libbitsandbytes_cpu.so"}) == world


def test_capture_on_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "version").write_text("570.124.06\n")
    monkeypatch.setattr(environment, "DRIVER_VERSION", tmp_path / "version")
    cards = [Gpu("NVIDIA H100", "sm_90", 0, "GPU-1")]
    monkeypatch.setattr(environment, "cuda_devices", lambda: cards)
    world = capture("cuda", 2)
    assert (world.gpu, world.sm, world.driver, world.device_class) == (
        "NVIDIA H100", "sm_90", "570.124.06", "cuda:sm_90",
    )  # fmt: skip
    cards[0] = Gpu("NVIDIA H100", "sm_90", 0, "GPU-2")
    assert capture("cuda", 2) == world  # an equal card of one host: rows of either are resumed, and compared in time
    cards[0] = Gpu("NVIDIA H200", "sm_90", 0, "GPU-2")
    assert capture("cuda", 2).machine != world.machine
    assert capture("cpu", 2).machine not in {world.machine, capture("cuda", 2).machine}


def test_no_card_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "cuda_devices", lambda: [])
    monkeypatch.setattr(environment, "trouble", lambda: "no NVIDIA driver")
    with pytest.raises(HarnessError, match=r"^no CUDA device: no NVIDIA driver; use --device cpu$"):
        capture("cuda", 2)


def test_a_library_that_is_not_installed_is_absent() -> None:
    assert environment.installed_version("no-such-distribution-here") == ""


def test_the_machine_id_hides_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "id").write_text("3d1219c7c4c5404aaa1f6d2a48adfda4\n")
    monkeypatch.setattr(environment, "MACHINE_ID", tmp_path / "id")
    here = environment.machine_id("Xeon")
    assert len(here) == 16
    assert here not in "3d1219c7c4c5404aaa1f6d2a48adfda4"
    assert environment.machine_id("Epyc") != here
    monkeypatch.setattr(environment, "MACHINE_ID", tmp_path / "absent")
    assert environment.machine_id("Xeon") not in {here, ""}


def test_checkout_and_its_dirty_flag(tmp_path: Path) -> None:
    assert environment.checkout(tmp_path) == {"commit": "", "dirty": False}

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.check_output(["git", "-C", str(tmp_path), *who, *arguments], text=True).strip()

    git("init", "-q")
    (tmp_path / "case.py").write_text("1\n")
    git("add", ".")
    git("commit", "-qm", "first")
    (tmp_path / "harness-report").mkdir()
    (tmp_path / "harness-report" / "report.md").write_text("untracked\n")
    assert environment.checkout(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "case.py").write_text("2\n")
    assert environment.checkout(tmp_path)["dirty"] is True


def test_without_git_the_checkout_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.checkout(Path.cwd()) == {"commit": "", "dirty": False}


def test_the_id_covers_all_but_the_checkout() -> None:
    assert len(WORLD.id) == 12
    assert replace(WORLD, commit="b" * 40, dirty=True).id == WORLD.id
    moved = {"torch": "3", "threads": 4, "machine": "f" * 16, "cpu": "Epyc", "kernels": "1"}
    assert len({WORLD.id, *(replace(WORLD, **{name: value}).id for name, value in moved.items())}) == 6  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CLASS_FIELDS)
def test_every_version_and_thread_setting_moves_the_environment_class(name: str) -> None:
    other = replace(WORLD, **{name: 4 if name == "threads" else "other"})  # type: ignore[arg-type]
    assert other.environment_class != WORLD.environment_class
    assert other.device_class == WORLD.device_class


@pytest.mark.parametrize("name", WAITING)
def test_how_threads_wait_moves_a_time_and_no_class(name: str) -> None:
    before = replace(WORLD, wait_policy="", thread_library="libgomp.so.1")
    other = replace(before, **{name: "other"})  # type: ignore[arg-type]
    assert other.environment_class == WORLD.environment_class == before.environment_class
    assert other.id != before.id
    assert class_difference(before, other) == ""
    assert waiting_difference(before, other).startswith(f"{name}: ")
    assert waiting_difference(before, before) == waiting_difference(replace(before, thread_library=""), before) == ""


def test_the_machine_does_not_move_the_environment_class() -> None:
    assert replace(WORLD, machine="f" * 16, commit="").environment_class == WORLD.environment_class
    assert WORLD.environment_class.startswith("cpu:avx512:")


def test_difference_is_one_line_a_field() -> None:
    now = replace(WORLD, bitsandbytes="0.50.2", kernels="0.3", threads=4, dirty=True, commit="")
    assert difference(WORLD, now) == [
        "bitsandbytes: 0.48.2 -> 0.50.2",
        "kernels: absent -> 0.3",
        "threads: 2 -> 4",
        f"commit: {'a' * 40} -> absent",
        "dirty: no -> yes",
    ]
    assert difference(WORLD, WORLD) == []


texts = st.text(max_size=8)


@given(texts, texts, st.integers(0, 512), st.booleans())
def test_round_trip_through_json(torch: str, cpu: str, threads: int, dirty: bool) -> None:
    world = replace(WORLD, torch=torch, cpu=cpu, threads=threads, dirty=dirty)
    again = Environment.from_dict(json.loads(json.dumps(world.to_dict())))
    assert again == world
    assert again.id == world.id


def test_a_newer_field_is_ignored_and_an_absent_one_defaults() -> None:
    assert Environment.from_dict({"torch": "2.13.0", "npu": "x"}) == Environment(torch="2.13.0")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"threads": "2"}, "environment: threads must be a whole number, not '2'"),
        ({"threads": True}, "environment: threads must be a whole number, not True"),
        ({"torch": 2.13}, "environment: torch must be text, not 2.13"),
        ({"dirty": 1}, "environment: dirty must be true or false, not 1"),
    ],
)
def test_a_field_of_the_wrong_type_is_named(data: dict[str, Any], message: str) -> None:
    with pytest.raises(BadFile, match=message):
        Environment.from_dict(data)


def test_capturing_imports_no_torch() -> None:
    code = "import sys, harness.core.environment as e; e.capture('cpu', 2); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
