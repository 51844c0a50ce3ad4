"""Folders of the cache: built once, whole or not at all, and found again only as they were built. No torch."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.core.errors import HarnessError
from harness.core.files import cache_dir, locked, replace_text, sha256_file
from harness.core.values import digest, parse_json
from harness.inputs.models.folder import revision

RECORD = "harness.json"  # beside a built folder's weights: what it is, its files' sizes, times and hashes
CHECK = "check"  # in it: a digest of all the rest
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def no_room(error: BaseException) -> bool:
    """Whether a disk is to blame: libraries in other languages tell it in words only."""
    return (isinstance(error, OSError) and error.errno in NO_ROOM) or "os error 28" in str(error)


def built(name: str, build: Callable[[Path], dict[str, str]], verify: bool = False) -> tuple[Path, dict[str, Any]]:
    """The cache's folder `name` and its record, made by `build(empty folder) -> facts` where it is not there whole.

    One process builds, others wait. What a killed process left unfinished, or a folder whose files are not what was
    recorded, is cleared away under the lock. Files are hashed where `verify` asks, and where a time or size changed.
    """
    home = cache_dir() / "checkpoints"
    folder = home / name
    try:
        record = _record(folder, verify)
        if record is None:
            with locked(home / f"{name}.lock"):
                record = _record(folder, True) or _build(folder, build)
    except Exception as error:
        if not no_room(error):
            raise
        raise HarnessError(
            f"{name} cannot be written to the cache {home} ({getattr(error, 'strerror', None) or error}): "
            "make room, or set HARNESS_CACHE to a folder with more"
        ) from error
    return folder, record


def _build(folder: Path, build: Callable[[Path], dict[str, str]]) -> dict[str, Any]:
    prefix = f".{folder.name}."
    for left in (*folder.parent.glob(f"{prefix}*"), folder):  # we hold the lock: whoever made them is gone
        if left.is_dir():
            shutil.rmtree(left)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=prefix))
    try:
        facts = {**build(temporary), "revision": revision(temporary, f"the built {folder.name}")}
        for file in temporary.iterdir():
            file.chmod(0o644)  # a cache may be shared; safetensors writes for its owner alone
        record = {**facts, "files": {file.name: [*_stamp(file), sha256_file(file)] for file in temporary.iterdir()}}
        replace_text(temporary / RECORD, json.dumps({**record, CHECK: digest(record)}, indent=1) + "\n")
        temporary.chmod(0o755)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return record


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _record(folder: Path, verify: bool) -> dict[str, Any] | None:
    """The record of a built folder, or None where it is not there, or not whole."""
    try:
        record: dict[str, Any] = parse_json((folder / RECORD).read_bytes())
        if record.pop(CHECK) != digest(record):
            return None
        for name, (size, written, sha) in record["files"].items():
            size_now, written_now = _stamp(folder / name)
            if size_now != size or ((verify or written_now != written) and sha256_file(folder / name) != sha):
                return None
    except (FileNotFoundError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return record
