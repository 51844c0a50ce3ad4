"""The cache of compiled loops: what lies there is run, so that damaged files go and others' folders are not used."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from harness.methods.quantizing import compiled

numba = pytest.importorskip("numba")


def following(number: int) -> int:
    return number + 1


class Planted:
    """A pickle that leaves a trace when it is read."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("trace",)


def damage(how: str, path: Path) -> None:
    content = bytearray(path.read_bytes())
    if how == "a bit flipped":
        content[len(content) // 2] ^= 0x40
    elif how == "planted":
        content = bytearray(pickle.dumps(Planted()))
    else:
        del content[0 if how == "empty" else len(content) // 2 :]
    path.write_bytes(content)


def test_what_is_damaged_or_planted_is_deleted_and_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "numba"))

    def called() -> Any:
        function = compiled.njit(following, cache=True)
        assert function(1) == 2
        return function.stats

    assert called().cache_misses
    assert called().cache_hits
    for how in ("empty", "cut short", "a bit flipped", "planted"):
        for pattern in ("*.nbi", "*.nbc"):
            (path,) = (tmp_path / "numba").rglob(pattern)
            damage(how, path)
            assert called().cache_misses, (how, pattern)
            assert called().cache_hits, (how, pattern)
            assert compiled.whole(path)
    assert not (tmp_path / "trace").exists()


def test_a_full_disk_costs_the_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "numba"))
    function = compiled.njit(following, cache=True)

    def full(*given: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(function._cache._cache_file, "_save_index", full)
    assert function(1) == 2


def test_a_seal_is_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.nbc"
    path.write_bytes(b"code" + sha256(b"code").digest())
    assert compiled.whole(path)
    path.write_bytes(b"code, another" + sha256(b"code").digest())
    assert not compiled.whole(path)
    assert not path.exists()
    assert not compiled.whole(path)


def open_folder(home: Path) -> None:
    home.chmod(0o777)


def open_file(home: Path) -> None:
    (home / "file").write_bytes(b"")
    (home / "file").chmod(0o666)


def closed(home: Path) -> None:
    open_file(home)
    home.chmod(0o700)  # whoever may write the file does not reach it


@pytest.mark.parametrize(("prepare", "used"), [(open_folder, False), (open_file, False), (closed, True)])
def test_a_folder_that_others_write_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepare: Callable[[Path], None], used: bool
) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path))
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(compiled, "user_cache_path", lambda name: tmp_path / "own")
    (tmp_path / "numba").mkdir(mode=0o755)
    prepare(tmp_path / "numba")
    home, note = compiled.kept_in()
    assert home == (tmp_path / "numba" if used else tmp_path / "own" / "numba-own")
    assert ("chmod -R go-w" in note) is not used
    monkeypatch.setattr(os, "geteuid", lambda: 12345)  # all of it is another's
    home, note = compiled.kept_in()
    assert home is None
    assert note.endswith("each process compiles its own")


def test_numba_cache_dir_is_looked_at_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "chosen"))
    assert compiled.kept_in() == (tmp_path / "chosen", "")
    assert (tmp_path / "chosen").stat().st_mode & 0o777 == 0o700
