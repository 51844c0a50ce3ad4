"""No table contradicts the rows: every number of a made session's report and front, held to measurements.jsonl.

The rows are read here as JSON, and what a column shows is written down once more, so that a table cannot agree with
itself alone. A header that is not known fails.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from harness.__main__ import main
from harness.core.records import Case, Row, Verdict
from harness.report import read_report, rewrite
from harness.report.export import export
from harness.report.page import page
from tests.report.test_report import markdown

MADE = Path(__file__).parent / "data" / "made-session"
LINES: list[dict[str, Any]] = [json.loads(line) for line in (MADE / "measurements.jsonl").read_text().splitlines()]
REFERENCE, MIB = "fp32", 2.0**20
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
NO_RECORD = ("not comparable", "unrecorded")
KIND_OF = {"perplexity": "quality", "memory": "memory", "latency": "speed"}


def rows_of(method: str, metric: str = "") -> list[dict[str, Any]]:
    return [line for line in LINES if line["method"] == method and line["metric"].startswith(metric)]


def row_of(method: str, metric: str) -> dict[str, Any]:
    """The last one written stands; {} where there is none."""
    return next((line for line in reversed(LINES) if (line["method"], line["metric"]) == (method, metric)), {})


def log_ratios(row: Mapping[str, Any]) -> list[float]:
    return [math.exp(row["detail"][f"log_ratio{end}"]) for end in ("", "_low", "_high")]


def seconds(name: str) -> Callable[[str, str], list[float]]:
    return lambda method, metric: [1000 * row_of(method, metric)["detail"][name]]


def quality(method: str, metric: str) -> list[float]:
    if method == REFERENCE:
        return [1.0]
    row = row_of(method, "perplexity.delta")
    return [math.exp(value) for value in (row["value"], *row["interval"])]


def pace(method: str, metric: str) -> list[float]:
    row = row_of(method, metric)
    return [1.0, 1000 * row["value"]] if method == REFERENCE else log_ratios(row)


def alone(kind: str) -> Callable[[str, str], list[float]]:
    """How many of a line's cases had no record, where a verdict names some of them in brackets."""

    def count(method: str, metric: str) -> list[float]:
        own = [row for row in rows_of(method) if KIND_OF[row["metric"].partition(".")[0]] == kind]
        words = [row[name] for row in own for name in ("verdict_reference", "verdict_baseline") if row[name]]
        without = sum(word in NO_RECORD for word in words)
        return [float(without)] if 0 < without < len(words) else []

    return count


def change(method: str, metric: str) -> list[float]:
    found = row_of(method, metric)["detail"].get("change")
    return [100 * math.expm1(found[name]) for name in ("value", "low", "high")] if found else []


def told(method: str, name: str) -> Any:
    return next(row["census"] for row in rows_of(method) if row["census"])[name]


Expected = Callable[[str, str], Sequence[float]]  # of a method and the table's metric
COLUMNS: dict[str, Expected] = {
    "perplexity": lambda method, _: [row_of(method, "perplexity")["value"]],
    "bits/weight": lambda method, _: [
        next(row["bits_per_weight"] for row in rows_of(method) if row["bits_per_weight"])
    ],
    "storage / reference": lambda method, _: [
        row_of(method, "memory.storage")["value"] / row_of(REFERENCE, "memory.storage")["value"]
    ],
    "p50 ms": lambda method, metric: [1000 * row_of(method, metric)["value"]],
    "p50 ms of the reference beside it": seconds("reference_p50"),
    "p90 ms": seconds("p90"),
    "p99 ms": seconds("p99"),
    "IQR ms": lambda method, metric: [1000 * row_of(method, metric)["spread"]],
    "runs": lambda method, metric: [row_of(method, metric)["count"]],
    "modules quantized": lambda method, _: [told(method, "quantized_modules")],
    "weights quantized": lambda method, _: [told(method, "quantized_elements")],
    "parameters left": lambda method, _: [told(method, "left_elements")],
    "of what its scope names": lambda method, _: [100 * told(method, "matrices")["share"]],
    "MiB by dtype": lambda method, _: [size / MIB for size in told(method, "bytes_by_dtype").values()],
    "quality": alone("quality"),
    "memory": alone("memory"),
    "speed": alone("speed"),
    "verdict": lambda method, metric: [],
    "change [95%]": change,
    "smallest effect": lambda method, metric: [
        float(number) for number in NUMBER.findall(str(row_of(method, metric)["detail"].get("smallest", "")))
    ],
    "Δ ln PPL, nat [95%]": lambda method, _: (
        [0.0]
        if method == REFERENCE
        else [row_of(method, "perplexity.delta")["value"], *row_of(method, "perplexity.delta")["interval"]]
    ),
    **{
        name: lambda method, metric: []
        for name in ("model", "against the reference", "against the record", "looked up in", "rank", "standing")
    },
}


def expected(header: str, method: str, metric: str) -> Sequence[float]:
    if found := re.fullmatch(r"(\w+) / reference \[95%\]", header):
        return pace(method, f"latency.{found[1]}")
    if header == "ratio to reference [95%]":
        return log_ratios(row_of(method, metric)) if metric else quality(method, metric)
    if (found := re.fullmatch(r"([\w ]+) MiB", header)) and header not in COLUMNS:
        return [row_of(method, f"memory.{found[1].replace(' ', '_')}")["value"] / MIB]
    return COLUMNS[header](method, metric)


def tables(text: str) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Every table with the metric named on the line above it ('' where none is), its headers and its lines."""
    blocks = text.split("\n\n")
    for before, block in zip(["", *blocks], blocks, strict=False):
        if block.startswith("|"):
            cells = [
                [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
                for line in block.splitlines()
                if not line.startswith("|:") and not line.startswith("|-")
            ]
            named = re.fullmatch(r"### .*: `(latency\.\w+)`.*", before)
            yield named[1] if named else "", cells[0], cells[1:]


def agrees(shown: str, value: float) -> bool:
    """Whether a number is the value, rounded where its digits end."""
    mantissa, _, exponent = shown.replace(",", "").partition("e")
    digits = len(mantissa.partition(".")[2]) - int(exponent or 0)
    return abs(float(shown.replace(",", "")) - value) <= 0.5000001 * 10.0**-digits


def held(text: str) -> int:
    """How many numbers of the tables were held to their rows."""
    count = 0
    for metric, headers, lines in tables(text):
        for line in lines:
            cells = dict(zip(headers, line, strict=True))
            method = cells["method"].split("`")[1]
            about = cells["metric"].split("`")[1] if "metric" in cells else metric
            for header, cell in cells.items():
                if header in ("method", "metric") or cell in ("–", "missing"):
                    continue
                bare = re.sub(r"`[^`]*`|float\d+|uint\d+", "", cell)
                numbers = NUMBER.findall(bare) if header not in ("rank", "standing") else []
                values = expected(header, method, about)
                assert len(numbers) == len(values), (header, method, cell, values)
                for number, value in zip(numbers, values, strict=True):
                    assert agrees(number, value), (header, method, cell, value)
                    count += 1
    return count


@pytest.fixture
def made(tmp_path: Path) -> Path:
    for path in MADE.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_every_number_of_every_table_is_its_rows(made: Path) -> None:
    assert held(rewrite(made).read_text()) > 100


def test_a_front_shows_the_paired_ratio_of_times(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["frontier", str(made), "-o", str(made)]) == 0
    text = capsys.readouterr().out
    assert held(text) > 20
    assert "| decode / reference [95%] |" in re.sub(" +", " ", text)


def test_a_wrong_number_is_seen(made: Path) -> None:
    text = rewrite(made).read_text()
    (shown,) = re.findall(r"\| `absmax-int8` +\| +18\.454 \|.*", text)
    for old, new in (("18.454", "18.455"), ("1.0012", "1.0013"), ("210.40", "210.41"), ("0.7097", "0.7197")):
        assert old in shown
        with pytest.raises(AssertionError):
            held(text.replace(shown, shown.replace(old, new)))


LATEX_COLUMNS: dict[str, Expected] = {
    "perplexity": COLUMNS["perplexity"],
    "ratio": quality,
    "bits/weight": COLUMNS["bits/weight"],
    "storage, MiB": lambda method, _: [row_of(method, "memory.storage")["value"] / MIB],
    "prefill time": lambda method, _: pace(method, "latency.prefill"),
    "decode time": lambda method, _: pace(method, "latency.decode"),
}


def test_every_number_of_the_latex_is_its_rows() -> None:
    text = export(MADE, "latex", None)
    head, *body = [line.removesuffix(r" \\").split(" & ") for line in text.splitlines() if line.endswith(r" \\")]
    assert head[1:] == list(LATEX_COLUMNS)
    count = 0
    for line in body:
        for header, cell in zip(head[1:], line[1:], strict=True):
            if cell in ("--", "missing"):
                continue
            numbers, values = NUMBER.findall(cell), LATEX_COLUMNS[header](line[0], "")
            assert len(numbers) == len(values), (header, line[0], cell, values)
            assert all(map(agrees, numbers, values)), (header, line[0], cell, values)
            count += len(numbers)
    assert count > 30


# the data of the HTML: what is known of each case

FIGURES: dict[str, Callable[[dict[str, Any]], Sequence[float]]] = {
    "median (of its own moment: compare the ratio)": lambda row: [1000 * row["value"]],
    "the reference's median, timed in turn with it": lambda row: [1000 * row["detail"]["reference_p50"]],
    "95% interval": lambda row: row["interval"],
    "observations": lambda row: [row["count"]],
    "bits per weight": lambda row: [row["bits_per_weight"]],
    "seconds to measure": lambda row: [row["seconds"]],
}


def measured(row: Mapping[str, Any], value: float) -> list[float]:
    """As a figure with its unit is written: bytes as bytes and MiB, seconds as milliseconds."""
    return [value, value / MIB] if row["unit"] == "B" else [1000 * value if row["unit"] == "s" else value]


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value


def near(shown: str, value: float) -> bool:
    """Whether a number of so many significant digits is the value."""
    return math.isclose(float(shown.replace(",", "")), value, rel_tol=6e-3, abs_tol=1e-12) and (
        agrees(shown, value) or "e" in shown or "." not in shown
    )


def test_every_number_of_the_pages_data_is_its_rows() -> None:
    text = page(read_report(MADE))
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    count = 0
    for case, planned in zip(data["cases"], json.loads((MADE / "plan.json").read_text()), strict=True):
        row = row_of(planned["method"], planned["metric"])
        if not row or row["value"] is None:
            assert case["figure"] == "missing"
            continue
        shown = NUMBER.findall(case["figure"])
        ends = row["interval"] or []
        values: Sequence[float] = (
            log_ratios(row) if "log_ratio" in row["detail"] else measured(row, row["value"]) + ends
        )
        assert len(shown) in (len(values), 1), (case["figure"], values)  # of a time without a usable interval the ratio
        assert all(map(near, shown, values)), (case["figure"], values)
        groups = {head: dict(pairs) for head, pairs in (data["groups"][place] for place in case["groups"])}
        for name, words in groups["Figure"].items():
            numbers = NUMBER.findall(words)
            if name in ("value", "spread"):
                values = measured(row, row[name])
            else:
                values = FIGURES[name](row)
            assert len(numbers) == len(values), (name, words, values)
            assert all(map(near, numbers, values)), (name, words, values)
            count += len(numbers)
        told = dict(flat(row["detail"]))
        for name, words in groups.get("As measured", {}).items():
            value = row["samples"] if name == "samples" else told[name]
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                assert near(words, value), (name, words, value)
                count += 1
    assert count > 150


def test_the_ends_at_a_glance_are_the_largest_and_the_smallest() -> None:
    text = page(read_report(MADE))
    ends = re.findall(r"<dt>([^<]*)</dt><dd><a [^>]*>([^<]*)</a>.*?<b>× ([^<]*)</b></dd>", text)
    methods = [line["method"] for line in LINES if line["method"] != REFERENCE]
    decode = {name: row_of(name, "latency.decode") for name in methods}
    deltas = {name: row_of(name, "perplexity.delta").get("value") for name in methods}
    bytes_of = {name: row_of(name, "memory.storage").get("value") for name in methods}
    share = row_of(REFERENCE, "memory.storage")["value"]
    paces = {name: log_ratios(row)[0] for name, row in decode.items() if "log_ratio" in row.get("detail", {})}
    losses = {name: math.exp(value) for name, value in deltas.items() if value is not None}
    sizes = {name: value / share for name, value in bytes_of.items() if value is not None}
    known = {"loss": losses, "slowest decode": paces, "fastest decode": paces, "largest": sizes, "smallest": sizes}
    assert len(ends) == 6
    for what, method, figure in ends:
        values = known.get(what) or losses
        most = what.startswith(("largest", "slowest"))
        assert method == (max if most else min)(values, key=lambda name: values[name]), what
        assert agrees(NUMBER.findall(figure)[0], values[method])


def six() -> list[Row]:
    """Reference and one method: perplexity, its ratio, storage, decode."""
    text = {"protocol_id": "text: lee; tokens: the first 4096", "token_hash": "a" * 64, "environment": "e"}
    logs = {"log_ratio": 0.1, "log_ratio_low": 0.05, "log_ratio_high": 0.15, "prompt_tokens": 128, "new_tokens": 1}
    census = {"quantized_modules": 8, "quantized_elements": 1000, "left_elements": 10, "bytes_by_dtype": {"uint8": 512}}
    figures: list[tuple[str, str, float, dict[str, Any]]] = [
        ("fp32", "perplexity", 20.0, text),
        ("fp32", "memory.storage", 4e6, {"environment": "e", "revision": "b" * 64}),
        ("nf4", "perplexity", 22.0, text),
        ("nf4", "perplexity.delta", 0.1, {**text, "interval": (0.09, 0.11)}),
        ("nf4", "memory.storage", 1e6, {"environment": "e", "bits_per_weight": 4.5, "census": census}),
        ("nf4", "latency.decode", 0.01, {"environment": "e", "detail": logs | {"threads": 2, "wait_policy": ""}}),
    ]
    rows = []
    for method, metric, value, more in figures:
        of_text = ("lee", "chunk:512") if metric.startswith("perplexity") else ("", "")
        case = Case("m", method, *of_text, metric, "cpu")
        rows.append(Row.of(case, value=value, verdict=Verdict.SAME, verdict_baseline=Verdict.SAME, count=16, **more))
    return rows


def test_a_report_of_six_cases_fits_on_two_screens() -> None:
    rows, world = six(), {"e": {"device": "cpu", "python": "3.11.9", "torch": "2.13.0", "threads": 2}}
    text = markdown(rows, [row.case for row in rows], world, command="pytest")
    lines = text.splitlines()
    assert len(lines) <= 80
    first = next(place for place, line in enumerate(lines) if line.startswith("| method"))
    assert first <= 12  # the table comes first
    assert "128 tokens, 1 token behind it, batch 1; 16 blocks" in text
    assert "2 threads, which wait as a plain script's do (OMP_WAIT_POLICY is not set)" in text
    assert text.index("## Environment and protocol") < text.index("<details>")
