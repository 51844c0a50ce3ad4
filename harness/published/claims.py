"""Claims of published reports as data: one TOML file a report, read and checked without torch.

A file names its report, model, what its program did and what nobody says; each `[[claim]]` is one line of the report's
tables and holds its figures by metric, as printed. A figure that follows from the architecture carries its
*convention*: what was counted, at how many bits, in which unit. A perplexity has its *rule* and a time its *timing*
(`origins`). docs/claims.md shows a file in full.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal, get_args

from msgspec import field
from msgspec.structs import replace

from harness.core.errors import BadFile, MissingAsset, UnknownName
from harness.core.options import Declared
from harness.core.schema import Table, fit, read_toml
from harness.published.origins import Clocking, Origin, OwnCodes, Scoring, Source

UNITS: Mapping[str, int | Decimal] = {  # one unit in bytes, seconds or 1
    "MiB": 2**20, "MB": 10**6, "GiB": 2**30, "GB": 10**9,
    "s": 1, "ms": Decimal("0.001"), "ppl": 1, "modules": 1, "elements": 1,
}  # fmt: skip
REMAINDERS = {"fp32": 4, "fp16": 2, "bf16": 2}  # bytes an element of what is not quantized
Masks = Literal["none", "bool a position pair and an fp32 scalar a layer"]
Rotary = Literal["none", "fp32 per layer", "fp32 per layer and one more"]
Head = Literal["shared", "copied at 8 bits", "copied at 32 bits"]
Scales = Literal["none", "fp32 per output channel", "fp32 per output channel, one a vector", "fp32 per 64 and a table"]
Only = Literal["", "int8", "fp32", "saved"]
NOTHING_KNOWN = Origin()
MASKS, ROTARY = get_args(Masks), get_args(Rotary)
SHIPPED = Path(__file__).parent / "reports"  # in the package, so that they are there when it is installed
FOLDER = Path("published")  # of a project, beside its baselines
ANCHORS = "public-anchors"  # right figures of unquantized models


class TensorGroup(Table, frozen=True):
    """Tensors that a report stores at another width: parameter names by glob, in a range of layers or in all."""

    tensors: tuple[str, ...]
    bits: float
    layers: tuple[int, int] | None = None  # inclusive


class Convention(Table, frozen=True):
    """How a report counts bytes (or modules). `same_bytes` lists other tensors that would give the same figure."""

    quantized: tuple[TensorGroup, ...] = ()
    remainder: Literal["fp32", "fp16", "bf16"] = "fp32"
    scales: Scales = "none"
    head: Head = "shared"
    masks: Masks = "none"
    rotary: Rotary = "none"
    whole_tensors: bool = False  # at 1 and 4 bytes, nobody says which: every choice is tried
    only: Only = ""  # the bytes of one dtype alone, or what fp32 takes beyond them
    allocated: bool = False  # in the blocks that a card's allocator hands out
    holds: tuple[int, int] | None = None  # of a spread model: these layers and the embedding alone, both inclusive
    same_bytes: tuple[tuple[str, ...], ...] = ()
    per_layer: int = 0  # modules a layer, of a class that older versions built otherwise
    more: int = 0  # modules outside the layers
    named: str = ""  # the class's name today


@dataclass(frozen=True)
class Publication:
    """One report: its model, what it read and timed, and the facts that nobody says by kind of figure."""

    name: str
    model: str
    text: str
    protocol: str
    missing: Mapping[str, str]  # 'latency', 'perplexity' -> words
    timed: str = ""  # one forward pass, the generation of a text, or the whole evaluation
    timing: str = ""  # what the report says of how it timed, where that bears on its ratios
    title: str = ""  # what it measured: model, text, year
    provenance: Origin = NOTHING_KNOWN
    architecture: str = ""  # the model's configuration as JSON, "" for a known name
    told: str = ""  # what was claimed, computed and is right, for a reader

    @property
    def heading(self) -> str:
        """Its title, and the name behind it."""
        return f"{self.title} ({self.name})" if self.title else f"{self.name}: {self.model}"


class Claim(Table, frozen=True):
    """One figure of one line of a report."""

    report: Publication
    part: str
    method: str
    specification: str  # the method of ours that stores the same weights, "" where there is none
    metric: str
    published: str  # as printed; `digits` counts its decimals
    unit: str
    convention: Convention | None = None
    reference: str = ""
    fault: str = ""  # the control of docs/studies/pitfalls.md that yields this symptom
    remark: str = ""
    passes: int = 1  # how many forward passes the report divides a time by
    dataset: str = ""  # with `text_protocol`, what settles a perplexity once the weights are there
    text_protocol: str = ""
    reading: Literal["", "port"] = ""  # 'port': the source joins rows and begins windows in a way of its own
    slack: str = ""  # how far a measured figure may lie off, in the unit; "" is the printed precision
    rule: Scoring | None = None  # of a perplexity
    codes: OwnCodes | None = None  # weights that no method of ours makes
    timing: Clocking | None = None  # of a time
    seconds: str = ""  # what one `Clocking.each` took by other outputs of the same run
    full: str = ""  # all digits that the program printed, where a table rounds them
    source: Source = "report"  # of the convention
    verdict: str = ""  # the reviewed word, which the pytest case holds the computed one to
    beside: Mapping[str, str] = field(default_factory=dict)  # the other figures of the same line, by metric

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"unit is one of {', '.join(UNITS)}, not '{self.unit}'")
        try:
            Decimal(self.published)
        except InvalidOperation as error:
            raise ValueError(f"published must be a number in quotes, not '{self.published}'") from error

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


def places(declared: Declared, baselines: Path | None = None) -> tuple[Path, ...]:
    """Where claims lie: what [tool.harness] claims names, else `published` beside a project's baselines, else ours."""
    if declared.claims:
        return tuple(declared.root / Path(name).expanduser() for name in declared.claims)
    own = (baselines or declared.root / "baselines") / FOLDER
    return (own,) if own.is_dir() else (SHIPPED,)


def read(*files: Path) -> tuple[Claim, ...]:
    """Every claim of files, or of the TOML files of folders, by file name and then in the file's order.

    Raises:
        MissingAsset: no such files.
        BadFile: a file that does not read as claims; names file, claim and fix.
    """
    claims: list[Claim] = []
    for place in files:
        found = sorted(place.glob("*.toml")) if place.is_dir() else [place]
        if not found or not found[0].is_file():
            raise MissingAsset(f"no claims in {place}: name a .toml file of claims, or a folder of them, with --claims")
        claims += (claim for path in found for claim in read_file(path))
    ids = [claim.id for claim in claims]
    for name in ids:
        if ids.count(name) > 1:
            where = ", ".join(map(str, files))
            raise BadFile(f"{where} holds the claim {name} twice: rename one of the methods")
    return tuple(claims)


class Line(Table, frozen=True):
    """One line of a report's tables; what it says of all its figures holds for each that does not say otherwise."""

    part: str
    method: str
    specification: str = ""
    reference: str = ""
    remark: str = ""  # of its memory
    rule: str = ""  # name of one of the file's rules; "" is the first
    timing: str = ""  # the same of its timings
    codes: OwnCodes | None = None  # of its perplexity
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)


class File(Table, frozen=True):
    """A report's file."""

    schema: int
    report: str
    model: str
    text: str
    protocol: str
    missing: dict[str, str] = field(default_factory=dict)
    claim: tuple[Line, ...] = ()
    timed: Literal["", "forward", "generate", "evaluation"] = ""
    timing: str = ""
    title: str = ""
    told: str = ""
    provenance: Origin = Origin()
    rules: dict[str, Scoring] = field(default_factory=dict)
    timings: dict[str, Clocking] = field(default_factory=dict)
    architecture: dict[str, Any] = field(default_factory=dict)


def read_file(path: Path) -> tuple[Claim, ...]:
    """The claims of one file."""
    file = read_toml(path, File)
    if file.report != path.stem:
        raise BadFile(f"{path} says report = {file.report!r}: write report = '{path.stem}'")
    shape = json.dumps(file.architecture, sort_keys=True) if file.architecture else ""
    report = Publication(
        file.report, file.model, file.text, file.protocol, file.missing, file.timed, file.timing,
        file.title, file.provenance, shape, file.told,
    )  # fmt: skip
    claims = []
    for line in file.claim:
        where = f"{path}: {line.part}, {line.method}"
        known: dict[str, Any] = {
            "rule": _named(file.rules, line.rule, f"{where}: rule"),
            "timing": _named(file.timings, line.timing, f"{where}: timing"),
            "codes": line.codes,
        }
        shared = {"specification": line.specification, "reference": line.reference}
        for metric, figure in line.figures.items():
            beside = {name: str(other.get("published")) for name, other in line.figures.items() if name != metric}
            place = {"report": report, "part": line.part, "method": line.method, "metric": metric, "beside": beside}
            kinds: tuple[str, ...] = {"perplexity": ("rule", "codes")}.get(metric.partition("_")[0], ())
            kinds = ("timing",) if figure.get("unit") in ("s", "ms") else kinds
            whole = {**shared, "remark": line.remark if metric == "memory" else "", **figure, **place}
            claim = fit(whole, Claim, f"{where}, {metric}")
            claims.append(replace(claim, **{kind: known[kind] for kind in kinds if getattr(claim, kind) is None}))
    return tuple(claims)


def _named(tables: Mapping[str, Any], name: str, where: str) -> Any:
    """The table of that name, the first where none is named, None where there is none."""
    if name and name not in tables:
        raise BadFile(f"{where}: {UnknownName('table', name, tables)}")
    return tables[name] if name else next(iter(tables.values()), None)
