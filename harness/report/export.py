"""A report's figures for other programs: CSV, Parquet, LaTeX, JSON lines, the metadata of a model card.

One record a case, the missing ones too; a model card takes the figures that were read on a text.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from harness.core.errors import HarnessError
from harness.core.files import replace_text
from harness.core.records import Row
from harness.core.text import NOTHING, mib, milliseconds, number, perplexity, visible
from harness.core.values import encode
from harness.inputs.models.names import KNOWN
from harness.report.account import complete, grouped, sections
from harness.report.conditions import timed_work
from harness.report.tables import Factor, MethodLine, lines, loss, pace, shown, timed, timed_row
from harness.results.directory import read_report, writing
from harness.results.flat import COLUMNS, records

LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--"}
LATEX |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
LATEX |= {"…": r"\ldots{}", "×": r"$\times$", "Δ": r"$\Delta$"}
LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}
SPECIAL = re.compile(f"[{re.escape(''.join(LATEX))}]")
ROW_BEGINS = re.compile(r"^(?=[\[*])")  # behind the \\ of the row before, LaTeX would take it for an argument


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
    tables = ["% in the preamble: \\usepackage{booktabs}"]
    for section in sections(rows):
        for _, own in grouped(lines(section), lambda line: line.text).items():
            tables.append(_table(own))
    return "\n".join(tables)


def _table(own: Sequence[MethodLine]) -> str:
    section, (dataset, protocol) = own[0].section, own[0].text
    times = timed(section)
    columns: list[tuple[str, Callable[[MethodLine], str]]] = [
        ("perplexity", lambda line: _value(line, "perplexity", perplexity)),
        ("ratio", lambda line: _words(loss(line))),
        ("bits/weight", _bits),
        ("storage, MiB", lambda line: _value(line, "memory.storage", mib)),
        *((f"{name.partition('.')[2]} time", _time(name)) for name in times),
    ]
    filled = [(name, [read(line) for line in own]) for name, read in columns]
    kept = [(name, cells) for name, cells in filled if any(cell != NOTHING for cell in cells)]
    body = [[line.method, *(cells[place] for _, cells in kept)] for place, line in enumerate(own)]
    ids = dict.fromkeys(row.protocol_id for line in own for row in line.rows if row.protocol_id)
    read_as = f" on {dataset} under {protocol} ({' / '.join(ids)})" if dataset else ""
    timings = (row for line in own for name in times if (row := timed_row(line, name)))
    works = "; ".join(dict.fromkeys(f"{row.metric} {work}" for row in timings if (work := timed_work(row))))
    how = f" ({works})" if works else ""
    caption = (
        f"{section.model} on {section.device}{read_as}. Ratios and times are over those of {section.reference}, times "
        f"paired in one run{how}; brackets hold 95% intervals; lower is better."
    )
    head = " & ".join(map(tex, ("method", *(name for name, _ in kept))))
    rows = [ROW_BEGINS.sub("{}", " & ".join(map(tex, cells))) + r" \\" for cells in body]
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


def as_model_card(rows: Sequence[Row]) -> str:
    """The head of a Hub README: its `model-index`, one entry a model and method, of the figures read on a text.

    Each figure has the revision of the weights and the protocol beside it. Bytes and times are of no data set, which
    the Hub asks for, and a time is of its machine: they stand in the report alone.
    """
    read = [row for row in rows if row.dataset and row.value is not None and not row.stopped_early]
    if not read:
        raise HarnessError("no figure of a whole text, which a model card asks for: measure with --metrics perplexity")
    index = []
    for (model, method), own in grouped(read, lambda row: (row.model, row.method)).items():
        texts = grouped(own, lambda row: (row.dataset, row.protocol)).values()
        index.append({"name": f"{model} ({method})", "results": [_result(figures) for figures in texts]})
    sources = dict.fromkeys(KNOWN.get(row.model, row.model) for row in read)
    bases = [_hub_name(source) for source in sources if source.startswith("hub:")]
    base = {"base_model": bases[0] if len(bases) == 1 else bases} if bases else {}
    return f"---\n{yaml.safe_dump({**base, 'model-index': index}, sort_keys=False, allow_unicode=True, width=120)}---\n"


def _result(figures: Sequence[Row]) -> dict[str, Any]:
    """A text's figures of one model and method, as the Hub's specification of model cards lays them out."""
    first = figures[0]
    dataset: dict[str, Any] = {"type": _hub_name(first.dataset), "name": first.dataset, "config": first.protocol}
    dataset["args"] = {"protocol": first.protocol_id, "token_ids_sha256": first.token_hash}
    return {"task": {"type": "text-generation"}, "dataset": dataset, "metrics": [_metric(row) for row in figures]}


def _metric(row: Row) -> dict[str, Any]:
    told = {
        "method": row.method_id or row.method,
        "reference": row.reference,
        "revision": row.revision,
        "identity": row.identity,
        "device": row.device,
        "bits_per_weight": row.bits_per_weight,
        "interval_95": list(row.interval) if row.interval else None,
        "verdict": str(row.verdict),
    }
    name = f"{row.metric} ({row.unit})" if row.unit else row.metric
    known = {key: encode(value) for key, value in told.items() if value not in (None, "")}
    return {"type": row.metric, "name": name, "value": encode(row.value), "args": known}


def _hub_name(source: str) -> str:
    """'org/name' for 'hub:org/name@revision'; anything else as it is."""
    return source.removeprefix("hub:").partition("@")[0] if source.startswith("hub:") else source


def _bits(line: MethodLine) -> str:
    return number(next((row.bits_per_weight for row in line.rows if row.bits_per_weight is not None), None))


def _value(line: MethodLine, metric: str, write: Callable[[float | None], str]) -> str:
    row = line.section.row(line.method, metric, line.text) or line.section.row(line.method, metric)
    return shown(row, write)


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
    return SPECIAL.sub(lambda match: LATEX[match[0]], visible(text))


WRITERS: dict[str, Callable[[Sequence[Row]], str]] = {
    "csv": as_csv,
    "jsonl": as_json_lines,
    "latex": as_latex,
    "model-card": as_model_card,
}


def export(folder: Path, to: str, output: Path | None, models: Sequence[str] = (), methods: Sequence[str] = ()) -> str:
    """A report directory's figures (of some models or methods) for another program: a key of WRITERS, or 'parquet'.

    Written to `output`, or returned where there is none.
    """
    session = read_report(folder).only(models, methods)
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
