import os
import threading
from collections.abc import Iterator

import pytest
import torch

from harness import teams


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("threads", "count", "most", "shares"),
    [
        (1, 10, 8, [(0, 10)]),
        (4, 10, 0, [(0, 10)]),
        (4, 1, 8, [(0, 1)]),
        (4, 10, 2, [(0, 5), (5, 10)]),
        (4, 10, 4, [(0, 3), (3, 6), (6, 9), (9, 10)]),
        (4, 9, 4, [(0, 3), (3, 6), (6, 9)]),  # equal parts of three leave the fourth nothing
        (4, 3, 8, [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_every_one_is_in_one_share(threads: int, count: int, most: int, shares: list[tuple[int, int]]) -> None:
    torch.set_num_threads(threads)
    seen: list[tuple[int, int]] = []
    teams.shared(lambda start, stop: seen.append((start, stop)), count, most)
    assert sorted(seen) == shares
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_a_share_runs_as_its_caller_does_on_its_part_of_the_threads(inference: bool, grad: bool) -> None:
    torch.set_num_threads(6)
    seen: list[tuple[bool, bool, int, bool]] = []
    together = threading.Barrier(2)  # both shares at once

    def work(start: int, stop: int) -> None:
        here = threading.current_thread() is threading.main_thread()
        seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.get_num_threads(), here))
        together.wait(30)

    with torch.inference_mode(inference), torch.set_grad_enabled(grad):
        expected = (torch.is_inference_mode_enabled(), torch.is_grad_enabled(), 3)
        teams.shared(work, 8, 2)
    assert sorted(seen) == [(*expected, False), (*expected, True)]


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_any_share_is_raised_when_all_have_ended(failing: int) -> None:
    torch.set_num_threads(2)
    ended: list[int] = []

    def work(start: int, stop: int) -> None:
        if start == failing:
            raise KeyError(f"share {start}")
        ended.append(start)

    with pytest.raises(KeyError, match=f"share {failing}"):
        teams.shared(work, 2, 2)
    assert ended == [1 - failing]
    assert torch.get_num_threads() == 2


def test_a_fork_has_threads_of_its_own() -> None:
    torch.set_num_threads(2)
    teams.shared(lambda start, stop: None, 2, 2)  # threads that no fork takes along
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        found: list[int] = []
        teams.shared(lambda start, stop: found.append(start), 2, 2)
        os.write(write, bytes(sorted(found)))
        os._exit(0)
    os.close(write)
    assert os.read(read, 10) == bytes([0, 1])
    assert os.waitpid(child, 0)[1] == 0
