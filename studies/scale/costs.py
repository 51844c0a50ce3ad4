"""Keeps what a session's cases cost, and one row of each metric as an example of its size -> costs.json beside it.

`tox run -e report && python -m studies.scale.costs harness-report` (studies/scale/scale.py reads what is kept).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from harness.core.files import replace_text
from harness.results.directory import latest, read_report
from studies import pages

KEPT = Path(__file__).with_name("costs.json")


def costs(directory: Path) -> dict[str, Any]:
    """Seconds by method and metric of the session's one model, and an example row of each metric."""
    session = read_report(directory)
    rows = [row for row in latest(session.rows) if row.value is not None]
    models = {row.model for row in rows}
    assert len(models) == 1, f"one model's session is kept, this has {sorted(models)}"
    seconds: dict[str, dict[str, float]] = {}
    for row in rows:
        seconds.setdefault(row.method, {})[row.metric] = row.seconds
    examples = {row.metric: json.loads(row.to_json()) for row in rows if row.method == "linear-int4"}
    worlds = [session.environments[name] for name in dict.fromkeys(row.environment for row in rows)]
    processors = dict.fromkeys(f"{world['threads']} threads of an {world['cpu']}" for world in worlds)
    return {"model": rows[0].model, "processor": ", ".join(processors), "seconds": seconds, "examples": examples}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIR", help="a report directory of one model")
    parser.add_argument("-o", "--output", type=Path, default=KEPT, metavar="DATA.json")
    chosen = parser.parse_args()
    replace_text(chosen.output, pages.text_of(costs(chosen.directory)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
