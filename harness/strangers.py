"""Where a stranger's file goes through somebody's library: whatever the library raises becomes one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from harness.errors import BadFile, HarnessError

NO_MEMORY = (
    "can't allocate memory",
    "Cannot allocate memory",
    "std::bad_alloc",
    "can't start new thread",
    "out of memory",
)


def starved(error: BaseException) -> bool:
    """Whether memory is to blame, in the words of whichever library met it."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """BadFile, naming `what`, for any error of a library's but those of the machine: memory and disks."""
    try:
        yield
    except HarnessError:
        raise
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # of Rust code: no Exception
        system = isinstance(error, OSError) and error.errno is not None
        if not (isinstance(error, Exception) or panic) or starved(error) or system or "os error" in str(error):
            raise
        lines = str(error).strip().splitlines()
        told = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
        raise BadFile(f"{what} cannot be read ({told}): copy it again, or name another") from error
