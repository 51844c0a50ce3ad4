"""Per-token NLL beside its measurement: nll/<sha>.npz, named by the sha256 of its float32 values; no pickle."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from pathlib import Path
from zipfile import ZipFile

import numpy as np
from numpy.typing import NDArray

from harness.core.errors import BadFile
from harness.core.files import replace_bytes
from harness.core.values import digest

SHA = re.compile(r"[0-9a-f]{64}")  # a row is a file's word: no other path than this may come of it
POINTER = b"version https://git-lfs"  # how a file of Git LFS begins that was not fetched
LARGEST = 2**30  # bytes of one text's losses: a quarter of a billion tokens


def name_of(nll: NDArray[np.float32]) -> str:
    """The sha256 (hex) that names the values."""
    return digest(nll.astype("<f4").tobytes().hex())


def save(folder: Path, nll: NDArray[np.float32]) -> str:
    """Write the values where no file holds them yet, or one that was damaged; returns their name."""
    sha = name_of(nll)
    if not holds(folder, sha):
        buffer = io.BytesIO()
        np.savez_compressed(buffer, nll=nll.astype("<f4"))
        replace_bytes(folder / f"{sha}.npz", buffer.getvalue())
    return sha


def holds(folder: Path, sha: str) -> bool:
    """Whether the values of that name are there and whole."""
    try:
        return load(folder, sha) is not None
    except BadFile:
        return False


def load(folder: Path, sha: str) -> NDArray[np.float32] | None:
    """(tokens,) nats, None where there is no such file or Git LFS did not fetch it; BadFile where it is another's.

    A name that is no sha256 has no file, wherever it points: it may be a stranger's word.
    """
    path = folder / f"{sha}.npz"
    if not SHA.fullmatch(sha) or not path.is_file():
        return None
    try:
        data = path.read_bytes()
        if data.startswith(POINTER):
            return None
        nll = _values(data)
    except Exception as error:  # zipfile, zlib and numpy each have their own ways to say that bytes are wrong
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadFile(f"{path} cannot be read ({detail}): delete it and measure again") from error
    if name_of(nll) != sha:
        raise BadFile(f"{path} does not hold what its name says: delete it and measure again")
    return nll


def find(homes: Iterable[Path], sha: str) -> NDArray[np.float32] | None:
    """`load` from the first folder that holds them; None where none does."""
    return next((nll for home in homes if (nll := load(home, sha)) is not None), None)


def _values(data: bytes) -> NDArray[np.float32]:
    with ZipFile(io.BytesIO(data)) as archive:  # small archives can unpack to more than the memory holds
        if sum(item.file_size for item in archive.infolist()) > LARGEST:
            raise ValueError(f"it unpacks to more than {LARGEST >> 20} MiB")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        nll = arrays["nll"]
    if nll.ndim != 1 or nll.dtype.kind != "f":
        raise ValueError("it holds no list of numbers")
    return nll.astype("<f4")  # type: ignore[no-any-return]
