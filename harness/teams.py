"""One piece of work shared out between threads that each run torch by themselves.

Torch shares out a product at a time, and threads that sleep between two of them must wake at each. Where a product
follows work of our own, and that another product, a thread that does the whole of its share wakes once.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


def shared(work: Callable[[int, int], None], count: int, most: int) -> None:
    """Run work(start, stop) over all of `count`, one share on this thread, the others beside it.

    Args:
        work: what one share is; runs under this thread's inference and grad modes, with its part of torch's threads.
        count: what is shared out, in equal parts but for the last.
        most: shares at most; there are never more than torch has threads here.

    Raises:
        Exception: the first that a share raised, when all have ended.
    """
    threads = torch.get_num_threads()
    shares = max(1, min(threads, most, count))
    if shares == 1:
        work(0, count)
        return
    each, inference, grad = -(-count // shares), torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def within(start: int) -> None:
        torch.set_num_threads(threads // shares)  # a thread's own, as the modes are
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            work(start, min(count, start + each))

    others = [_pool(os.getpid()).submit(within, start) for start in range(each, count, each)]
    try:
        within(0)
    finally:
        torch.set_num_threads(threads)
        failed = [error for other in others if (error := other.exception()) is not None]
    if failed:
        raise failed[0]


@functools.lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of a process: a fork starts its own."""
    return ThreadPoolExecutor(os.cpu_count(), "share")
