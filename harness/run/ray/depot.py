"""Beside the driver, in a process of Ray's: which rows it has, and folders of its cache for nodes that lack them."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from harness.core.files import cache_dir, locked

RECORD = "harness.json"  # what `checkpoints` leaves in a folder that is whole


class Depot:
    """An actor on the driver's node; asked by tasks, told by the driver."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache  # the driver's
        self.received: set[str] = set()
        self.folders: dict[str, dict[str, Any]] = {}

    def note(self, case_id: str) -> None:
        """The driver has the row of a case."""
        self.received.add(case_id)

    def known(self) -> set[str]:
        """Ids of the cases whose rows the driver has: a retried task leaves them out."""
        return self.received

    def folder(self, name: str) -> dict[str, Any]:
        """The files of a built folder by name, in the object store once however many nodes ask."""
        import ray

        if name not in self.folders:
            files = sorted(path for path in (self.cache / "checkpoints" / name).iterdir() if path.is_file())
            self.folders[name] = {path.name: ray.put(np.fromfile(path, dtype=np.uint8)) for path in files}
        return self.folders[name]


def bring(name: str, depot: Any) -> None:
    """Put a built folder into this node's cache where it is not there: written aside, renamed when whole."""
    import ray

    home = cache_dir() / "checkpoints"
    if not name or (home / name / RECORD).is_file():
        return
    with locked(home / f"{name}.lock"):
        if (home / name / RECORD).is_file():
            return
        files = ray.get(depot.folder.remote(name))
        temporary = Path(tempfile.mkdtemp(dir=home, prefix=f".{name}."))
        try:
            for file, content in files.items():
                ray.get(content).tofile(temporary / file)
            temporary.chmod(0o755)
            shutil.rmtree(home / name, ignore_errors=True)  # one that is not whole
            temporary.rename(home / name)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
