"""Specifications of methods become typed arguments; whatever does not read is one line."""

from collections.abc import Iterator
from typing import Any

import pytest

from harness.core.contracts import Arguments, Method, Parameter, Scope
from harness.core.errors import BadSpecification, UnknownName
from harness.core.specification import parse
from harness.methods import absmax_int8, nf4
from harness.methods.quantizing.arguments import method_id, resolve
from harness.methods.references import METHODS as REFERENCES

BF16 = REFERENCES[1]


def nothing(*_: Any) -> Any:
    raise AssertionError("resolving arguments runs no method")


def library(**parameters: Parameter) -> Method:
    """A method that selects its modules by itself."""
    quantized: Iterator[Any] = iter(())
    return Method("lib", "", 4, nothing, nothing, lambda model: quantized, nothing, parameters)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "fp32"), ("cuda", "fp16")])
def test_defaults_depend_on_the_device(device: str, dtype: str) -> None:
    assert resolve(parse("nf4"), nf4.METHOD, device) == Arguments(dtype, Scope(), {"block": 64, "compute": "dtype"})


def test_everything_given() -> None:
    found = resolve(parse("nf4:mlp:layers=2-5:names=*up*:block=128:dtype=bf16"), nf4.METHOD, "cpu")
    assert found == Arguments("bf16", Scope("mlp", (2, 5), "*up*"), {"block": 128, "compute": "dtype"})
    assert type(found.values["block"]) is int


def test_a_reference_keeps_its_dtype_and_has_no_scope() -> None:
    assert resolve(parse("bf16"), BF16, "cuda") == Arguments("bf16", None, {})
    assert resolve(parse("bf16:dtype=bf16"), BF16, "cuda").dtype == "bf16"


def test_types_of_values() -> None:
    method = library(threshold=Parameter(float, 6.0, "outliers"), compute=Parameter(str, "same", "compute dtype"))
    assert resolve(parse("lib:threshold=2:compute=bf16"), method, "cpu").values == {"threshold": 2.0, "compute": "bf16"}


@pytest.mark.parametrize(
    ("text", "method", "error", "message"),
    [
        ("nf4:blok=64", nf4.METHOD, UnknownName, "argument of nf4 'blok'; did you mean 'block'?"),
        ("nf4:attn", nf4.METHOD, UnknownName, "unknown scope 'attn'"),
        ("nf4:mlp:all", nf4.METHOD, BadSpecification, "'mlp' and 'all' exclude each other"),
        ("nf4:block=63", nf4.METHOD, BadSpecification, "block is one of 16, 32, 64, .*, not '63'"),
        ("nf4:block=many", nf4.METHOD, BadSpecification, r"block is a whole number \(weights .*\), not 'many'"),
        ("nf4:block=64.0", nf4.METHOD, BadSpecification, "block is a whole number"),
        ("nf4:dtype=int8", nf4.METHOD, BadSpecification, "dtype is one of fp32, bf16, fp16, not 'int8'"),
        ("absmax-int8:block=64", absmax_int8.METHOD, UnknownName, r"'block' \(known: compute, dtype, layers, names\)"),
        ("bf16:dtype=fp32", BF16, BadSpecification, "bf16 is a reference in bf16, drop dtype="),
        ("bf16:all", BF16, BadSpecification, "bf16 takes no scope"),
        ("bf16:layers=1", BF16, UnknownName, r"'layers' \(known: dtype\)"),
        ("lib:threshold=nan", library(threshold=Parameter(float, 6.0, "outliers")), BadSpecification, "not 'nan'"),
    ],
)
def test_what_does_not_read_is_one_line(text: str, method: Method, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        resolve(parse(text), method, "cpu")
    assert "\n" not in str(caught.value)


def test_the_id_writes_every_default_out() -> None:
    short = resolve(parse("nf4"), nf4.METHOD, "cpu")
    long = resolve(parse("nf4:linear:block=64:dtype=fp32"), nf4.METHOD, "cpu")
    text = "nf4:linear:batch=1:block=64:compute=dtype:dtype=fp32:layers=all:names=*"
    assert method_id(nf4.METHOD, short, 1) == method_id(nf4.METHOD, long, 1) == text
    assert method_id(BF16, resolve(parse("bf16"), BF16, "cpu"), 4) == "bf16:batch=4:dtype=bf16"
    assert method_id(BF16, resolve(parse("bf16"), BF16, "cpu"), 0) == "bf16:batch=auto:dtype=bf16"


def test_the_id_tells_arguments_apart() -> None:
    texts = ["nf4", "nf4:all", "nf4:layers=3", "nf4:layers=3-4", "nf4:names=*q*", "nf4:block=32", "nf4:dtype=bf16"]
    texts.append("nf4:compute=bf16")
    ids = {method_id(nf4.METHOD, resolve(parse(text), nf4.METHOD, "cpu"), 1) for text in texts}
    assert len(ids) == len(texts)
