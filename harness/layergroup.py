"""The process of the invariants on one layer: in a `Group`'s place where no model is loaded."""

from __future__ import annotations

import time
from typing import Any

from harness import arguments, catalog, environment
from harness.contracts import Method
from harness.devices import open_device
from harness.group import CODE, loaded_facts
from harness.jsonvalues import digest
from harness.messages import Job, Stop
from harness.planning import method_of
from harness.records import Case, Row
from harness.specifications import parse


class LayerGroup:
    """One method's layers in this process: the `Subject` of checks, as far as they ask."""

    case: Case
    checkpoint: Any = None  # no model

    def __init__(self, job: Job) -> None:
        self.method: Method = method_of(parse(job.method), catalog.methods())
        self.arguments = arguments.resolve(parse(job.method), self.method, job.device)
        self.method_id = arguments.method_id(self.method, self.arguments, 1)
        self.device = open_device(job.device)
        self.environment = environment.capture(job.device, job.threads, loaded_facts(job.device))

    def key(self, case: Case, stop: Stop | None = None) -> str:
        """What --resume compares."""
        return digest([case.id, self.method_id, self.environment.id, CODE])

    def measure(self, case: Case, stop: Stop | None = None) -> Row:
        """Run one check; no verdict yet."""
        self.case = case
        started = time.perf_counter()
        subject: Any = self  # a Subject without model, plan and reference
        figure = catalog.metrics()[case.family].measure(subject, catalog.member_of(case))
        return Row.of(
            case,
            method_id=self.method_id,
            value=float(figure.value),
            unit=figure.unit,
            count=figure.count,
            detail={**figure.detail, **({"precision": self.device.precision} if self.device.precision else {})},
            environment=self.environment.id,
            seconds=round(time.perf_counter() - started, 3),
            key=self.key(case),
        )
