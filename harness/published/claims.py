"""Claims of published reports as data: one TOML file a report, read and checked without torch.

A file names its report, model and what the report leaves unsaid; each `[[claim]]` is one line of the report's tables
and holds its figures by metric, as printed. A figure that follows from the architecture carries its *convention*:
what was counted, at how many bits, in which unit.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from harness.core.errors import BadFile, MissingAsset

SCHEMA = 1
UNITS: Mapping[str, int | Decimal] = {  # one unit in bytes, seconds or 1
    "MiB": 2**20, "MB": 10**6, "GB": 10**9, "s": 1, "ms": Decimal("0.001"), "ppl": 1, "modules": 1, "elements": 1,
}  # fmt: skip
REMAINDERS = {"fp32": 4, "fp16": 2}  # bytes an element of what is not quantized
SCALES = ("none", "fp32 per output channel")
HEADS = ("shared", "copied at 8 bits")
MASKS = ("none", "bool a position pair and an fp32 scalar a layer")
ROTARY = ("none", "fp32 per layer")
ONLY = ("", "int8", "fp32")
READINGS = ("", "port")
TRIED = ("", "sentences", "cut texts")
TIMED = ("", "forward", "generate", "evaluation")
FOLDER = Path("baselines/published")
CLONE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Group:
    """Tensors that a report stores at another width: parameter names by glob, in a range of layers or in all."""

    tensors: tuple[str, ...]
    bits: float
    layers: tuple[int, int] | None = None  # inclusive


@dataclass(frozen=True)
class Convention:
    """How a report counts bytes (or modules). `same_bytes` lists other tensors that would give the same figure."""

    quantized: tuple[Group, ...] = ()
    remainder: str = "fp32"
    scales: str = "none"
    head: str = "shared"
    masks: str = "none"
    rotary: str = "none"
    only: str = ""  # the bytes of one dtype alone
    same_bytes: tuple[tuple[str, ...], ...] = ()
    per_layer: int = 0  # modules a layer, of a class that older versions built otherwise
    more: int = 0  # modules outside the layers
    named: str = ""  # the class's name today

    def __post_init__(self) -> None:
        for name, known in (
            ("remainder", REMAINDERS), ("scales", SCALES), ("head", HEADS), ("masks", MASKS), ("rotary", ROTARY),
            ("only", ONLY),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is one of {', '.join(map(repr, known))}, not '{getattr(self, name)}'")


@dataclass(frozen=True)
class Report:
    """One report: its model, what it read and timed, and the facts it leaves unsaid by kind of figure."""

    name: str
    model: str
    text: str
    protocol: str
    missing: Mapping[str, str]  # 'latency', 'perplexity', 'split' -> words
    timed: str = ""  # one forward pass, the generation of a text, or the whole evaluation
    timing: str = ""  # what the report says of how it timed, where that bears on its ratios


@dataclass(frozen=True)
class Claim:
    """One figure of one line of a report.

    Attributes:
        published: as printed; `digits` counts its decimals.
        specification: the method of ours that stores the same weights, "" where there is none.
        beside: the other figures of the same line, by metric.
        fault: the control of docs/studies/pitfalls.md that yields this symptom.
        passes: how many forward passes the report divides a time by.
        dataset, text_protocol: what settles a perplexity once the weights are there.
        tried: what weights can still tell where text or protocol is not said (`tries`).
        reading: 'port' where the source joins rows and begins windows in a way of its own (`settling`).
        slack: how far a measured figure may lie off, in the unit; "" is the printed precision.
        verdict: the reviewed word, which the pytest case holds the computed one to.
    """

    report: Report
    part: str
    method: str
    specification: str
    metric: str
    published: str
    unit: str
    convention: Convention | None = None
    reference: str = ""
    fault: str = ""
    remark: str = ""
    passes: int = 1
    dataset: str = ""
    text_protocol: str = ""
    tried: str = ""
    reading: str = ""
    slack: str = ""
    verdict: str = ""
    beside: Mapping[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Unique over all claims: 'report/part/method/metric', blanks as underscores."""
        return "/".join((self.report.name, self.part, self.method, self.metric)).replace(" ", "_").replace(",", "")

    @property
    def value(self) -> Decimal:
        """The printed number."""
        return Decimal(self.published)

    @property
    def digits(self) -> int:
        """Decimals printed."""
        exponent = self.value.as_tuple().exponent
        return -exponent if isinstance(exponent, int) and exponent < 0 else 0

    @property
    def in_base_units(self) -> Decimal:
        """The printed number in bytes, seconds or 1."""
        return self.value * UNITS[self.unit]

    def printed(self, base: int | Decimal) -> Decimal:
        """A number in bytes, seconds or 1, as this claim would print it: in its unit, with its decimals."""
        return (Decimal(base) / UNITS[self.unit]).quantize(Decimal(1).scaleb(-self.digits))


def default_folder(here: Path) -> Path:
    """`baselines/published` under a folder, else that of the clone which this package is imported from."""
    return next((path for path in (here / FOLDER, CLONE / FOLDER) if path.is_dir()), here / FOLDER)


def read(folder: Path) -> tuple[Claim, ...]:
    """Every claim under a folder, by file name and then in the file's order.

    Raises:
        MissingAsset: no such files.
        BadFile: a file that does not read as claims; names file, claim and fix.
    """
    files = sorted(folder.glob("*.toml"))
    if not files:
        raise MissingAsset(f"no claims under {folder}: run in a clone of the harness, or name the folder with --claims")
    claims = tuple(claim for path in files for claim in read_file(path))
    ids = [claim.id for claim in claims]
    for name in ids:
        if ids.count(name) > 1:
            raise BadFile(f"{folder} holds the claim {name} twice: rename one of the methods")
    return claims


def read_file(path: Path) -> tuple[Claim, ...]:
    """The claims of one file."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadFile(f"{path} is no TOML: {error}") from error
    if data.get("schema") != SCHEMA:
        raise BadFile(f"{path} has schema {data.get('schema')!r}, this harness reads {SCHEMA}: upgrade it or the file")
    if data.get("report") != path.stem:
        raise BadFile(f"{path} says report = {data.get('report')!r}: write report = '{path.stem}'")
    known = {"schema", "report", "model", "text", "protocol", "missing", "claim", "timed", "timing"}
    try:
        _only(data, known)
        said = (data.get("missing", {}), _timed(data), data.get("timing", ""))
        report = Report(path.stem, data["model"], data["text"], data["protocol"], *said)
        return tuple(claim for line in data.get("claim", []) for claim in _line(report, line))
    except (KeyError, TypeError, ValueError, AttributeError, InvalidOperation) as error:
        raise BadFile(f"{path}: {_told(error)}") from error


def _timed(data: Mapping[str, Any]) -> str:
    timed = data.get("timed", "")
    if timed not in TIMED:
        raise ValueError(f"timed is one of {', '.join(map(repr, TIMED))}, not '{timed}'")
    return str(timed)


def _told(error: Exception) -> str:
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error) or repr(error)


def _line(report: Report, line: Mapping[str, Any]) -> list[Claim]:
    _only(line, {"part", "method", "specification", "reference", "remark", "figures"})
    figures = line.get("figures", {})
    claims = []
    for metric, figure in figures.items():
        where = f"{line['part']}, {line['method']}, {metric}"
        _only(figure, {item.name for item in fields(Claim)} - {"report", "part", "method", "metric", "beside"})
        if not isinstance(figure["published"], str):
            raise ValueError(f"{where}: published is text, so that its digits stay: write published = '...'")
        if figure["unit"] not in UNITS:
            raise ValueError(f"{where}: unit is one of {', '.join(UNITS)}, not '{figure['unit']}'")
        for name, words in (("reading", READINGS), ("tried", TRIED)):
            if figure.get(name, "") not in words:
                raise ValueError(f"{where}: {name} is one of {', '.join(map(repr, words))}, not '{figure[name]}'")
        Decimal(figure["published"])
        given = {"specification": line.get("specification", ""), "reference": line.get("reference", ""), **figure}
        given["convention"] = _convention(figure["convention"]) if "convention" in figure else None
        given["remark"] = figure.get("remark", line.get("remark", "") if metric == "memory" else "")
        beside = {name: other["published"] for name, other in figures.items() if name != metric}
        claims.append(Claim(report, line["part"], line["method"], metric=metric, beside=beside, **given))
    return claims


def _convention(data: Mapping[str, Any]) -> Convention:
    _only(data, {item.name for item in fields(Convention)})
    groups = []
    for group in data.get("quantized", []):
        _only(group, {"tensors", "bits", "layers"})
        layers = tuple(group["layers"]) if "layers" in group else None
        groups.append(Group(tuple(group["tensors"]), float(group["bits"]), layers))
    same = tuple(tuple(names) for names in data.get("same_bytes", []))
    return Convention(**{**data, "quantized": tuple(groups), "same_bytes": same})


def _only(data: Mapping[str, Any], known: set[str]) -> None:
    for name in data:
        if name not in known:
            raise ValueError(f"unknown key '{name}' (known: {', '.join(sorted(known))})")
