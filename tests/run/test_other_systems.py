"""Where Windows and macOS lack what Linux has: the modules are hidden from a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HIDING = """
import os, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource"):
            raise ImportError(f"no module {name} on this system")

sys.meta_path.insert(0, Hidden())
sys.modules.pop("resource", None)
sys.modules.pop("fcntl", None)
if hasattr(os, "sched_getaffinity"):
    del os.sched_getaffinity
import pytest
"""
THEIRS = HIDING + 'sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "test_theirs.py"]))'
MEASURING = HIDING + 'sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--models", "tiny-gpt2", "test_cases.py"]))'


def run(code: str, folder: Path) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_other_peoples_pytest_is_left_alone_and_a_measuring_one_ends_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "test_theirs.py").write_text("def test_theirs():\n    pass\n")
    status, output = run(THEIRS, tmp_path)
    assert (status, "1 passed" in output) == (0, True), output
    (tmp_path / "pyproject.toml").write_text("[tool.harness]\n")
    (tmp_path / "test_cases.py").write_text("from harness.cases.test_measured import test_measured\n")
    status, output = run(MEASURING, tmp_path)
    assert status == 4, output
    assert "ERROR: measuring needs file locks that the kernel drops" in output
    assert "Traceback" not in output
