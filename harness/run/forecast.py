"""What a session would take, told before it begins: time, downloads, memory, and what does not fit here.

Time and downloads need no torch: costs rest on names and on the report of an earlier session, and of a model on the Hub
that is not in the cache the Hub is asked. Memory follows from configurations, which transformers reads (`prediction`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tabulate import tabulate

from harness.core import gpus
from harness.core.catalog import member_of
from harness.core.errors import HarnessError
from harness.core.options import Options
from harness.core.records import Case
from harness.core.specification import parse, parse_method
from harness.core.text import MIB, NOTHING, plural, visible
from harness.inputs import hub
from harness.inputs.models import names
from harness.inputs.texts import corpora
from harness.judge.baselines import token_limit
from harness.metrics.measuring.checks import LAYER
from harness.results.directory import latest, read_report
from harness.run.plan import models_of
from harness.run.shards import SHARED_FAMILIES, costs

TOKENS, REPETITIONS = 4096, 10  # of the cases that `shards.SECONDS` tells of
BYTES_A_TOKEN = 4  # of English text: enough for a prediction
HUB_TOKENS = 290_000  # of a text that is not at hand: wikitext-2's test split by most tokenizers
GROUP_SECONDS = 1.5  # for a group's process to start, whatever its model's size
SESSION_SECONDS = 6.0  # for the session's own process and for what it prepares
PROCESS_BYTES = 1 << 30  # of a group's process beside its models: torch by itself 0.5 GB, and a window's activations
AVAILABLE, LIMIT = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")  # of this machine, of a container
LISTED = 6  # models or metrics that are named
FREE = {"cpu": "free here", "cuda": "on the card"}
PEAK = "peak: what a process holds at most, by prediction; with the reference beside the model where times ask for it"
GIB = 2**30


@dataclass(frozen=True)
class Forecast:
    """Predicted seconds of each case by its id, and in words what they rest on."""

    seconds: Mapping[str, float]
    basis: str

    @property
    def total(self) -> float:
        """Seconds of the whole session."""
        cases = sum(self.seconds.values())
        return SESSION_SECONDS + cases if cases else 0.0


@dataclass(frozen=True)
class Fetch:
    """What would come from the Hub: bytes, None where nobody says how many; or why it cannot be had."""

    what: str
    bytes: int | None
    trouble: str = ""

    def __str__(self) -> str:
        if self.trouble:
            return self.trouble
        return f"{self.what}: {NOTHING if self.bytes is None else size(self.bytes)}"


@dataclass(frozen=True)
class Need:
    """What a model under a method asks of a machine: bytes it keeps, and holds at most; None where unknown."""

    model: str
    method: str
    device: str
    cases: int
    seconds: float
    storage: int | None = None
    peak: int | None = None
    trouble: str = ""  # why they are unknown

    def fits(self, room: int) -> bool:
        """Whether so many bytes (0: nobody knows how many there are) hold it; the unknown is in nobody's way."""
        return not room or self.peak is None or self.peak <= room


def duration(seconds: float) -> str:
    """'8 s', '12 min', '2 h 5 min'."""
    if seconds < 60:
        return f"{max(0, round(seconds))} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def size(count: float) -> str:
    """Bytes for a reader: '513 MiB', '4.7 GiB'."""
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / MIB:,.0f} MiB"


def forecast(cases: Sequence[Case], options: Options) -> Forecast:
    """Seconds of each case: by the report that lies in the report directory where it holds such cases."""
    lengths = {dataset: tokens(dataset, options) for dataset in {case.dataset for case in cases} - {""}}

    def weigh(case: Case) -> float:
        if case.family in SHARED_FAMILIES and case.dataset:
            return lengths[case.dataset] / TOKENS
        return options.repetitions / REPETITIONS if member_of(case).timed else 1.0

    seconds = dict(zip((case.id for case in cases), costs(cases, weigh), strict=True))
    for first in {case.group: case.id for case in reversed(cases)}.values():
        seconds[first] += GROUP_SECONDS
    basis = "from two cores with AVX2"
    if any(case.device == "cuda" for case in cases):
        basis += "; a card is quicker"
    if known := measured(cases, options):
        scale = sum(known.values()) / sum(seconds[name] for name in known)
        seconds = {name: known.get(name, scale * value) for name, value in seconds.items()}
        basis = f"from the report in {options.report_dir}"
        if options.resume:
            seconds |= dict.fromkeys(known, 0.0)
            basis += f", of which {plural(len(known), 'case')} stay where nothing has changed"
    return Forecast(seconds, basis)


def measured(cases: Iterable[Case], options: Options) -> dict[str, float]:
    """Seconds of those cases that the report directory holds, of as many tokens, by their ids."""
    try:
        rows = latest(read_report(options.report_dir).rows)
    except (HarnessError, OSError):  # none is there, or none that can be read, which is not said here
        return {}
    limit, wanted = f"first {options.max_tokens}" if options.max_tokens else "all", {case.id for case in cases}
    found = (row for row in rows if row.value is not None and row.case.id in wanted)
    return {row.case.id: row.seconds for row in found if not row.protocol_id or token_limit(row.protocol_id) == limit}


def tokens(dataset: str, options: Options) -> int:
    """Tokens of a text, roughly, and no more than are asked for."""
    most = options.max_tokens
    if most is not None and most <= TOKENS:
        return most  # whoever asks for so few has a text that is as long
    specification = parse(dataset)
    if specification.name == "synthetic":
        found = corpora.SYNTHETIC_TOKENS
    elif of_hub(dataset, options):
        found = HUB_TOKENS
    else:
        try:
            found = sum(map(len, corpora.read(specification, options.declared).documents)) // BYTES_A_TOKEN
        except HarnessError:  # the session says so
            found = TOKENS
    return found if most is None else min(found, most)


def of_hub(dataset: str, options: Options) -> str:
    """A text's ORG/NAME on the Hub; '' where it lies elsewhere."""
    kind, argument, _ = corpora.resolve(parse(dataset), options.declared)
    if kind is corpora.DATASETS["wikitext-2"]:
        argument = corpora.WIKITEXT_2
    elif kind is not corpora.DATASETS["hub"]:
        return ""
    return hub.parse_text(argument).repository


def downloads(cases: Sequence[Case], options: Options) -> list[Fetch]:
    """What is not in the cache of the Hub's client yet; asks the Hub, which is given seconds to answer."""
    found = []
    for model in models_of(cases):
        specification = parse(model)
        if names.declared_source(specification, options.declared).name != "hub":
            continue
        allowed: Any = {"allow_pickle": options.allow_pickle, "trust_remote_code": options.trust_remote_code}
        try:
            snapshot = names.locate(specification, options.declared, **allowed).snapshot
            assert snapshot is not None, "a source on the Hub is a snapshot"
            if (count := hub.to_fetch(snapshot)) != 0:  # None where nobody says
                found.append(Fetch(model, count))
        except HarnessError as error:
            found.append(Fetch(model, None, str(error)))
    hosted = {text: of_hub(text, options) for text in dict.fromkeys(case.dataset for case in cases) if text}
    return found + [Fetch(text, None) for text, name in hosted.items() if name and not hub.has_text(name)]


def needs(cases: Sequence[Case], options: Options, seconds: Mapping[str, float]) -> list[Need]:
    """What each model under each method asks for, predicted from its configuration; loads torch."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.group, []).append(case)
    found = []
    for own in groups.values():
        one = own[0]
        need = Need(one.model, one.method, one.device, len(own), sum(seconds[case.id] for case in own))
        if one.model == LAYER:
            found.append(need)
            continue
        try:
            storage, peak = bytes_of(own, options)
            found.append(replace(need, storage=storage, peak=peak))
        except HarnessError as error:
            found.append(replace(need, trouble=str(error)))
    return found


def bytes_of(group: Sequence[Case], options: Options) -> tuple[int, int]:
    """Bytes that a group's model keeps, and that its process holds at most, the reference beside it if need be."""
    from harness.run import prediction  # local, as below: what reads configurations takes seconds to import

    one = group[0]

    def side(text: str) -> tuple[int, int]:
        asked = parse_method(text)
        name = asked.model or one.model  # a reference may be of another model
        return prediction.kept_and_peak(
            options.declared.sources.get(name, name), str(replace(asked, model="")), one.device
        )

    storage, peak = side(one.method)
    if one.method != one.reference and any(member_of(case).timed or case.family == "divergence" for case in group):
        peak = max(peak, storage + side(one.reference)[1])
    return storage, peak + PROCESS_BYTES


def room(device: str) -> int:
    """Bytes of memory that are free on this machine, or of its smallest visible card; 0 where nobody says."""
    if device == "cuda":
        return min((gpu.memory for gpu in gpus.now().gpus), default=0)
    lines = AVAILABLE.read_text("utf-8").splitlines() if AVAILABLE.is_file() else []
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
    limit = LIMIT.read_text("utf-8").strip() if LIMIT.is_file() else ""
    return min(free, int(limit)) if limit.isdigit() else free


def in_short(cases: Sequence[Case], options: Options, expected: Forecast, fetched: Sequence[Fetch]) -> list[str]:
    """What would be measured, how long it takes and what comes from the Hub: a line each."""
    models, methods = (list(dict.fromkeys(getattr(case, name) for case in cases)) for name in ("model", "method"))
    metrics, devices = (list(dict.fromkeys(getattr(case, name) for case in cases)) for name in ("metric", "device"))
    texts = dict.fromkeys(f"{case.dataset} {case.protocol}" for case in cases if case.dataset)
    known = [one for one in fetched if not one.trouble]
    together = f"; {size(sum(one.bytes or 0 for one in known))} together" if len(known) > 1 else ""
    lines = [
        f"{plural(len(cases), 'case')}: {some(models)} under {plural(len(methods), 'method')} on {', '.join(devices)}",
        f"metrics: {some(metrics)}",
        *([f"texts: {some(texts)}"] if texts else []),
        f"time: about {duration(expected.total)} ({expected.basis})",
        f"download: {', '.join(map(str, known)) or ('unknown' if fetched else 'nothing')}{together}",
        *(f"not at hand: {one.trouble}" for one in fetched if one.trouble),
    ]
    return [visible(line) for line in [*lines, f"report: {options.report_dir}"]]


def some(listed: Iterable[str]) -> str:
    """The first few, and how many more."""
    every = list(listed)
    return ", ".join(every[:LISTED]) + (f" and {len(every) - LISTED} more" if len(every) > LISTED else "")


def in_full(wanted: Sequence[Need], fetched: Sequence[Fetch]) -> tuple[list[str], bool]:
    """A line each model under each method, then what is in the way; and whether nothing is."""
    rooms = {device: room(device) for device in dict.fromkeys(need.device for need in wanted)}
    lines, ways = [], []
    for need in wanted:
        word = "?" if need.trouble else "yes" if need.fits(rooms[need.device]) else "no"
        shown = [NOTHING if count is None else f"{count / MIB:,.0f}" for count in (need.storage, need.peak)]
        lines.append([need.model, need.method, need.device, str(need.cases), duration(need.seconds), *shown, word])
        if need.trouble:
            ways.append(need.trouble)
        elif word == "no":
            here = f"{size(rooms[need.device])} {FREE[need.device]}"
            ways.append(f"{need.model} under {need.method} does not fit: {size(need.peak or 0)} at its peak, {here}")
    total, free = sum(one.bytes or 0 for one in fetched), hub.free_space()
    if total > free:
        ways.append(f"the download does not fit: {size(total)}, {size(free)} free where the Hub's cache lies")
    table: list[str] = []
    if lines:
        head = ["model", "method", "device", "cases", "time", "storage MiB", "peak MiB", "fits"]
        aligned = ("left", "left", "left", *["right"] * 4, "left")
        table = tabulate(lines, head, tablefmt="simple", colalign=aligned, disable_numparse=True).splitlines()
        told = (f"{size(count) if count else NOTHING} {FREE[device]}" for device, count in rooms.items())
        table += ["", f"memory: {', '.join(told)}", PEAK]
    return [*table, *map(visible, dict.fromkeys(ways))], not ways
