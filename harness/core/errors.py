"""What a user must act on: one line that names the fix. Anything else is a bug and keeps its traceback.

Where something goes through somebody's library: whatever it raises becomes one line, and says who is to blame.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import re
import traceback
from collections.abc import Iterable, Iterator

from harness.core.text import visible

LONGEST = 2000  # characters of a message: a stranger's file must not fill the terminal


class HarnessError(Exception):
    """A mistake in the user's input or world, told in one line that is harmless in a terminal."""

    def __str__(self) -> str:
        text = visible(super().__str__())
        return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


class UnknownName(HarnessError):
    """A name that no catalogue holds; lists the known ones and the nearest."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        super().__init__(f"unknown {kind} '{name}'{hint} (known: {', '.join(names)})")


class BadSpecification(HarnessError):
    """A specification that does not read as NAME or NAME:ARG:ARG, or an argument its owner refuses."""


class MissingAsset(HarnessError):
    """A model, text or file that is not there; the message says how to get it."""


class MissingPackage(HarnessError):
    """An optional distribution that is not installed; the message is the pip command."""

    def __init__(self, distribution: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package '{distribution}': pip install {distribution}")


class BadFile(HarnessError):
    """A baseline, report or configuration file that cannot be read as what it should be."""


class TextTooShort(HarnessError):
    """A text of which a protocol can score no token."""


class LeftOut(HarnessError):
    """A figure that this text or model can have none of: its row is left out with the reason, and nothing fails."""


class IncompleteQuantization(HarnessError):
    """A method that quantized fewer (or other) modules than it was asked to."""


MEMORY, KERNEL, DEVICE = "memory", "kernel", "device"  # what of the machine can be to blame
WORDS = {  # of whichever library met it; the first kind that is found holds
    MEMORY: (
        "can't allocate memory",
        "Cannot allocate memory",
        "std::bad_alloc",
        "can't start new thread",
        "out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
    ),
    KERNEL: (
        "no kernel image is available",
        "device kernel image is invalid",
        "unsupported toolchain",
        "STATUS_ARCH_MISMATCH",
    ),
    DEVICE: (
        "CUDA error",
        "CUDA driver error",
        "CUBLAS_STATUS_",
        "CUDNN_STATUS_",
        "Triton Error [CUDA]",
        "device-side assert",
    ),
}
SYSTEM = {  # what a system's refusal means, whoever met it; a full disk has words of its own (`folder.no_room`)
    errno.EIO: "a disk or its connection fails: see the system's log, and copy the file elsewhere",
    errno.ESTALE: "a network file system has lost the file: mount it again",
    errno.EMFILE: "this process may open no more files: raise `ulimit -n`",
    errno.ENFILE: "the system has no more open files to give: raise fs.file-max, or end what holds them",
    errno.ENAMETOOLONG: "a name is longer than this file system takes: give it a shorter one",
    errno.ENOLCK: "this file system gives no locks: name a folder on another",
}
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # of libraries in Rust, which have no number to give
OF_A_CARD = ("CUDA", "CUBLAS", "CUDNN")
LONGEST_LINE = 300  # characters of a library's line


def blamed(error: BaseException) -> tuple[str, str]:
    """What of the machine is to blame (MEMORY, KERNEL, DEVICE) and the line that says so; ('', '') where nothing is.

    After a device error the process's context is dead: every further call fails, so that the process must end.
    """
    for text in _said(error):
        for kind, words in WORDS.items():
            lines = [line.strip() for line in text.splitlines() if any(word in line for word in words)]
            if lines:
                return kind, lines[-1][:LONGEST_LINE]  # a traceback ends with what was raised
    return (MEMORY, str(error)[:LONGEST_LINE]) if isinstance(error, MemoryError) else ("", "")


def _said(error: BaseException) -> Iterator[str]:
    """An error's text, those of its causes, and what transformers kept back while it converted weights.

    It collects whatever a conversion raises in a report, goes on, and raises an error without a cause at the end.
    """
    chain: BaseException | None = error
    while chain is not None:
        yield str(chain)
        for frame, _ in traceback.walk_tb(chain.__traceback__):
            kept = getattr(frame.f_locals.get("loading_info"), "conversion_errors", None)
            yield from map(str, kept.values() if isinstance(kept, dict) else ())
        chain = chain.__cause__ or chain.__context__


def refused(error: BaseException) -> str:
    """What the system refused, in one line with the fix, through whichever library it came; '' where it did not."""
    chain: BaseException | None = error
    while chain is not None:
        told = OS_ERROR.search(str(chain))
        number = getattr(chain, "errno", None) or (int(told[1]) if told else 0)
        if number in SYSTEM:
            return f"{str(chain).partition(chr(10))[0][:LONGEST_LINE]}: {SYSTEM[number]}"
        chain = chain.__cause__ or chain.__context__
    return ""


def explained(kind: str, line: str) -> str:
    """One line for the user: what it is, in the library's words, and what to do."""
    if kind == KERNEL:
        return f"a kernel is missing for this card ({line}): install builds of torch and of the method's library for it"
    if kind == DEVICE:
        return f"a device error ({line}): set CUDA_LAUNCH_BLOCKING=1 to see which call; nvidia-smi tells of a bad card"
    return f"out of memory{' on the card' if any(word in line for word in OF_A_CARD) else ''}: {line}"


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """BadFile, naming `what`, for any error of a library's but those of the machine: memory, devices and disks."""
    try:
        yield
    except HarnessError:
        raise
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # of Rust code: no Exception
        system = isinstance(error, OSError) and error.errno is not None
        if not (isinstance(error, Exception) or panic) or blamed(error)[0] or system or "os error" in str(error):
            raise
        lines = str(error).strip().splitlines()
        words = f"{type(error).__name__}: {lines[0][:LONGEST_LINE]}" if lines else type(error).__name__
        raise BadFile(f"{what} cannot be read ({words}): copy it again, or name another") from error
