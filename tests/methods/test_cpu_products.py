from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from harness.methods.quantizing import cpu


def half_apart(a: torch.Tensor, b: torch.Tensor) -> int:
    """The largest distance of two half-precision tensors in representable numbers between them."""

    def ordered(values: torch.Tensor) -> torch.Tensor:
        bits = values.view(torch.int16).to(torch.int32)
        return torch.where(bits < 0, -32768 - bits, bits)

    return int((ordered(a) - ordered(b)).abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_fp32_products_are_the_half_gemm_within_one_ulp(
    dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = Conv1D(200, 300) if kind == "conv1d" else nn.Linear(300, 200, bias=kind == "linear")
    layer = layer.to(dtype).requires_grad_(False)
    x = torch.randn(2, 32, 300).to(dtype)
    torchs, apart = (
        layer(x),
        1 if cpu.native(dtype) else 2,
    )  # without such products torch rounds some sums twice
    monkeypatch.setattr(cpu, "native", lambda dtype: False)
    with cpu.quick_products(nn.Sequential(layer)):
        assert "forward" in vars(layer)
        ours = layer(x)
    assert ours.dtype == dtype
    assert half_apart(ours, torchs) <= apart
    weight = layer.weight.double() if kind == "conv1d" else layer.weight.double().T  # (in, out)
    exact = x.double() @ weight + (0 if layer.bias is None else layer.bias.double())
    # one rounding: half an ulp of the result, and the fp32 sum's own error beside it
    assert ((ours.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-5).all()


def test_fp32_products_leave_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    class Special(nn.Linear):
        pass

    hooked = nn.Linear(4, 4).bfloat16()
    own = hooked.forward
    vars(hooked)["forward"] = own  # as accelerate's hooks do
    model = nn.Sequential(nn.Linear(4, 4).bfloat16(), nn.Linear(4, 4), Special(4, 4).bfloat16(), hooked)
    monkeypatch.setattr(cpu, "native", lambda dtype: dtype == torch.float32)
    monkeypatch.setattr(cpu, "has_onednn", lambda: False)

    def patched() -> list[bool]:
        return ["forward" in vars(module) for module in model]

    def raise_within() -> None:
        with cpu.quick_products(model):
            assert patched() == [True, False, False, True]
            assert hooked.forward is own
            raise KeyError("within")

    with pytest.raises(KeyError, match="within"):
        raise_within()
    assert patched() == [False, False, False, True]


def test_native_products_by_processor_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset({"avx512f", "avx512_bf16"}))
    assert [cpu.native(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)] == [
        True,
        True,
        False,
    ]
    monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset({"avx2", "amx_fp16"}))
    assert [cpu.native(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)] == [
        True,
        False,
        True,
    ]


@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 7, 3), (5, 1024, 4), (17, 1025, 9), (33, 4096, 8)])
def test_int8_products_through_fp32_are_exact(rows: int, depth: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(depth)
    a = torch.randint(-128, 128, (rows, depth), dtype=torch.int8, generator=generator)
    b = torch.randint(-128, 128, (depth, columns), dtype=torch.int8, generator=generator)
    assert torch.equal(cpu.int8_product(a, b), (a.long() @ b.long()).to(torch.int32))
    extreme = torch.full((2, depth), -128, dtype=torch.int8)
    assert int(cpu.int8_product(extreme, extreme.T)[0, 0]) == depth * 128 * 128


@pytest.mark.parametrize(("flags", "replaced"), [({"avx512f"}, True), ({"avx512f", "avx512_vnni"}, False)])
def test_only_a_cpu_without_int8_products_is_helped(
    monkeypatch: pytest.MonkeyPatch, flags: set[str], replaced: bool
) -> None:
    monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset(flags))
    library = torch._int_mm
    with cpu.quick_int8_products():
        assert (torch._int_mm is not library) is replaced
    assert torch._int_mm is library


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of weights that oneDNN multiplies by, on a processor where it is the quicker one."""
    seen: list[tuple[int, ...]] = []
    multiply = torch.ops.mkldnn._linear_pointwise

    def spy(x: torch.Tensor, weight: torch.Tensor, *given: Any) -> Any:
        seen.append(tuple(weight.shape))
        return multiply(x, weight, *given)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", spy)
    monkeypatch.setattr(cpu, "has_onednn", lambda: True)
    monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset({"avx512f"}))
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 31), (1, 32), (2, 85), (512,), (0, 4)])
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 192), (768, 3072), (3072, 768), (2048, 2048)])
def test_onednns_product_is_the_product(
    bias: bool, shape: tuple[int, ...], inputs: int, outputs: int, calls: list[tuple[int, ...]]
) -> None:
    generator = torch.Generator().manual_seed(outputs)
    x, weight = torch.randn(*shape, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    b = torch.randn(outputs, generator=generator) if bias else None
    exact = functional.linear(x.double(), weight.double(), None if b is None else b.double())
    with torch.inference_mode():
        result = cpu.linear(x, weight, b)
    assert result.shape == exact.shape
    assert result.is_contiguous()
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-3)
    assert calls == ([(outputs, inputs)] if x.shape[:-1].numel() >= cpu.MANY else [])


def test_onednn_multiplies_nothing_that_wants_a_gradient_or_is_not_fp32(calls: list[tuple[int, ...]]) -> None:
    weight = torch.randn(8, 4)
    x = torch.randn(64, 4, requires_grad=True)
    cpu.linear(x, weight, None).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    with torch.inference_mode():
        cpu.linear(torch.randn(64, 4).bfloat16(), weight.bfloat16(), None)
    assert calls == []


def test_a_bias_that_is_no_plain_row_goes_by_torch(calls: list[tuple[int, ...]]) -> None:
    x, weight = torch.randn(64, 8), torch.randn(16, 8)
    with torch.inference_mode():
        for bias in (torch.randn(32)[::2], torch.randn(1).expand(16), torch.randn(1)):
            torch.testing.assert_close(cpu.linear(x, weight, bias), functional.linear(x, weight, bias))
    assert calls == []


def test_a_librarys_kind_of_weight_multiplies_in_its_own_way(calls: list[tuple[int, ...]]) -> None:
    class Theirs(torch.Tensor):
        pass

    layer = nn.Linear(8, 16)
    layer.weight = nn.Parameter(torch.randn(16, 8).as_subclass(Theirs))
    assert type(layer.weight) is not nn.Parameter
    with cpu.quick_products(nn.Sequential(layer)):
        assert "forward" not in vars(layer)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("vendor", "flags", "running", "wide", "tall"),
    [
        ("AuthenticAMD", {"avx2", "avx512f"}, 1, True, True),
        ("AuthenticAMD", {"avx2"}, 2, True, False),
        ("AuthenticAMD", {"avx2"}, 1, False, False),
        ("GenuineIntel", {"avx2", "avx512f"}, 2, False, False),
    ],
)
def test_whose_product_is_taken(
    vendor: str, flags: set[str], running: int, wide: bool, tall: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "cpu_facts", lambda: {"vendor_id": vendor})
    monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset(flags))
    cpu.has_onednn.cache_clear()
    torch.set_num_threads(running)
    try:
        assert cpu.by_onednn(torch.empty(16, 8)) is wide
        assert cpu.by_onednn(torch.empty(8, 16)) is tall
    finally:
        cpu.has_onednn.cache_clear()


def test_only_plain_fp32_layers_go_by_onednn_in_an_evaluation(
    calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "native", lambda dtype: True)
    plain, gpt2s = nn.Linear(8, 16), Conv1D(16, 8)
    others = nn.Linear(8, 16).bfloat16(), nn.Linear(8, 16, device="meta")
    model = nn.Sequential(plain, gpt2s, *others)
    x = torch.randn(40, 8)
    with torch.inference_mode():
        torchs = plain(x), gpt2s(x)
        with cpu.quick_products(model):
            assert [("forward" in vars(module)) for module in model] == [True, True, False, False]
            for module, wanted in zip((plain, gpt2s), torchs, strict=True):
                torch.testing.assert_close(module(x), wanted, rtol=1e-5, atol=1e-5)
                assert module(x[:0]).shape == (0, 16)
            with pytest.raises(RuntimeError, match="dtype"):  # as torch says it
                plain(x.double())
    assert calls == [(16, 8), (16, 8)]
    assert not any("forward" in vars(module) for module in model)
