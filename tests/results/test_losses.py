"""Per-token losses on disk: named by what they hold, read only as that."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from harness.core.errors import BadFile
from harness.results import losses

VALUES = np.linspace(0, 4, 100, dtype=np.float32)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    sha = losses.save(tmp_path, VALUES)
    found = losses.load(tmp_path, sha)
    assert found is not None
    assert (found == VALUES).all()
    assert losses.load(tmp_path, "0" * 64) is None


@pytest.mark.parametrize("place", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("torn", [True, False])
def test_damage_is_one_line_and_saving_again_repairs_it(tmp_path: Path, place: float, torn: bool) -> None:
    sha = losses.save(tmp_path, VALUES)
    path = tmp_path / f"{sha}.npz"
    data = bytearray(path.read_bytes())
    at = int(place * len(data))
    path.write_bytes(data[:at] if torn else data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :])
    if not losses.holds(tmp_path, sha):  # zip's own dates and flags hold nothing
        with pytest.raises(BadFile, match="delete it and measure again"):
            losses.load(tmp_path, sha)
    assert losses.save(tmp_path, VALUES) == sha
    found = losses.load(tmp_path, sha)
    assert found is not None
    assert (found == VALUES).all()


@pytest.mark.parametrize("sha", ["../secret", "/etc/passwd", "", "A" * 64, "0" * 63])
def test_a_name_that_is_no_sha_has_no_file(tmp_path: Path, sha: str) -> None:
    inside = tmp_path / "nll"
    inside.mkdir()
    np.savez(tmp_path / "secret.npz", nll=VALUES)
    assert losses.load(inside, sha) is None


def test_an_archive_that_unpacks_to_more_than_the_memory_is_refused(tmp_path: Path) -> None:
    sha, buffer = "0" * 64, io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("nll.npy", "w", force_zip64=True) as file:
            for _ in range(1100):
                file.write(bytes(2**20))
    (tmp_path / f"{sha}.npz").write_bytes(buffer.getvalue())
    with pytest.raises(BadFile, match="unpacks to more"):
        losses.load(tmp_path, sha)


def test_pickled_arrays_are_not_unpickled(tmp_path: Path) -> None:
    sha, buffer = "0" * 64, io.BytesIO()
    np.savez(buffer, nll=np.array([print], dtype=object))
    (tmp_path / f"{sha}.npz").write_bytes(buffer.getvalue())
    with pytest.raises(BadFile):
        losses.load(tmp_path, sha)
