"""Measured rows as flat records, one value a column: for pandas, spreadsheets and whatever reads a table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from harness.core.records import Case, Row
from harness.core.text import exp
from harness.core.values import decode_number

RATIO = ("ratio", "ratio_low", "ratio_high")
COLUMNS = (
    *Case._fields,
    *"value unit low high count spread".split(),
    *RATIO,
    *"bits_per_weight verdict verdict_reference verdict_baseline reason baseline".split(),
    *"revision identity method_id protocol_id token_hash environment seconds".split(),
)


def record(row: Row) -> dict[str, Any]:
    """A row under COLUMNS.

    `low` and `high` are the figure's 95% interval in its unit; `ratio` is the paired figure over the reference's (of
    losses and times, None elsewhere) with its own. What is unknown is None; every word is a plain str.
    """
    low, high = row.interval or (None, None)
    told = {**row.told(), "low": low, "high": high, **dict(zip(RATIO, ratio_of(row), strict=True))}
    return {name: _plain(told[name]) for name in COLUMNS}


def ratio_of(row: Row) -> tuple[float | None, float | None, float | None]:
    """The paired ratio to the reference, and its interval where it may decide."""
    if row.value is not None and row.metric == "perplexity.delta":
        logs, usable = [row.value, *(row.interval or (None, None))], row.detail.get("usable") is not False
    else:
        logs = [decode_number(row.detail.get(f"log_ratio{end}")) for end in ("", "_low", "_high")]
        usable = row.detail.get("log_ratio_usable") is not False
    value, low, high = (exp(log) if isinstance(log, (int, float)) else None for log in logs)
    return (value, low, high) if usable else (value, None, None)


def records(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Every row as a record, in order."""
    return [record(row) for row in rows]


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, str) else value  # a Verdict is a str of its own kind
