"""A report's figures for other programs: CSV, Parquet, LaTeX, JSON lines. One record a case, the missing ones too."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from harness.core.errors import HarnessError
from harness.core.files import replace_text
from harness.core.records import Row
from harness.core.text import NOTHING, mib, milliseconds, number, perplexity, visible
from harness.report.account import complete, grouped, sections
from harness.report.kinds import Factor, MethodLine, lines, loss, pace
from harness.report.tables import MISSING
from harness.results.directory import read_report, writing
from harness.results.flat import COLUMNS, records

TIMES = ("latency.prefill", "latency.decode")
LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}
LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}


def as_csv(rows: Sequence[Row]) -> str:
    """A line a case under the names of `flat.COLUMNS`; what is unknown is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records(rows))
    return text.getvalue()


def as_json_lines(rows: Sequence[Row]) -> str:
    """Whole rows, as measurements.jsonl holds them: one a case, the planned ones that never ran too."""
    return "".join(row.to_json() + "\n" for row in rows)


def as_latex(rows: Sequence[Row]) -> str:
    """A table a model, device and text (booktabs), whose caption names the protocol."""
    tables = []
    for section in sections(rows):
        for _, own in grouped(lines(section), lambda line: line.text).items():
            tables.append(_table(own))
    return "\n".join(tables)


def _table(own: Sequence[MethodLine]) -> str:
    section, (dataset, protocol) = own[0].section, own[0].text
    columns: list[tuple[str, Callable[[MethodLine], str]]] = [
        ("perplexity", lambda line: _value(line, "perplexity", perplexity)),
        ("ratio", lambda line: _words(loss(line))),
        ("bits/weight", _bits),
        ("storage, MiB", lambda line: _value(line, "memory.storage", mib)),
        *((f"{name.partition('.')[2]} time", _time(name)) for name in TIMES),
    ]
    filled = [(name, [read(line) for line in own]) for name, read in columns]
    kept = [(name, cells) for name, cells in filled if any(cell != NOTHING for cell in cells)]
    body = [[line.method, *(cells[place] for _, cells in kept)] for place, line in enumerate(own)]
    ids = dict.fromkeys(row.protocol_id for line in own for row in line.rows if row.protocol_id)
    read_as = f" on {dataset} under {protocol} ({' / '.join(ids)})" if dataset else ""
    caption = (
        f"{section.model} on {section.device}{read_as}. Ratios and times are over those of {section.reference}, times "
        "paired in one run; brackets hold 95% intervals; lower is better."
    )
    head = " & ".join(map(tex, ("method", *(name for name, _ in kept))))
    rows = [" & ".join(map(tex, cells)) + r" \\" for cells in body]
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{tex(caption)}}}",
            rf"\begin{{tabular}}{{l{'r' * len(kept)}}}",
            r"\toprule",
            head + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _bits(line: MethodLine) -> str:
    return number(next((row.bits_per_weight for row in line.rows if row.bits_per_weight is not None), None))


def _value(line: MethodLine, metric: str, write: Callable[[float | None], str]) -> str:
    row = line.section.row(line.method, metric, line.text) or line.section.row(line.method, metric)
    return NOTHING if row is None else MISSING if row.value is None else write(row.value)


def _time(metric: str) -> Callable[[MethodLine], str]:
    """The paired ratio; of the reference its milliseconds, this once."""

    def cell(line: MethodLine) -> str:
        found = pace(line, metric)
        if not line.is_reference or found is None:
            return _words(found)
        return f"1 ({_value(line, metric, milliseconds)} ms)"

    return cell


def _words(found: Factor | None) -> str:
    return NOTHING if found is None else "1" if found == Factor(1.0) else found.words


def tex(text: str) -> str:
    """Text that LaTeX sets as it is."""
    return re.sub(r"[\\~^–&%$#_{}]", lambda match: LATEX[match[0]], visible(text))


WRITERS: dict[str, Callable[[Sequence[Row]], str]] = {"csv": as_csv, "jsonl": as_json_lines, "latex": as_latex}
FORMATS = (*WRITERS, "parquet")


def export(folder: Path, to: str, output: Path | None) -> str:
    """A report directory's figures in one of FORMATS, written to `output`, or returned where there is none."""
    session = read_report(folder)
    rows = complete(session.rows, session.planned)
    if output is None:
        if to not in WRITERS:
            raise HarnessError(f"{to} is no text: name a file with -o FILE.{to}")
        return WRITERS[to](rows)
    with writing(output, "--output "):
        if to in WRITERS:
            replace_text(output, WRITERS[to](rows))
        else:
            import pandas

            pandas.DataFrame(records(rows)).to_parquet(output)
    return ""
