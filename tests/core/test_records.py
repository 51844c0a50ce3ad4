import json
import math

import pytest

from harness.core.records import Case, Row, Verdict
from harness.core.schema import SCHEMA
from harness.core.values import digest

CASE = Case("path:/tmp/a b", "nf4:block=64", "text:/x/y.txt", "chunk:512", "perplexity", "cpu")


def test_ids_are_unambiguous_and_plain() -> None:
    assert CASE.id == "path:%2Ftmp%2Fa%20b/nf4:block=64/text:%2Fx%2Fy.txt/chunk:512/perplexity/cpu"
    assert CASE.group == "path:%2Ftmp%2Fa%20b/nf4:block=64/cpu"
    assert CASE.family == "perplexity"
    assert Case("m", "f", "", "", "memory.storage", "cpu").id == "m/f/memory.storage/cpu"


@pytest.mark.parametrize("value", [1.5, math.inf, -math.inf, None])
def test_a_row_survives_json(value: float | None) -> None:
    row = Row.of(
        CASE,
        value=value,
        interval=(-math.inf, 0.25),
        samples=(0.1, math.inf),
        detail={"worst": 1.0, "names": ["a"]},
        verdict=Verdict.WORSE,
        verdict_baseline=Verdict.SAME,
    )
    text = row.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON"))
    assert Row.from_json(text) == row
    assert Row.from_json(text).case == CASE


def test_nan_survives_too() -> None:
    value = Row.from_json(Row.of(CASE, value=math.nan).to_json()).value
    assert value is not None
    assert math.isnan(value)


def test_a_line_without_a_schema_is_no_row() -> None:
    with pytest.raises(ValueError, match="no schema number"):
        Row.from_json(Row.of(CASE).to_json().replace(f'"schema": {SCHEMA}, ', "").partition(', "check"')[0] + "}")


def test_a_newer_schema_is_refused() -> None:
    newer = Row.of(CASE).to_json().replace(f'"schema": {SCHEMA}', f'"schema": {SCHEMA + 1}')
    with pytest.raises(ValueError, match="newer than this harness reads"):
        Row.from_json(newer)
    with pytest.raises(ValueError, match="must be a table"):
        Row.from_json("[]")


def test_severity_is_the_order_of_the_words() -> None:
    words = [str(verdict) for verdict in sorted(Verdict, key=lambda verdict: verdict.severity)]
    assert words == [
        "missing",
        "input changed",
        "out of bound",
        "worse",
        "unusable",
        "not comparable",
        "unrecorded",
        "better",
        "within noise",
        "same",
        "within bound",
    ]


def test_digest_does_not_depend_on_key_order() -> None:
    assert digest({"a": 1, "b": math.nan}) == digest({"b": math.nan, "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def test_a_changed_line_is_refused_whatever_changed() -> None:
    line = Row.of(CASE, value=1.25, reason="none", detail={"tokens": 3}).to_json()
    for place in range(len(line)):
        for bit in (1, 2, 16):
            changed = line[:place] + chr(ord(line[place]) ^ bit) + line[place + 1 :]
            try:
                row = Row.from_json(changed)
            except (ValueError, KeyError, TypeError):
                continue
            assert row == Row.from_json(line), changed  # the name of the digest itself


def test_a_line_of_an_older_harness_has_no_digest_and_is_read() -> None:
    data = json.loads(Row.of(CASE, value=1.25).to_json())
    assert len(data.pop("check")) == 16
    assert Row.from_json(json.dumps(data)).value == 1.25


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("detail", []),
        ("census", "x"),
        ("value", "much"),
        ("value", True),
        ("interval", [1]),
        ("interval", 3),
        ("samples", [None]),
        ("model", None),
        ("count", 1.5),
        ("seconds", None),
        ("verdict", "splendid"),
        ("verdict_baseline", 3),
        ("nll", 7),
    ],
)
def test_a_field_of_the_wrong_kind_is_refused(field: str, value: object) -> None:
    data = json.loads(Row.of(CASE, value=1.25).to_json())
    del data["check"]
    with pytest.raises(ValueError, match=field.split("_")[0] if value != "splendid" else "splendid"):
        Row.from_json(json.dumps({**data, field: value}))


def test_nesting_beyond_reason_is_no_measurement() -> None:
    with pytest.raises(ValueError, match="nested too deep"):
        Row.from_json("[" * 100_000)


def test_a_name_that_is_no_text_survives_too() -> None:
    """A file's name may hold bytes that are no UTF-8; Python carries them as lone surrogates."""
    row = Row.of(CASE._replace(model="path:/tmp/\udcff"), value=1.0)
    assert Row.from_json(row.to_json()) == row
