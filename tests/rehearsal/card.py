"""A pretended card: real values, computed on the host, with the manners of a CUDA device.

How to use it, in a test of one process:

    with pretended() as card:  # torch.cuda answers, and .to("cuda") gives tensors that lie "on the card"
        ...

and in a real pytest session, whose groups run in processes of their own: `site/sitecustomize.py` beside this file
says how.

What it does:

- *Places.* A tensor whose storage was made on the card says `device(type='cuda', index=0)`. An operation on tensors of
  both places raises as torch does (a host scalar may join, and a host index of a card's tensor); so does `.numpy()`.
- *Memory.* Every storage on the card takes its bytes from `pool.Pool`, torch's caching allocator in small, and gives
  them back when it is freed: `torch.cuda.max_memory_allocated` and its like are exact and the same every time.
- *Time* is made up: a launch takes the host LAUNCH seconds, a kernel the card the time of its bytes, one after another
  behind what is queued. Events, the profiler and `Card.host` tell these times, equal in every run. What the host has
  not waited for is not there: an event's time raises, a copy to the host that does not block holds GARBAGE.
- *Values* are the host's own kernels'. Half products run through fp32 as `cpu` runs them, so that a
  figure under fp16 equals that of `dtype=fp16` on the CPU bit for bit (see `half_products`). Pieces of work that a
  pool of threads would take run one after another, since torch's modes belong to a thread.

What it cannot show: kernels of a card (their sums' order, their bugs, their speed), the context, cuBLAS workspaces.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import types
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from harness.core import gpus
from harness.methods.quantizing import bnb
from harness.methods.quantizing import cpu as cpu_products
from tests.rehearsal.pool import NoRoom, Pool

CARD, HOST = torch.device("cuda", 0), torch.device("cpu")
NAME, CAPABILITY, MEMORY = "Pretended Card", (9, 0), 80 * 2**30
UUID = "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"
ANSWER = gpus.Answer((gpus.Gpu(NAME, "sm_90", 0, UUID, MEMORY),))  # of the driver, where there is none
LAUNCH = 5e-6  # seconds that the host takes to launch a kernel
SHORTEST = 2e-6  # seconds of a kernel on the card
BANDWIDTH = 2e12  # bytes a second that a kernel reads and writes
GARBAGE = 0x41  # 12.08 in fp32: a loss that nobody's eye would catch
aten = torch.ops.aten
T = Tensor
DEVICE, IS_CUDA, IS_CPU = (vars(torch._C.TensorBase)[name].__get__ for name in ("device", "is_cuda", "is_cpu"))
BOTH = frozenset({"aten::copy_", "aten::_to_copy", "aten::set_"})  # take tensors of both places
INDEXING = frozenset({"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"})
WAITING = frozenset({"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero"})


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(arguments: Iterable[Any]) -> list[Tensor]:
    """The tensors among an operation's arguments or results, those in lists too."""
    found: list[Tensor] = []
    for one in arguments:
        if isinstance(one, T):
            found.append(one)
        elif isinstance(one, (list, tuple)):
            found += _tensors(one)
    return found


@functools.cache
def _known(func: Any) -> tuple[str, bool]:
    """An operation's name without its overload, and whether it is a composition of others."""
    return func._schema.name, func._can_decompose()


class Card:
    """What lies on the card, its memory and its clocks.

    Attributes:
        pool: the allocator.
        kernels: launches so far, by operation; copies between host and card are 'Memcpy HtoD' and 'Memcpy DtoH'.
        waits: how often the host waited for the card, by what made it wait.
        host, device: seconds that both have come to; the card is busy until `device`.
    """

    def __init__(self, total: int = MEMORY) -> None:
        self.pool = Pool(total)
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.busy = 0.0  # seconds of all kernels
        self.host = self.device = 0.0
        self.queued = self.done = 0  # launches and events: how many were queued, and up to which the host waited
        self._held: dict[int, int] = {}  # a storage's address -> its key in the pool
        self._freed: deque[int] = deque()  # keys: finalizers run at any time, so they only leave them here
        self._next = 0
        self._late: list[tuple[Tensor, Tensor]] = []  # host tensors, and what they hold once the host has waited

    def has(self, tensor: Tensor) -> bool:
        """Whether the tensor lies on the card."""
        return not tensor.is_meta and _key(tensor) in self._held

    def put(self, tensor: Tensor) -> None:
        """Its storage lies on the card from here on; torch.OutOfMemoryError where there is no room."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._held:
            return
        self.settle()
        key = self._next = self._next + 1
        if storage.nbytes():
            try:
                self.pool.allocate(key, storage.nbytes())
            except NoRoom as error:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate: {error}") from error
        self._held[address] = key
        weakref.finalize(storage, self._gone, address, key).atexit = False

    def _gone(self, address: int, key: int) -> None:
        if self._held.get(address) == key:
            del self._held[address]
        self._freed.append(key)

    def settle(self) -> Pool:
        """The allocator, once it has taken back what was freed."""
        while self._freed:
            self.pool.free(self._freed.popleft())
        return self.pool

    def tensors(self) -> int:
        """Storages on the card."""
        return len(self._held)

    def launch(self, name: str, size: int) -> None:
        """Queue a kernel that reads and writes so many bytes."""
        seconds = max(SHORTEST, size / BANDWIDTH)
        self.kernels[name] += 1
        self.busy += seconds
        self.queued += 1
        self.host += LAUNCH
        self.device = max(self.device, self.host) + seconds

    def mark(self) -> tuple[int, float]:
        """Queue an event: its place in the queue and the time at which the card comes to it."""
        self.queued += 1
        self.device = max(self.device, self.host)
        return self.queued, self.device

    def wait(self, why: str = "synchronize") -> None:
        """The host waits until all that is queued is done; copies that did not block arrive."""
        self.waits[why] += 1
        self.host = max(self.host, self.device)
        self.done = self.queued
        for tensor, values in self._late:
            tensor.copy_(values)
        self._late.clear()

    def arrives_late(self, tensor: Tensor) -> None:
        """A copy on the host that holds garbage until the host has waited."""
        self._late.append((tensor, tensor.clone()))
        ctypes.memset(tensor.data_ptr(), GARBAGE, tensor.nbytes)  # whatever the dtype


def check_places(card: Card, name: str, args: tuple[Any, ...], given: list[Tensor]) -> None:
    """Raise as torch does where an operation is given tensors of both places."""
    if name in BOTH:
        return
    if name in INDEXING:
        target, indices, *values = args[:3]
        if not card.has(target):
            if any(card.has(index) for index in _tensors(indices)):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        given = [target, *_tensors(tuple(values))]
    there = [tensor for tensor in given if card.has(tensor)]
    here = [tensor for tensor in given if tensor.dim() and not tensor.is_meta and not card.has(tensor)]
    in_place = name.endswith("_") and not name.endswith("__") and isinstance(args[0], T)
    if there and (here or (in_place and not card.has(args[0]))):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({name})"
        )


class Placing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every operation: checks where its tensors lie, runs it on the host, puts what it made where it belongs."""

    def __init__(self, card: Card) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.card = card

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run one operation."""
        card, named = self.card, dict(kwargs or {})
        name, composed = _known(func)
        if composed:  # in inference mode torch hands over whole compositions: ask again for the parts
            with self:
                return func.decompose(*args, **named)
        if name == "bitsandbytes::gemm_4bit" and card.has(args[0]):
            from bitsandbytes.backends.default import ops  # the weight that it dequantizes lies on the card

            with torch._C.DisableTorchFunction(), self:
                return ops._gemm_4bit_default_impl(*args, **named)
        with torch._C.DisableTorchFunction():
            given = _tensors(args) + _tensors(tuple(named.values()))
            check_places(card, name, args, given)
            asked = named.get("device")
            if asked is not None and torch.device(asked).type == "cuda":
                named["device"], there = HOST, True
            elif asked is not None:
                there = False
            elif name == "aten::copy_":
                there = card.has(args[0])
            else:
                there = any(card.has(one) for one in given)
            before = {_key(one) for one in given if not one.is_meta}
            found = func(*args, **named)
            made = [one for one in _tensors((found,)) if not one.is_meta]
            self.account(name, there, given, made, before)
            return found

    def account(self, name: str, there: bool, given: list[Tensor], made: list[Tensor], before: set[int]) -> None:
        """Place what was made, and queue the work on the card or wait for it."""
        card = self.card
        fresh = [one for one in made if _key(one) not in before]
        for one in fresh if there else ():
            card.put(one)
        from_card = any(card.has(one) for one in given)
        if name in WAITING and from_card:
            card.wait(name)
        size = sum(one.nbytes for one in (*given, *made))
        if name in ("aten::copy_", "aten::_to_copy") and given:
            source = given[-1]
            if there and not card.has(source):
                card.launch("Memcpy HtoD", size)
                return
            if not there and card.has(source):
                card.launch("Memcpy DtoH", size)
                card.wait("Memcpy DtoH")
                return
        if there and (fresh or name.endswith("_")):  # a view launches nothing
            card.launch(name, size)


def half_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` as `cpu_products.linear_in_fp32` computes it: half inputs, fp32 sums."""
    return cpu_products.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def half_addmm(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`torch.addmm`, which Conv1D calls, as `cpu_products.conv1d_in_fp32` computes it."""
    return (x.float() @ weight.float() + bias.float()).to(x.dtype)


HALF: dict[Any, Callable[..., Tensor]] = {functional.linear: half_linear, torch.addmm: half_addmm}


def through_fp32(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call is a half product that this processor takes through fp32."""
    if func not in HALF:
        return False
    given = _tensors((*args, *kwargs.values()))
    kinds = {one.dtype for one in given}
    return (
        len(kinds) == 1
        and not cpu_products.native(kinds.pop())
        and not (torch.is_grad_enabled() and any(one.requires_grad for one in given))
    )


class HalfProducts(TorchFunctionMode):
    """Half products through fp32, those of quantized layers and of libraries too; on any tensor of the host."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute a half product by its stand-in, anything else as it is."""
        named = dict(kwargs or {})
        return HALF[func](*args, **named) if through_fp32(func, args, named) else func(*args, **named)


def half_products() -> HalfProducts:
    """What the CPU's run of a comparison enters, so that its half products are summed as the pretended card's are.

    The engine takes plain layers through fp32 already; layers that dequantize in half precision are torch's own half
    GEMM, which sums in another order. Here both take the one way, quicker where no half products are in hardware.
    """
    return HalfProducts()


class Answering(TorchFunctionMode):
    """What torch's Python interface says of tensors on the card."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card
        self.answers: dict[Any, Callable[[Tensor], Any]] = {
            DEVICE: lambda x: x.device if x.is_meta else self.place(x),
            IS_CUDA: card.has,
            IS_CPU: lambda x: x.is_cpu and not card.has(x),
            T.get_device: lambda x: 0 if card.has(x) else -1,
            T.cpu: lambda x: self.moved(x, HOST),
            T.cuda: lambda x: self.moved(x, CARD),
        }

    def place(self, x: Tensor) -> torch.device:
        """Where a tensor lies."""
        return CARD if self.card.has(x) else HOST

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Answer for the card, or hand on."""
        named, card = dict(kwargs or {}), self.card
        x = args[0] if args and isinstance(args[0], T) else None
        if x is not None and func in self.answers:
            return x.is_cpu if x.is_meta and func == IS_CPU else self.answers[func](x)
        if x is not None and not x.is_meta:
            if func in (T.numpy, T.__array__) and card.has(x):
                raise TypeError(
                    "can't convert cuda:0 device type tensor to numpy. "
                    "Use Tensor.cpu() to copy the tensor to host memory first."
                )
            if func is T.to:
                return self.to(x, *args[1:], **named)
            if func is T.__deepcopy__ and card.has(x):
                return self.copied(x, *args[1:])
            if func is T.tolist and card.has(x):
                card.wait("tolist")
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and _on_card(named.get("device")):
            del named["device"]
            return self.moved(func(*args, **named), CARD)
        if through_fp32(func, args, named):
            return self.product(func, args, named)
        return func(*args, **named)

    def product(self, func: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> Tensor:
        """A half product through fp32; the copies in fp32 are not the card's, which multiplies halves."""
        given = _tensors((*args, *named.values()))
        check_places(self.card, str(func.__name__), args, given)
        with _disable_current_modes():
            found = HALF[func](*args, **named)
        if any(self.card.has(one) for one in given):
            self.card.put(found)
            self.card.launch(f"half {func.__name__}", found.nbytes + sum(one.nbytes for one in given))
        return found

    def to(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        """`Tensor.to` in all its forms."""
        again = bool(named.pop("copy", False))
        if args and isinstance(args[0], T):
            device, dtype, blocking, layout = self.place(args[0]), args[0].dtype, True, None
        else:
            device, dtype, free, layout = torch._C._nn._parse_to(*args, **named)
            blocking = not free
        if device is not None and device.type == "meta":
            return x.to(*args, **named)
        return self.moved(x, device, dtype, copied=again, blocking=blocking, layout=layout)

    def moved(
        self,
        x: Tensor,
        device: torch.device | None,
        dtype: torch.dtype | None = None,
        *,
        copied: bool = False,
        blocking: bool = True,
        layout: Any = None,
    ) -> Tensor:
        """The tensor there and in that dtype: itself where it is so already."""
        here = self.place(x)
        device, dtype = device or here, dtype or x.dtype
        if device.type == here.type and dtype == x.dtype and not copied:
            return x
        more = {} if layout is None else {"memory_format": layout}
        found: Tensor = aten._to_copy(x, dtype=dtype, device=device, **more)
        if not blocking and here == CARD and device.type == "cpu":
            with _disable_current_modes():
                self.card.arrives_late(found)
        return found

    def copied(self, x: Tensor, memo: dict[int, Any]) -> Tensor:
        """`copy.deepcopy` of a tensor on the card, which copies a storage behind torch's operations."""
        if id(x) in memo:
            found: Tensor = memo[id(x)]
            return found
        with _disable_current_modes():
            found = copy.deepcopy(x, memo)
            self.card.put(found)
        return found


def _on_card(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _event(card: Card) -> type:
    """`torch.cuda.Event` over the card's clock."""

    class Event:
        def __init__(self, enable_timing: bool = False, **_: Any) -> None:
            self.timed, self.place, self.at = enable_timing, 0, 0.0

        def record(self, stream: Any = None) -> None:
            self.place, self.at = card.mark()

        def query(self) -> bool:
            return self.place <= card.done

        def synchronize(self) -> None:
            card.wait("event")

        def elapsed_time(self, end: Event) -> float:
            """Milliseconds; raises as CUDA does for what nobody waited for."""
            if not (self.timed and end.timed):
                raise ValueError("Both events must be created with argument 'enable_timing=True'.")
            if not (self.place and end.place):
                raise ValueError("Both events must be recorded before calculating elapsed time.")
            if not (self.query() and end.query()):
                raise RuntimeError("CUDA error: device not ready")
            return (end.at - self.at) * 1e3

    return Event


def _profile(card: Card) -> type:
    """`torch.profiler.profile` over the card's clock: kernels by operation, and the copies."""

    class Profile:
        def __init__(self, activities: Any = None, **_: Any) -> None:
            self.found: list[Any] = []

        def __enter__(self) -> Profile:
            self.before, self.busy = Counter(card.kernels), card.busy
            return self

        def __exit__(self, *_: object) -> None:
            ran = card.kernels - self.before
            each = (card.busy - self.busy) / max(1, ran.total())
            self.found = [
                types.SimpleNamespace(
                    key=name,
                    count=count,
                    device_type=types.SimpleNamespace(name="CUDA"),
                    self_device_time_total=count * each * 1e6,
                    is_user_annotation=False,
                )
                for name, count in ran.items()
            ]

        def key_averages(self) -> list[Any]:
            return self.found

    return Profile


def _cuda(card: Card) -> dict[str, Any]:
    """What `torch.cuda` answers of the card."""
    major, minor = CAPABILITY
    properties = types.SimpleNamespace(
        name=NAME, major=major, minor=minor, total_memory=card.pool.total, multi_processor_count=132, uuid=UUID
    )

    def always(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    def statistic(name: str) -> Callable[..., int]:
        return lambda *_, **__: int(getattr(card.settle(), name))

    return {
        "is_available": always(True),
        "is_initialized": always(True),
        "is_bf16_supported": always(True),
        "init": always(None),
        "_lazy_init": always(None),
        "_is_in_bad_fork": always(False),
        "device_count": always(1),
        "current_device": always(0),
        "get_arch_list": always([f"sm_{major}{minor}"]),
        "get_device_name": always(NAME),
        "get_device_capability": always(CAPABILITY),
        "get_device_properties": always(properties),
        "synchronize": lambda device=None: card.wait(),
        "Event": _event(card),
        "empty_cache": lambda: card.settle().empty_cache(),
        "memory_allocated": statistic("allocated"),
        "memory_reserved": statistic("reserved"),
        "max_memory_allocated": statistic("peak_allocated"),
        "max_memory_reserved": statistic("peak_reserved"),
        "memory_stats": lambda device=None: {"requested_bytes.all.peak": card.settle().peak_requested},
        "reset_peak_memory_stats": lambda device=None: card.settle().reset_peaks(),
        "mem_get_info": lambda device=None: (card.pool.total - card.settle().reserved, card.pool.total),
    }


def _run_now(pool: ThreadPoolExecutor, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
    """`ThreadPoolExecutor.submit` in the caller's own thread, where the modes are."""
    future: Future[Any] = Future()
    try:
        future.set_result(work(*args, **kwargs))
    except Exception as error:
        future.set_exception(error)
    return future


def preload() -> None:
    """Import what looks for a card when it is imported, before there is one: bitsandbytes' CPU kernels compute."""
    import accelerate  # noqa: F401

    bnb.preload()


@contextlib.contextmanager
def pretended(total: int = MEMORY) -> Iterator[Card]:
    """Within, this thread's torch has a card with so many bytes of memory, and the driver shows it."""
    preload()
    card = Card(total)
    with contextlib.ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(mock.patch.multiple(torch.cuda, **_cuda(card)))
        stack.enter_context(patch(torch.profiler, "profile", _profile(card)))
        stack.enter_context(patch(torch.version, "cuda", "13.0"))
        stack.enter_context(patch(ThreadPoolExecutor, "submit", _run_now))
        if gpus.open_library() is None:
            stack.enter_context(patch(gpus, "asked", lambda visible: ANSWER))
        stack.enter_context(Placing(card))
        stack.enter_context(Answering(card))
        yield card
