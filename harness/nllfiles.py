"""Per-token NLL beside its measurement: nll/<sha>.npz, named by the sha256 of its float32 values; no pickle."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np

from harness.errors import BadFile
from harness.files import replace_bytes
from harness.records import digest

if TYPE_CHECKING:
    from numpy.typing import NDArray


def name_of(nll: NDArray[np.float32]) -> str:
    """The sha256 (hex) that names the values."""
    return digest(nll.astype("<f4").tobytes().hex())


def save(folder: Path, nll: NDArray[np.float32]) -> str:
    """Write the values where no file holds them yet; returns their name."""
    sha = name_of(nll)
    path = folder / f"{sha}.npz"
    if not path.exists():
        buffer = io.BytesIO()
        np.savez_compressed(buffer, nll=nll.astype("<f4"))
        replace_bytes(path, buffer.getvalue())
    return sha


def load(folder: Path, sha: str) -> NDArray[np.float32] | None:
    """(tokens,) nats, None where there is no such file; BadFile where its bytes do not hash to its name."""
    path = folder / f"{sha}.npz"
    if not path.is_file():
        return None
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as data:
            nll: NDArray[np.float32] = data["nll"].astype("<f4")
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise BadFile(f"{path} cannot be read ({error}): delete it and measure again") from error
    if name_of(nll) != sha:
        raise BadFile(f"{path} does not hold what its name says: delete it and measure again")
    return nll
