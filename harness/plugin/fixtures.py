"""What a user's own tests measure with: `harness.measure` under the options of their session."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest

from harness.core.records import Row
from harness.run import measure

SESSION = ("device", "baselines")  # options of the session that a test's own calls follow
LONGEST = 150  # characters of a test in a folder's name


def measure_in(config: pytest.Config) -> Callable[..., list[Row]]:
    """What the fixture `harness_measure` gives."""
    given = {name: config.getoption(f"harness_{name}") for name in SESSION}
    start, home = config.invocation_params.dir, config.getoption("harness_report_dir")  # a test may change its folder
    if given["baselines"] is not None:
        given["baselines"] = start / given["baselines"]
    calls: dict[str, itertools.count[int]] = {}

    @functools.wraps(measure.measure)
    def measured(models: Any = None, *arguments: Any, **options: Any) -> list[Row]:
        chosen = {name: value for name, value in given.items() if not (name == "device" and measure.is_live(models))}
        if home is not None:
            test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0] or "session"
            number = next(calls.setdefault(test, itertools.count(1)))
            chosen["report_dir"] = start / home / "tests" / folder_of(test) / str(number)
        return measure.measure(models, *arguments, **(chosen | options))

    return measured


def folder_of(test: str) -> str:
    """A folder's name for a test's node id, another for each."""
    name = quote(test, safe="")
    return name if len(name) <= LONGEST else f"{hashlib.sha256(name.encode()).hexdigest()[:8]}-{name[-LONGEST:]}"
