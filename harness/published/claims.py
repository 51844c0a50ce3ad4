"""Claims of published reports as data: one TOML file a report, read and checked without torch.

A file names its report, model and what the report leaves unsaid; each `[[claim]]` is one line of the report's tables
and holds its figures by metric, as printed. A figure that follows from the architecture carries its *convention*:
what was counted, at how many bits, in which unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal, get_args

from msgspec import field

from harness.core.errors import BadFile, MissingAsset
from harness.core.schema import Table, fit, read_toml

UNITS: Mapping[str, int | Decimal] = {  # one unit in bytes, seconds or 1
    "MiB": 2**20, "MB": 10**6, "GB": 10**9, "s": 1, "ms": Decimal("0.001"), "ppl": 1, "modules": 1, "elements": 1,
}  # fmt: skip
REMAINDERS = {"fp32": 4, "fp16": 2}  # bytes an element of what is not quantized
Masks = Literal["none", "bool a position pair and an fp32 scalar a layer"]
Rotary = Literal["none", "fp32 per layer"]
MASKS, ROTARY = get_args(Masks), get_args(Rotary)
FOLDER = Path("baselines/published")
CLONE = Path(__file__).resolve().parents[2]


class TensorGroup(Table, frozen=True):
    """Tensors that a report stores at another width: parameter names by glob, in a range of layers or in all."""

    tensors: tuple[str, ...]
    bits: float
    layers: tuple[int, int] | None = None  # inclusive


class Convention(Table, frozen=True):
    """How a report counts bytes (or modules). `same_bytes` lists other tensors that would give the same figure."""

    quantized: tuple[TensorGroup, ...] = ()
    remainder: Literal["fp32", "fp16"] = "fp32"
    scales: Literal["none", "fp32 per output channel"] = "none"
    head: Literal["shared", "copied at 8 bits"] = "shared"
    masks: Masks = "none"
    rotary: Rotary = "none"
    only: Literal["", "int8", "fp32"] = ""  # the bytes of one dtype alone
    same_bytes: tuple[tuple[str, ...], ...] = ()
    per_layer: int = 0  # modules a layer, of a class that older versions built otherwise
    more: int = 0  # modules outside the layers
    named: str = ""  # the class's name today


@dataclass(frozen=True)
class Publication:
    """One report: its model, what it read and timed, and the facts it leaves unsaid by kind of figure."""

    name: str
    model: str
    text: str
    protocol: str
    missing: Mapping[str, str]  # 'latency', 'perplexity', 'split' -> words
    timed: str = ""  # one forward pass, the generation of a text, or the whole evaluation
    timing: str = ""  # what the report says of how it timed, where that bears on its ratios


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
    tried: Literal["", "sentences", "cut texts"] = ""  # by weights, where text or protocol is not said (`settling`)
    reading: Literal["", "port"] = ""  # 'port': the source joins rows and begins windows in a way of its own
    slack: str = ""  # how far a measured figure may lie off, in the unit; "" is the printed precision
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


class Line(Table, frozen=True):
    """One line of a report's tables; what it says of all its figures holds for each that does not say otherwise."""

    part: str
    method: str
    specification: str = ""
    reference: str = ""
    remark: str = ""  # of its memory
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


def read_file(path: Path) -> tuple[Claim, ...]:
    """The claims of one file."""
    file = read_toml(path, File)
    if file.report != path.stem:
        raise BadFile(f"{path} says report = {file.report!r}: write report = '{path.stem}'")
    report = Publication(file.report, file.model, file.text, file.protocol, file.missing, file.timed, file.timing)
    claims = []
    for line in file.claim:
        shared = {"specification": line.specification, "reference": line.reference}
        for metric, figure in line.figures.items():
            beside = {name: str(other.get("published")) for name, other in line.figures.items() if name != metric}
            place = {"report": report, "part": line.part, "method": line.method, "metric": metric, "beside": beside}
            whole = {**shared, "remark": line.remark if metric == "memory" else "", **figure, **place}
            claims.append(fit(whole, Claim, f"{path}: {line.part}, {line.method}, {metric}"))
    return tuple(claims)
