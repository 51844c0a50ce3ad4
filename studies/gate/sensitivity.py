"""Part 2 of the gate's bench: every seeded fault, and what came of it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from harness.core.text import NOTHING
from harness.report import markup
from studies.gate import device_faults, mutations


def measure(names: Sequence[str] = ()) -> dict[str, Any]:
    """Every fault, or those named."""
    gc.freeze()  # what is imported is not searched for garbage at every load
    found = []
    for fault in mutations.FAULTS:
        if names and fault.name not in names:
            continue
        seen = mutations.run(fault)
        entry = {
            "fault": fault.name,
            "model": fault.model,
            "case": f"{fault.methods[0]} {fault.metric}",
            "wanted": str(fault.verdict),
            "verdict": str(seen.verdict),
            "reason": seen.reason,
            "right": seen.right(fault),
            "fails": seen.fails,
            "innocent": list(seen.innocent),
            "others": len(seen.others),
            "silent": fault.silent,
            "formerly": fault.formerly,
        }
        print(f"sensitivity: {'right' if entry['right'] else 'WRONG'}: {entry}", file=sys.stderr)
        found.append(entry)
    return {"faults": found, "devices": simulated(device_faults.FAULTS), "quiet": simulated(device_faults.HARMLESS)}


def simulated(chosen: Any) -> list[dict[str, Any]]:
    """Faults (or harmless changes) on the simulated device."""
    found = []
    for name, run, wanted in chosen:
        row = run()
        found.append(
            {"fault": name, "case": f"{row.method} {row.metric}", "wanted": str(wanted), "verdict": str(row.verdict),
             "reason": row.reason, "right": row.verdict is wanted}
        )  # fmt: skip
    return found


def lines(entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of a table."""
    return [
        [
            entry["fault"],
            markup.code(entry["case"]) + (f" ({markup.code(entry['model'])})" if "model" in entry else ""),
            entry["verdict"] + ("" if entry["right"] else f" (**wrong**, wanted {entry['wanted']})"),
            markup.escape(short(entry["reason"])),
            f"{entry['others']}" if "others" in entry else NOTHING,
            entry.get("formerly") or NOTHING,
        ]
        for entry in entries
    ]


def quietly(harmless: Sequence[Mapping[str, Any]], headers: Sequence[str]) -> list[str]:
    """What is no fault; nothing where none was measured."""
    if not harmless:
        return []
    told = f"No faults, and judged so: {sum(entry['right'] for entry in harmless)} of {len(harmless)}."
    return [told, markup.table(headers[:4], [line[:4] for line in lines(harmless)], words=(0, 1, 2, 3))]


def short(reason: str) -> str:
    """What a line of a table holds of a reason."""
    return reason if len(reason) <= 170 else f"{reason[:167]}..."


def render(found: Mapping[str, Any]) -> str:
    """The section."""
    devices, quiet = found["devices"], found["quiet"]
    entries = [entry for entry in found["faults"] if not entry.get("silent")]
    harmless = [entry for entry in found["faults"] if entry.get("silent")]
    right = sum(entry["right"] for entry in entries)
    blamed = sum(len(entry["innocent"]) for entry in entries)
    headers = ["fault", "case that gives it away", "verdict", "reason", "further cases moved"]
    asked = any("formerly" in entry for entry in entries)  # data of before has none
    headers += ["before"] * asked
    shown = [line[: len(headers)] for line in lines(entries)]
    return "\n\n".join(
        (
            f"{len(entries)} seeded faults on the tiny models, each against a right session recorded before it "
            f"(perplexity, delta, exact bytes, divergence): **{right} of {len(entries)} end in the right verdict on "
            f"the right case**; {blamed} cases of other methods moved. *Further cases* are those of the methods that "
            "the fault meets. A fault that makes a figure better is seen as `better`, which does not fail a session; "
            "every other one here fails it as CI runs it."
            + " *Before*: what the rules before these said, where it was another verdict."
            * asked,
            markup.table(headers, shown, words=(0, 1, 2, 3, 5)[: 4 + asked]),
            *quietly(harmless, headers),
            f"On a simulated accelerator, counted apart (no real one has been seen): "
            f"{sum(entry['right'] for entry in devices)} of {len(devices)} faults, and "
            f"{sum(entry['right'] for entry in quiet)} of {len(quiet)} harmless changes judged rightly.",
            markup.table(headers[:4], [line[:4] for line in lines([*devices, *quiet])], words=(0, 1, 2, 3)),
        )
    )
