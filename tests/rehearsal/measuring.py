"""Groups measured in this process, on the pretended card or on the CPU, and what must hold of their rows."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from bitsandbytes import functional

from harness.core import catalog
from harness.core.options import Declared, Options
from harness.core.records import Row
from harness.core.specification import parse, parse_list
from harness.methods.quantizing import bnb
from harness.methods.quantizing.arguments import resolve
from harness.metrics.measuring import card_memory
from harness.run import plan as planning
from harness.run.group import Group
from harness.run.messages import Job, Reply
from harness.run.prediction import find_config
from tests.rehearsal.card import MEMORY, Card, half_products, pretended

CORE = (
    "fp32 bf16 fp16 absmax-int8 absmax-int8-tensor zeropoint-int8 linear-int4 linear-int4-affine nf4 fp4 "
    "bnb-int8 bnb-fp4 bnb-nf4 bnb-nf4-dq"
).split()
REFERENCES = ("fp32", "bf16", "fp16")  # whose dtype is their name
HALF_BYTES = 2
AGREEMENT = 0.05  # of predicted and measured peaks


class Silent:
    """A connection to nobody."""

    def send(self, reply: Reply) -> None:
        """Drop it."""


@dataclass(frozen=True)
class Plan:
    """What to measure of each method: as the options of the same names have it."""

    model: str
    folder: Path  # of the report; the reference's losses are kept there, for every method's group
    metrics: tuple[str, ...] = ("perplexity", "memory")
    dataset: str = "synthetic"
    protocols: str = "chunk:64"
    tokens: int = 128

    def with_metrics(self, *metrics: str) -> Plan:
        """The same plan for other metrics."""
        return replace(self, metrics=metrics)

    def with_protocols(self, protocols: str) -> Plan:
        """The same plan for other protocols, separated by commas."""
        return replace(self, protocols=protocols)

    def options(self, method: str, device: str) -> Options:
        """The session's options that say so."""
        report = self.folder / device
        (report / "nll").mkdir(parents=True, exist_ok=True)
        return Options(
            declared=Declared(self.folder),
            models=parse_list(self.model),
            methods=parse_list(method),
            metrics=self.metrics,
            datasets=parse_list(self.dataset),
            protocols=parse_list(self.protocols),
            device=device,
            max_tokens=self.tokens,
            repetitions=2,
            report_dir=report,
        )


@dataclass(frozen=True)
class Run:
    """One group's rows by metric, in the order of the plan, and what its process leaves."""

    rows: dict[str, Row]
    copies: int  # from the host to the card during the forward of memory.run_peak, whose ids lie on the card
    left: int  # storages on the card when all is over


@contextlib.contextmanager
def group_of(plan: Plan, method: str, device: str, total: int = MEMORY) -> Iterator[tuple[Group, Card | None]]:
    """A method's group, within the pretence of a card of `total` bytes where the device is 'cuda'; let go of after."""
    options = plan.options(method, device)
    job = Job(options, str(options.models[0]), str(parse(method)), device, "fp32", 1, plan.folder / "log")
    place: Any = pretended(total) if device == "cuda" else half_products()
    tables = mock.patch.dict(
        functional.name2qmap
    )  # which bitsandbytes keeps for the process, where it first wanted them
    with tables, place as card, bnb.quiet():
        group = Group(job, Silent())  # type: ignore[arg-type]
        try:
            yield group, card if device == "cuda" else None
        finally:
            group._model = group._reference = None
            Group.plan_of.cache_clear()  # it holds every group; a process has but one
            gc.collect()


def run(plan: Plan, method: str, device: str, without: Sequence[str] = ()) -> Run:
    """Measure every case of a method; a row's name is its metric, behind the protocol where there are several."""
    cases = [case for case in planning.plan(plan.options(method, device), True) if case.method == str(parse(method))]
    with group_of(plan, method, device) as (group, card):
        rows: dict[str, Row] = {}
        copies: dict[str, int] = {}
        for case in cases:
            name = f"{case.protocol} {case.metric}".strip() if "," in plan.protocols else case.metric
            if name in without:
                continue
            before = card.kernels["Memcpy HtoD"] if card else 0
            rows[name] = group.measure(case)
            copies[name] = card.kernels["Memcpy HtoD"] - before if card else 0
    return Run(rows, copies.get("memory.run_peak", 0), card.tensors() if card else 0)


def on_cpu(method: str) -> str:
    """The specification that gives on a CPU what the method's name alone gives on a card: its default there is fp16."""
    if method in REFERENCES:
        return method
    return f"{method}{',' if ':' in method else ':'}dtype=fp16"


def hold_peaks(rows: dict[str, Row], vocabulary: int) -> None:
    """AssertionError where a peak cannot be what its name says.

    Loading holds the model at its end. A forward holds it too, and at its end the logits of every token in fp16. Both
    are bytes of tensors: the pool is larger, for it takes memory in segments.
    """
    storage = rows["memory.storage"].value
    load, ran = rows["memory.load_peak"], rows["memory.run_peak"]
    assert load.value is not None
    assert ran.value is not None
    assert storage is not None
    for row in (load, ran):
        assert row.value == row.detail["allocated"], "a peak is of tensors"
        assert row.detail["allocated"] < row.detail["reserved"], "the pool is larger than its tensors"
    assert load.value >= storage, "the loaded model is in the peak of loading"
    assert ran.value >= storage + ran.detail["tokens"] * vocabulary * HALF_BYTES, "a peak read before the forward"


def hold_prediction(plan: Plan, method: str, rows: dict[str, Row]) -> None:
    """AssertionError where the peaks that are predicted without a card are further than AGREEMENT from those measured.

    Of what was asked for: the pool's rounding, and its blocks that are not split (up to a MiB each), are not predicted.
    """
    named = plan.options(method, "cuda").methods[0]
    known = catalog.methods()[named.name]
    found = card_memory.predict(
        find_config(plan.model), known, resolve(named, known, "cuda"), rows["memory.run_peak"].detail["tokens"]
    )
    for name, predicted in (("memory.load_peak", found.load_peak), ("memory.run_peak", found.run_peak)):
        measured = rows[name].detail["requested"]
        assert abs(predicted / measured - 1) <= AGREEMENT, (name, predicted, measured)


def hold_proof(row: Row) -> None:
    """AssertionError where a row carries no evidence that the card worked."""
    assert row.detail["proof"]["kernels"] > 0
    assert row.detail["proof"]["allocated"] > 0
