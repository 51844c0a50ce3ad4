"""The pretended card itself: places, memory, time and values as torch and CUDA have them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from harness.core import gpus
from harness.methods.quantizing import cpu as cpu_products
from harness.metrics.measuring.devices import Cuda
from tests.rehearsal.card import BANDWIDTH, CARD, LAUNCH, SHORTEST, Card, half_products, pretended
from tests.rehearsal.pool import MIB, NoRoom, Pool


@pytest.fixture
def card(one_thread: None) -> Iterator[Card]:
    with pretended() as found:
        yield found


@pytest.mark.parametrize(
    ("size", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (512, 512, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 1, 10 * MIB, 10 * MIB),  # rounded up first
        (11 * MIB, 12 * MIB, 12 * MIB),  # too little is left to be split off
        (12 * MIB + 1, 12 * MIB + 512, 14 * MIB),
        (9 * MIB, 9 * MIB, 20 * MIB),
    ],
)
def test_pool_takes_what_torchs_allocator_takes(size: int, allocated: int, reserved: int) -> None:
    pool = Pool()
    pool.allocate(1, size)
    assert (pool.allocated, pool.reserved) == (allocated, reserved)
    pool.free(1)
    assert (pool.allocated, pool.reserved) == (0, reserved)
    assert (pool.peak_allocated, pool.peak_reserved) == (allocated, reserved)
    pool.empty_cache()
    pool.reset_peaks()
    assert (pool.allocated, pool.reserved, pool.peak_allocated, pool.peak_reserved) == (0, 0, 0, 0)


def test_pool_joins_what_is_freed_and_takes_the_best_fit() -> None:
    pool = Pool()
    for key, size in enumerate((4, 6, 4, 6)):
        pool.allocate(key, size * MIB)
    assert pool.reserved == 20 * MIB
    pool.free(0)
    pool.free(2)
    pool.allocate(4, 4 * MIB)  # fits where it was
    assert pool.reserved == 20 * MIB
    pool.free(1)
    pool.free(4)
    pool.allocate(5, 14 * MIB)  # three neighbours became one
    assert pool.reserved == 20 * MIB
    pool.allocate(6, 2 * MIB)
    assert pool.reserved == 40 * MIB
    pool.empty_cache()  # both segments hold something
    assert pool.reserved == 40 * MIB


def test_full_pool_gives_back_before_it_refuses() -> None:
    pool = Pool(total=40 * MIB)
    pool.allocate(1, 30 * MIB)
    with pytest.raises(NoRoom):
        pool.allocate(2, 30 * MIB)
    pool.free(1)
    pool.allocate(3, 36 * MIB)
    assert pool.reserved == 36 * MIB


def test_tensors_say_where_they_lie(card: Card) -> None:
    here, there = torch.ones(4), torch.ones(4, device="cuda")
    assert (here.device.type, there.device) == ("cpu", CARD)
    assert there.is_cuda
    assert not there.is_cpu
    assert not here.is_cuda
    for made in (there[:2], there.view(2, 2), there + 1, torch.zeros_like(there), here.to("cuda"), here.cuda(),
                 torch.tensor([1.0], device="cuda"), there.new_empty(3), copy.deepcopy(there), there.half(),
                 here.to(there), nn.Linear(2, 2).to("cuda").weight, nn.Parameter(there)):  # fmt: skip
        assert made.device == CARD
        assert card.has(made)
    for made in (there.cpu(), there.to("cpu"), torch.zeros_like(here), torch.empty(3), torch.zeros(3, device="cpu")):
        assert made.device.type == "cpu"
    assert torch.empty(2, device="meta").device.type == "meta"
    assert there.to("meta").device.type == "meta"
    assert there.to("cuda") is there


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize(
    "mix",
    [
        lambda here, there: here + there,
        lambda here, there: there.add_(here),
        lambda here, there: here.add_(there[0, 0]),
        lambda here, there: here + there[0, 0],
        lambda here, there: here[0, 0].add_(there[0, 0]),
        lambda here, there: here @ there,
        lambda here, there: torch.cat([here, there]),
        lambda here, there: torch.where(there > 0, here, there),
        lambda here, there: functional.linear(there, here),
        lambda here, there: functional.linear(there.half(), here.half()),
        lambda here, there: functional.embedding(torch.tensor([0]), there),
        lambda here, there: there.index_select(0, torch.tensor([0])),
        lambda here, there: there.gather(0, torch.zeros(1, 2, dtype=torch.long)),
        lambda here, there: here[torch.tensor([0], device="cuda")],
        lambda here, there: there.__setitem__(torch.tensor([0]), here),
        lambda here, there: torch.equal(here, there),
        lambda here, there: torch.mm(here, here, out=there),
        lambda here, there: torch.bucketize(there, here[0]),
    ],
)
def test_mixing_places_raises(card: Card, mix: Callable[[Tensor, Tensor], Any], inference: bool) -> None:
    here, there = torch.ones(2, 2), torch.ones(2, 2, device="cuda")
    with torch.inference_mode(inference), pytest.raises(RuntimeError, match=r"same device"):
        mix(here, there)


def test_what_torch_lets_mix_mixes(card: Card) -> None:
    here, there = torch.ones(2, 2), torch.full((2, 2), 3.0, device="cuda")
    assert (there * torch.tensor(2.0)).device == CARD  # a scalar of the host
    assert (torch.tensor(2.0) * there).device == CARD
    assert there[torch.tensor([0])].device == CARD  # an index of the host
    here.copy_(there)
    assert here.tolist() == [[3.0, 3.0]] * 2
    there.copy_(here + 1)
    assert there.tolist() == [[4.0, 4.0]] * 2


def test_numpy_of_a_cards_tensor_raises(card: Card) -> None:
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        torch.ones(2, device="cuda").numpy()


def test_memory_is_given_back(card: Card) -> None:
    kept = torch.empty(MIB, device="cuda")  # fp32
    passing = torch.empty(MIB, device="cuda")
    assert torch.cuda.memory_allocated() == 8 * MIB
    view = passing[:1]
    del passing
    assert torch.cuda.memory_allocated() == 8 * MIB  # a view holds the whole
    del view
    assert torch.cuda.memory_allocated() == 4 * MIB
    assert torch.cuda.max_memory_allocated() == 8 * MIB
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() == 4 * MIB
    assert torch.cuda.memory_reserved() == 20 * MIB
    del kept
    torch.cuda.empty_cache()
    assert (torch.cuda.memory_reserved(), card.tensors()) == (0, 0)


def test_a_full_card_raises_as_torch_does(one_thread: None) -> None:
    with pretended(total=30 * MIB):
        kept = torch.empty(MIB, device="cuda")
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            torch.empty(8 * MIB, device="cuda")
        assert kept.is_cuda


def test_kernels_queue_behind_each_other(card: Card) -> None:
    x = torch.ones(16 * MIB, device="cuda")
    torch.cuda.synchronize()
    started, kernel = card.host, 2 * x.nbytes / BANDWIDTH  # read and written
    assert kernel > 3 * LAUNCH
    for _ in range(3):
        x.add_(1)
    assert card.host == pytest.approx(started + 3 * LAUNCH)
    assert card.device == pytest.approx(started + LAUNCH + 3 * kernel)
    torch.cuda.synchronize()
    assert card.host == card.device


def test_an_event_nobody_waited_for_has_no_time(card: Card) -> None:
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    x = torch.ones(4, device="cuda")
    torch.cuda.synchronize()
    start.record()
    x.add_(1)
    end.record()
    with pytest.raises(RuntimeError, match="device not ready"):
        start.elapsed_time(end)
    torch.cuda.synchronize()
    assert start.elapsed_time(end) == pytest.approx((LAUNCH + SHORTEST) * 1e3)


def test_a_copy_that_does_not_block_is_garbage_until_waited_for(card: Card) -> None:
    x = torch.arange(4.0, device="cuda")
    here = x.to("cpu", non_blocking=True)
    assert here.tolist() != [0.0, 1.0, 2.0, 3.0]
    torch.cuda.synchronize()
    assert here.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_the_profiler_counts_kernels_and_copies(card: Card) -> None:
    x = torch.ones(4, device="cuda")

    def work() -> None:
        (x + torch.ones(4).to("cuda")).cpu()

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
    assert {event.key: event.count for event in profile.key_averages()} == {
        "aten::add": 1,
        "Memcpy HtoD": 1,
        "Memcpy DtoH": 1,
    }
    proof = Cuda().proof(work)
    assert proof["kernels"] == 1
    assert proof["kernel_seconds"] == pytest.approx(3 * SHORTEST)


def test_reading_a_value_waits(card: Card) -> None:
    x = torch.ones(4, device="cuda")
    before = card.waits.total()
    assert float(x.sum()) == 4.0
    assert x.tolist() == [1.0] * 4
    assert torch.equal(x, x)
    assert card.waits.total() == before + 3


def test_work_for_a_pool_stays_on_the_card(card: Card) -> None:
    x = torch.ones(4, device="cuda")
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda value: x + value, range(3)))
        failing = pool.submit(lambda: x + torch.ones(4))
    assert all(one.is_cuda for one in made)
    with pytest.raises(RuntimeError, match="same device"):
        failing.result()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_products_are_those_of_the_engine_on_a_cpu(one_thread: None, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 40, 96).to(dtype)
    with torch.inference_mode():
        for layer in (nn.Linear(96, 1056).to(dtype), nn.Linear(96, 32, bias=False).to(dtype), Conv1D(64, 96).to(dtype)):
            model = nn.Sequential(layer)
            with cpu_products.quick_products(model):
                here = model(x)
            with half_products():
                assert torch.equal(model(x), here)
            with pretended():
                assert torch.equal(model.to("cuda")(x.to("cuda")).cpu(), here)


def test_half_products_leave_no_fp32_copy_in_the_peak(card: Card) -> None:
    layer, x = nn.Linear(1024, 1024, bias=False).half().to("cuda"), torch.ones(1, 1024, device="cuda").half()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    with torch.inference_mode():
        found = layer(x)
    assert torch.cuda.max_memory_allocated() == held + found.nbytes


def test_the_driver_shows_the_card(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "open_library", lambda: None)  # a machine without a driver
    assert gpus.cuda_devices() == []
    with pretended():
        (gpu,) = gpus.cuda_devices()
        assert (gpu.name, gpu.sm, gpus.smallest_card()) == ("Pretended Card", "sm_90", 80 * 2**30)
    assert gpus.cuda_devices() == []


def test_nothing_is_left_of_the_pretence(one_thread: None) -> None:
    with pretended():
        assert torch.cuda.is_available()
    assert not torch.cuda.is_available() or torch.version.cuda
    assert torch.ones(2).device.type == "cpu"
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(2).to("cuda:99")
