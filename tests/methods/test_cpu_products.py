from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from harness.methods.quantizing import cpu

HERE = cpu.amd()  # blocks are used, so that they must give the same bits


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


@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 7, 3), (5, 1023, 4), (17, 1024, 9), (33, 4096, 8)])
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


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal to the bit where blocks are used; elsewhere a kernel may choose its order of sums by the width."""
    assert found.shape == wanted.shape
    assert found.is_contiguous()
    torch.testing.assert_close(found, wanted, **({"rtol": 0, "atol": 0} if HERE else {"rtol": 1e-5, "atol": 1e-4}))


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("running", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 31), (1, 32), (2, 85), (512,)])
@pytest.mark.parametrize("outputs", [1023, 1024, 1537, 8192])
def test_blocks_of_columns_are_the_product(
    running: int, bias: bool, shape: tuple[int, ...], outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(running)
    generator = torch.Generator().manual_seed(outputs)
    x, weight = torch.randn(*shape, 576, generator=generator), torch.randn(outputs, 576, generator=generator)
    b = torch.randn(outputs, generator=generator) if bias else None
    widths: list[int] = []
    multiply = torch.addmm if bias else torch.mm

    def spy(*given: Any, out: torch.Tensor) -> torch.Tensor:
        widths.append(out.shape[-1])
        return multiply(*given, out=out)

    monkeypatch.setattr(torch, "addmm" if bias else "mm", spy)
    for amd in (True, False):
        monkeypatch.setattr(cpu, "amd", lambda amd=amd: amd)
        same(cpu.linear(x, weight, b), functional.linear(x, weight, b))
    blocks = outputs >= (cpu.WIDE if running == 1 else cpu.WIDEST) and x.shape[:-1].numel() >= cpu.ROWS
    assert sum(widths) == (outputs if blocks else 0)
    assert all(cpu.BLOCK <= width < 2 * cpu.BLOCK for width in widths)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("rows", "pieces"), [(31, [1200]), (32, [512, 688])])
def test_columns_are_written_where_they_belong(rows: int, pieces: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "amd", lambda: True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, 40), torch.randn(1200, 40), torch.randn(2000)
    found, widths = torch.full((rows, 2000), 7.0), []

    def spy(*given: Any, out: torch.Tensor) -> None:
        widths.append(out.shape[-1])
        out.copy_(given[0] + given[1] @ given[2])

    monkeypatch.setattr(torch, "addmm", spy)
    cpu.into_columns(x, weight, bias, found, 500)
    assert widths == pieces
    torch.testing.assert_close(found[:, 500:1700], x @ weight.T + bias[500:1700], rtol=1e-5, atol=1e-4)
    assert (found[:, :500] == 7).all()
    assert (found[:, 1700:] == 7).all()


@pytest.mark.parametrize("amd", [True, False])
def test_only_wide_fp32_layers_of_an_amd_processor_go_in_blocks(amd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "amd", lambda: amd)
    monkeypatch.setattr(cpu, "native", lambda dtype: True)
    wide = nn.Linear(8, 1024).requires_grad_(False)
    others = nn.Linear(8, 1023), nn.Linear(8, 1024).bfloat16(), Conv1D(1024, 8), nn.Linear(8, 1024, device="meta")
    model = nn.Sequential(wide, *others)
    x = torch.randn(40, 8)
    torchs = wide(x)
    with cpu.quick_products(model):
        assert [("forward" in vars(module)) for module in model] == [amd, False, False, False, False]
        same(wide(x), torchs)
        assert wide(x[:0]).shape == (0, 1024)
        with pytest.raises(RuntimeError, match="dtype"):  # as torch says it
            wide(x.double())
    assert not any("forward" in vars(module) for module in model)
