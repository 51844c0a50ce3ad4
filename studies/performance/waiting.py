"""How threads wait between two operations: asleep, or spinning for a while (libgomp's GOMP_SPINCOUNT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.report import markup
from studies import pages
from studies.performance.peers import Worker, embedded, interleaved, middle

SPINS = ("0", "1000", "10000", "300000")  # turns of libgomp's waiting loop: asleep at once, and its own at the end
SUBJECTS = (("fp32", "fp32"), ("bf16", "bf16"), ("absmax-int8:compute=bf16", "fp32"), ("absmax-int8-w8a8", "fp32"))
REPETITIONS = 7


def measure(models: Sequence[str]) -> dict[str, Any]:
    """Prefill and decode of some methods under every count; each process runs its repetitions in one piece."""
    folder, found = embedded(), dict[str, Any]()
    for subject, dtype in SUBJECTS:
        found[subject] = {}
        for spin in SPINS:
            worker = Worker("harness", subject, folder, dtype, {"GOMP_SPINCOUNT": spin})
            found[subject][spin] = {
                work: middle(interleaved({spin: (worker, {"do": work})}, REPETITIONS)[spin])
                for work in ("prefill", "decode")
            }
            worker.close()
    return {"waiting": found}


def render(results: Mapping[str, Any]) -> str:
    """The table."""
    rows = [
        [f"`{subject}`", work, *(f"{1e3 * times[spin][work]:.1f}" if spin in times else "" for spin in SPINS)]
        for subject, times in results["waiting"].items()
        for work in ("prefill", "decode")
    ]
    return (
        "## How threads wait\n\nMilliseconds by GOMP_SPINCOUNT, medians of "
        f"{REPETITIONS} repetitions that follow each other in one process (above, a dozen processes take turns, and "
        "each begins with cold caches). 0 is asleep, as under `--wait-policy passive` and where `-n` shares the cores; "
        "libgomp's own count, as in a plain script and where a session has the cores to itself, is 300,000.\n\n"
        + markup.table(["", "work", *SPINS], rows)
    )


if __name__ == "__main__":
    raise SystemExit(
        pages.run(pages.Document("waiting", "How threads wait", measure, render, script="performance.waiting"))
    )
