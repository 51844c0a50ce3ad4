"""Each figure over runs: kept a file a run, compared with the run at which its level began, drawn, harmless."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from harness.__main__ import main
from harness.core.errors import BadFile, HarnessError
from harness.core.records import Case, Row, Verdict
from harness.report.history import History, history, page, plot, render
from harness.results.directory import SavedSession
from harness.results.runs import keep, read_runs
from tests.report.test_page import browse, browser
from tests.report.test_report import MADE

HOSTILE = "</title><script>window.pwned=1</script><b onclick=x>{{7*7}}\u202e"
TORCH = ("2.12.0", "2.12.0", "2.13.0", "2.13.0", "2.13.0")
BYTES: tuple[float | None, ...] = (4e6, 4e6, 5e6, 5e6, None)
CREEP = (0.0, 0.05, 0.09, 0.15, 0.15)  # ln of the time ratio: each step is noise, the fourth run is not as the first


def a_run(number: int, model: str = "m") -> SavedSession:
    world = f"e{TORCH[number]}"
    size = Case(model, "nf4", "", "", "memory.storage", "cpu")
    pace = Case(model, "nf4", "", "", "latency.decode", "cpu")
    text = Case(model, "nf4", "lee", "chunk:512", "perplexity.delta", "cpu")
    log, time = CREEP[number], 0.03 + number / 1000
    detail = {"log_ratio": log, "log_ratio_low": log - 0.005, "log_ratio_high": log + 0.005, "window_counts": [256] * 8}
    rows = [
        Row.of(size, value=BYTES[number], unit="B", count=1, environment=world),
        Row.of(pace, value=time, unit="s", count=16, environment=world, detail=detail, samples=(time,) * 16),
        Row.of(pace._replace(method="fp32"), value=0.02 + number, unit="s", count=16, environment=world),
        Row.of(
            text, value=0.01, unit="nat", interval=(0.005, 0.015), count=2048, environment=world, protocol_id="p",
            token_hash="a", detail={"window_counts": [256] * 8},
        ),
    ]  # fmt: skip
    if BYTES[number] is None:
        rows[0] = replace(rows[0], verdict=Verdict.MISSING, reason="no memory")
    worlds = {world: {"device": "cpu", "torch": TORCH[number]}}
    planned, finished = tuple(row.case for row in rows), f"2026-01-0{number + 1}T10:00:00Z"
    return SavedSession(tuple(rows), planned, worlds, command=f"pytest {number}", finished=finished)


RUNS = [a_run(number) for number in range(5)]


@pytest.fixture(scope="module")
def found() -> History:
    return history(RUNS)


def marks(found: History, metric: str) -> list[tuple[int, str, int | None]]:
    (one,) = (one for one in found.series if one.case.metric == metric)
    return [(moment.run, str(moment.verdict), moment.since) for moment in one.changes]


def test_a_change_is_marked_with_what_moved_and_what_creeps_is_found(found: History) -> None:
    assert marks(found, "memory.storage") == [(2, "worse", 0), (4, "missing", 2)]
    assert marks(found, "latency.decode") == [(3, "worse", 0)]
    assert marks(found, "perplexity.delta") == []
    assert not [one for one in found.series if one.case.method == "fp32"]  # milliseconds of different moments
    (size,) = (one for one in found.series if one.case.metric == "memory.storage")
    assert size.moments[2].moved == ("torch: 2.12.0 -> 2.13.0",)
    assert [moment.reason for _, moment in found.worse] == ["no memory"]
    other = replace(RUNS[1], rows=tuple(replace(row, protocol_id=row.protocol_id and "q") for row in RUNS[1].rows))
    assert marks(history([RUNS[0], other, other]), "perplexity.delta") == [(1, "input changed", 0)]  # and once only


def test_markdown_says_when_what_and_why(found: History) -> None:
    text = render(found)
    assert text.startswith(
        "# History\n\n**2 figures of 3 changed in 5 runs; the last run made 1 worse.**\n\n"
        "Changes, the latest first:\n\n"
        "- **missing**: `m`, `nf4`, `memory.storage`: run 5, 2026-01-05, against run 3: 4.77 -> missing; no memory\n"
    )
    assert "run 3, 2026-01-03, against run 1: 3.81 -> 4.77; +1,000,000 B, exact; moved: torch: 2.12.0 -> 2.13.0" in text
    assert "run 4, 2026-01-04, against run 1: 1.0000 -> 1.1618; " in text
    table = re.sub(" +", " ", text)
    assert "| `nf4` | `memory.storage` | MiB | 3.81 | 3.81 | 4.77 ✕ worse | 4.77 | ✕ missing | 3, 5 |" in table
    assert "| `nf4` | `perplexity.delta` `lee` `chunk:512` | over fp32's | 1.0101 | 1.0101 |" in table
    assert "| 3 | 2026-01-03T10:00:00Z | 4 | torch: 2.12.0 -> 2.13.0 |" in table
    assert "1 run: nothing to compare with yet." in render(history(RUNS[:1]))
    assert render(history([])).startswith("# History\n\n**0 runs: nothing to compare with yet.**")


class Titles(HTMLParser):
    """Every tag, and what stands in the titles of the plots."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.titles: list[str] = []
        self._open = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag == "title"

    def handle_data(self, data: str) -> None:
        if self._open:
            self.titles.append(data)
            self._open = False


def test_every_dot_is_its_row_and_lies_where_it_says(found: History) -> None:
    titles = [text.partition(": ") for text in Titles(page(found)).titles[1:]]
    wanted = [
        (f"run {moment.run + 1}, {RUNS[moment.run].finished}", moment.row)
        for one in found.series
        for moment in one.moments
        if moment.row.value is not None
    ]
    assert len(titles) == len(wanted) == 14
    for (when, _, figure), (at_run, row) in zip(titles, wanted, strict=True):
        assert row.value is not None
        log = row.detail.get("log_ratio", row.value)
        value = row.value / 2**20 if row.unit == "B" else math.exp(log)
        assert when == at_run
        assert float(figure.split()[0]) == pytest.approx(value, rel=2e-3)
    (size,) = (one for one in found.series if one.case.metric == "memory.storage")
    drawing = plot(size, RUNS)
    assert drawing
    heights = [spot.y for spot in drawing["spots"]]
    assert heights[0] == heights[1] > heights[2] == heights[3]  # more stands higher
    assert [spot.tone for spot in drawing["spots"]] == ["", "", "bad", ""]


def test_the_page_runs_nothing_fetches_nothing_and_names_are_text(found: History) -> None:
    hostile = [replace(a_run(number, HOSTILE), command=HOSTILE) for number in range(4)]
    for text in (page(found), page(history(hostile))):
        parsed = Titles(text)
        names = {tag for tag, _ in parsed.tags}
        assert not names & {"script", "img", "b", "iframe"}
        assert not [name for _, own in parsed.tags for name in own if name.startswith("on") or name in ("style", "src")]
        links = {str(own["href"])[:1] for _, own in parsed.tags if "href" in own}
        assert links <= {"#", "d"}
        anchors = {own.get("id") for _, own in parsed.tags}
        assert {str(own["href"])[1:] for tag, own in parsed.tags if tag == "a"} <= anchors
        assert "\u202e" not in text
        policy = next(str(own["content"]) for _, own in parsed.tags if "http-equiv" in own)
        assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "<script>" not in render(history(hostile))


@browser
def test_a_browser_shows_it_on_a_phone_in_silence(tmp_path: Path) -> None:
    runs = [replace(a_run(number, HOSTILE), command=HOSTILE) for number in range(5)]
    said = browse(
        tmp_path,
        page(history(runs)),
        """
        said.width = page.documentElement.scrollWidth;
        one(".cases a").click();
        said.anchor = view.location.hash;
        all("details").forEach((own) => { own.open = true; });
        said.opened = page.documentElement.scrollWidth;
        said.dots = all("svg .dot").length;
        said.scripts = page.scripts.length;
        """,
    )
    assert max(said["width"], said["opened"]) <= 390
    assert (said["anchor"], said["dots"], said["scripts"]) == ("#figure-0", 14, 0)


def test_a_run_is_a_file_that_is_kept_once(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    paths = [keep(run, folder) for run in RUNS]
    assert [keep(run, folder) for run in RUNS] == paths
    assert re.fullmatch(r"20260101T100000Z-[0-9a-f]{8}\.run\.jsonl", paths[0].name)
    assert len(list(folder.iterdir())) == 5
    read = read_runs([folder, folder / paths[2].name])
    assert [run.finished for run in read] == [run.finished for run in RUNS]
    assert (read[0].command, read[0].environments) == (RUNS[0].command, RUNS[0].environments)
    assert render(history(read)) == render(history(RUNS))
    assert not read[0].rows[1].samples
    paths[1].write_text(paths[1].read_text().replace('"value": 0.03', '"value": 0.04'))
    with pytest.raises(BadFile, match=r"run.jsonl:3 is no line of a kept run .*changed after it was written"):
        read_runs([folder])
    with pytest.raises(HarnessError, match="holds neither a report"):
        read_runs([tmp_path])
    with pytest.raises(BadFile, match="is no time of a run"):
        keep(replace(RUNS[0], finished="../../x"), folder)


def test_the_command_keeps_draws_and_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, run in enumerate(RUNS[:3]):
        home = tmp_path / str(number)
        home.mkdir()
        (home / "measurements.jsonl").write_text("".join(row.to_json() + "\n" for row in run.rows))
        (home / "environments.json").write_text(json.dumps(run.environments))
        (home / "session.json").write_text(json.dumps({"command": run.command, "finished": run.finished}))
        command = ["history", str(home), "--keep", str(tmp_path / "kept"), "-o", str(tmp_path / "history.html")]
        assert main(command) == (1 if number == 2 else 0)
    text = capsys.readouterr().out
    assert "1 figure of 3 changed in 3 runs; the last run made 1 worse." in text
    assert "1 figure of 3 changed in 3 runs" in (tmp_path / "history.html").read_text()
    assert main(["history", str(tmp_path / "kept")]) == 1
    assert main(["history", str(MADE)]) == 0  # of a harness that did not note the time
    assert main(["history", str(tmp_path)]) == 2
    assert "holds neither a report (measurements.jsonl) nor kept runs" in capsys.readouterr().err
