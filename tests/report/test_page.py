"""The HTML report: its figures are those of measurements.jsonl, names are harmless, and a browser shows it in silence.

Chromium opens the unchanged page in a frame of a phone's width, served by this process, which sees every request; a
script of the page around it clicks and looks, and sends back what it saw.
"""

from __future__ import annotations

import json
import math
import os
import queue
import re
import shutil
import subprocess
import threading
import time
from dataclasses import replace
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from harness.__main__ import main
from harness.core.records import Case, Row, Verdict
from harness.report import read_report, render
from harness.report.account import decide, opening
from harness.report.charts import Axis
from harness.report.page import PAGEFUL, page
from harness.results.directory import SavedSession
from tests.report.test_report import cells

MADE = Path(__file__).parent / "data" / "made-session"
HOSTILE = "</script><script>window.top.pwned=1</script><img src=x onerror=window.top.pwned=1>{{7*7}}'\"&amp;`\u202e"
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FIGURE = re.compile(r"([\d.,e+-]+)(?: ?\[([\d.,e+-]+), ([\d.,e+-]+)\])?")


class Reading(HTMLParser):
    """What a test looks at: the cells of the main table by their names, every tag, and the data."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.lines: list[dict[str, str]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.script: list[str] = []
        self._cell, self._small, self._kept = "", False, False
        self.feed(text)
        self.data = json.loads("".join(self.script))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        self.tags.append((tag, own))
        if tag == "tr" and "data-found" in own:
            self.lines.append({"found": own["data-found"] or ""})
        self._cell = str(own.get("data-name") or "") or self._cell
        self._small = tag == "small" or (self._small and tag != "td")
        self._kept = tag == "script" and own.get("id") == "data"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "tr"):
            self._cell, self._small = "", False
        self._kept = False

    def handle_data(self, data: str) -> None:
        if self._kept:
            self.script.append(data)
        elif self._cell and self.lines:
            name = f"{self._cell} small" if self._small else self._cell
            self.lines[-1][name] = self.lines[-1].get(name, "") + data.strip()


def made() -> tuple[str, Any]:
    session = read_report(MADE)
    return page(session), session


def figures(text: str) -> list[float]:
    """The numbers of '× 1.0012 [1.0000, 1.0024]'."""
    match = FIGURE.search(text)
    assert match, text
    return [float(number.replace(",", "")) for number in match.groups() if number]


def test_every_figure_of_the_table_is_its_rows() -> None:
    text, session = made()
    rows = {(row.method, row.metric): row for row in session.rows}
    seen = 0
    for line in Reading(text).lines:
        method = line["method"].removesuffix("(reference)").removesuffix("†").strip()
        delta, size = rows.get((method, "perplexity.delta")), rows.get((method, "memory.storage"))
        if delta is not None and delta.value is not None:
            wanted = [delta.value, *(delta.interval or ())]
            assert figures(line["perplexity ratio"]) == pytest.approx([math.exp(one) for one in wanted], rel=1e-3)
            assert float(line["perplexity ratio small"]) == pytest.approx(rows[method, "perplexity"].value, abs=1e-3)
            seen += 1
        if size is not None and size.value is not None:
            share = size.value / rows["fp32", "memory.storage"].value
            assert figures(line["storage, MiB"]) == pytest.approx([size.value / 2**20], abs=0.01)
            assert figures(line["storage, MiB small"]) == pytest.approx([share], rel=1e-2)
            seen += 1
        for name in ("prefill", "decode"):
            timed = rows.get((method, f"latency.{name}"))
            if timed is not None and timed.value is not None:
                where = f"{name} ratio small" if method == "fp32" else f"{name} ratio"  # its A/A below it
                wanted = [timed.detail[f"log_ratio{end}"] for end in ("", "_low", "_high")]
                assert figures(line[where]) == pytest.approx([math.exp(one) for one in wanted], rel=1e-3)
                seen += 1
    assert seen == 3 + 4 + 8


def test_every_figure_of_the_data_and_the_plots_is_its_rows() -> None:
    text, session = made()
    found = Reading(text)
    measured = {row.case: row for row in session.rows}
    for own, case in zip(found.data["cases"], session.planned, strict=True):
        row = measured.get(case)
        value = row.value if row is not None else None
        assert (own["value"], own["title"]) == (value, case.metric)
        assert [own["low"], own["high"]] == list((row.interval if row is not None else None) or (None, None))
        assert own["command"].startswith("pytest --pyargs harness.cases ")
        assert all(name in own["command"] for name in (case.method, case.metric, case.dataset))
    dots = [own["aria-label"] or "" for tag, own in found.tags if tag == "a" and "dot" in (own.get("class") or "")]
    assert len(dots) == 4 + 4 + 4 + 4 + 4  # a plane, and lanes of losses, bytes, prefill and decode
    for method in ("absmax-int8", "absmax-int8-tensor", "linear-int4-affine:block=32"):
        deltas = {row.metric: row for row in session.rows if row.method == method}
        own = [figures(dot.partition(": × ")[2])[0] for dot in dots if f", {method}: × " in dot]
        ratio = math.exp(deltas["perplexity.delta"].value)
        times = [math.exp(deltas[f"latency.{name}"].detail["log_ratio"]) for name in ("prefill", "decode")]
        assert [own[0], own[1], own[3], own[4]] == pytest.approx([ratio, ratio, *times], rel=1e-3)


def test_milliseconds_stand_once_and_with_the_reference() -> None:
    text, _ = made()
    plain = text.partition('<script type="application/json"')[0]
    assert re.findall(r"[\d.]+ ms\b", plain) == ["123 ms", "31.7 ms"]
    assert "fp32 of smollm2-135m on cpu: prefill 123 ms, decode 31.7 ms (median)" in plain


def test_the_answer_is_that_of_the_markdown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.report.document.svgs", lambda rows, planned: {})  # slow, and tested elsewhere
    shutil.copytree(MADE, tmp_path / "made")
    assert main(["report", str(tmp_path / "made")]) == 0
    text = (tmp_path / "made" / "report.html").read_text(encoding="utf-8")
    answer = re.search(r'<p class="answer bad">✕ (.*?)</p>', text)
    assert answer is not None
    assert f"**{answer[1]}**" in capsys.readouterr().out
    assert "Planned 42, ran 39, missing 3." in text
    assert text == made()[0]


def test_a_line_has_three_verdicts_and_a_sign_with_every_word() -> None:
    lines = {line["method"]: line for line in Reading(made()[0]).lines}
    wanted = {
        "fp32(reference)": ("✓ within noise", "✓ within noise", "? not comparable"),
        "absmax-int8-tensor": ("✕ out of bound", "✓ within noise", "? not comparable"),
        "bnb-int8": ("–", "–", "✕ missing"),
    }
    for method, verdicts in wanted.items():
        assert tuple(lines[method][name] for name in ("quality", "memory", "speed")) == verdicts
    tensor = lines["absmax-int8-tensor"]
    assert set(tensor["found"].split("|")) >= {"bad", "out of bound", "unrecorded", "open", "not comparable"}
    assert tensor["quality small"] == "1 unrecorded"


def test_its_verdicts_are_those_of_the_markdown() -> None:
    text, session = made()
    markdown = render(session)
    for line in Reading(text).lines:
        method = line["method"].removesuffix("(reference)").removesuffix("†")
        for name in ("quality", "memory", "speed"):
            aside = f" ({line[f'{name} small']})" if line.get(f"{name} small") else ""
            assert cells(markdown, method)[name] == line[name].lstrip("✕?✓ ") + aside


def row(verdict: Verdict, *apart: Verdict | None, method: str = "nf4", metric: str = "perplexity") -> Row:
    case = Case("m", method, "lee", "chunk:512", metric, "cpu")
    reference, record = apart or (None, None)
    return Row.of(case, value=1.0, verdict=verdict, verdict_reference=reference, verdict_baseline=record)


def test_what_has_no_record_does_not_hide_what_was_decided() -> None:
    alone, bound = Verdict.UNRECORDED, Verdict.WITHIN_BOUND
    decided = decide([row(alone, None, alone), row(alone, bound, alone, metric="perplexity.delta")])
    assert decided is not None
    assert (decided.verdict, decided.row.metric, decided.aside) == (bound, "perplexity.delta", "2 unrecorded")
    alone_only = decide([row(alone, None, alone)])
    assert alone_only is not None
    assert (alone_only.verdict, alone_only.aside) == (alone, "")
    failed = decide([row(Verdict.WORSE, bound, Verdict.SAME), row(alone, bound, alone)])
    assert failed is not None
    assert failed.verdict is Verdict.WORSE
    assert decide([]) is None


def test_nothing_measured_is_a_page_too() -> None:
    assert opening([]) in page(SavedSession((), ()))
    planned = [Case("m", "nf4", "lee", "chunk:512", "perplexity", "cpu")]
    text = page(SavedSession((), tuple(planned)))
    assert "Nothing was measured: 0 of 1 planned case ran." in text
    assert Reading(text).data["cases"][0]["figure"] == "missing"


def hostile() -> str:
    cases = [
        Case(HOSTILE, method, HOSTILE, HOSTILE, metric, "cpu")
        for method in ("fp32", HOSTILE)
        for metric in ("perplexity", "memory.storage", "latency.decode")
    ]
    rows = [
        Row.of(
            case,
            value=float(2 + place),
            unit="ppl",
            verdict=Verdict.WORSE,
            reason=HOSTILE,
            environment="e",
            protocol_id=HOSTILE,
            detail={"log_ratio": 0.1, "log_ratio_low": 0.0, "log_ratio_high": 0.2, HOSTILE: [HOSTILE, "\ud800"]},
        )
        for place, case in enumerate(cases)
    ]
    return page(SavedSession(tuple(rows), tuple(cases), {"e": {HOSTILE: HOSTILE}}, (HOSTILE,), HOSTILE))


def test_names_with_html_and_script_are_text() -> None:
    text = hostile()
    text.encode()  # no lone surrogate is left
    found = Reading(text)
    assert [tag for tag, _ in found.tags].count("script") == 2
    assert "img" not in dict(found.tags)
    assert "\u202e" not in text + json.dumps(found.data, ensure_ascii=False)
    assert "49" not in {line["model"] for line in found.lines}
    assert found.data["cases"][0]["where"].startswith("</script>")
    assert "<" not in "".join(found.script)


def test_the_page_asks_for_nothing_and_allows_its_own_script_and_style_alone() -> None:
    text = made()[0]
    found = Reading(text)
    policy = next(own["content"] or "" for tag, own in found.tags if "http-equiv" in own)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    addresses = [own[name] or "" for _, own in found.tags for name in ("src", "href", "data", "action") if name in own]
    assert {address[:1] for address in addresses} == {"#", "d"}  # cases, and an empty icon
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    assert not [own for _, own in found.tags if "style" in own or any(name.startswith("on") for name in own)]
    assert len(text) < 400_000


@pytest.mark.parametrize(("low", "high"), [(1, 1), (0.9995, 1.0012), (0.2, 1), (1, 25), (1e-3, 1e9), (1, 3.9)])
def test_an_axis_has_a_few_round_ticks(low: float, high: float) -> None:
    axis = Axis([low, high], 10, 390, log=True)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 7
    assert len({name for _, name in ticks}) == len(ticks)
    assert all(10 <= place <= 390 for place, _ in ticks)
    assert axis.at(low) <= axis.at(high)


def test_a_large_report_has_its_first_lines_and_the_rest_behind_them() -> None:
    text = many(3 * PAGEFUL)
    first, _, rest = text.partition('<template id="more">')
    assert first.count("<tr data-found") == PAGEFUL
    assert rest.count("<tr data-found") == 2 * PAGEFUL
    assert f"{3 * PAGEFUL} lines, of which {PAGEFUL} stand here" in first
    assert len(Reading(text).data["rows"]) == 3 * PAGEFUL


def many(lines: int) -> str:
    """As many lines of two methods over texts, one of them worse."""
    rows = []
    for place in range(lines):
        case = Case("m", ("fp32", "nf4")[place % 2], f"text:{place // 2}", "chunk:512", "perplexity", "cpu")
        made_row = Row.of(case, value=30.0 + place % 2 * (1 + place / 1e4), unit="ppl", verdict=Verdict.WITHIN_NOISE)
        rows.append(replace(made_row, protocol_id="windows", token_hash="a", environment="e"))
    rows[-3] = replace(rows[-3], verdict=Verdict.WORSE, reason="it grew")
    return page(SavedSession(tuple(rows), tuple(one.case for one in rows), {"e": {"python": "3.11"}}))


# in a browser

DRIVER = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">
<iframe id="frame" src="report.html" style="width:390px;height:844px;border:0"></iframe><script>
const said = {};
const frame = document.getElementById("frame");
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const until = async (ready) => { for (let turn = 0; turn < 500 && !ready(); turn++) await wait(20); };
frame.onload = async () => {
  try {
    const view = frame.contentWindow, page = frame.contentDocument;
    const one = (selector) => page.querySelector(selector);
    const all = (selector) => [...page.querySelectorAll(selector)];
    const methods = () => all("#main tbody .method a").map((link) => link.textContent);
    const header = (name) => all("#main thead th").find((own) => own.textContent === name);
    await until(() => one("main"));
    %s
  } catch (error) { said.failed = String(error.stack); }
  said.pwned = window.pwned;
  console.log("heard");
  fetch("/said", {method: "POST", body: JSON.stringify(said)});
};
</script>"""


def browse(folder: Path, text: str, script: str) -> dict[str, Any]:
    """What a script in a page around the report said, after it was served once, without a word on the console."""
    asked: list[str] = []
    answers: queue.Queue[bytes] = queue.Queue()

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = (text if self.path == "/report.html" else DRIVER % script).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            answers.put(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    options += ["--disable-background-networking", "--disable-extensions", "--remote-debugging-port=0"]
    options += ["--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"]
    heard = folder / "console"
    with heard.open("wb") as console:
        address = f"http://127.0.0.1:{server.server_port}/"
        started = subprocess.Popen([str(CHROMIUM), *options, address], stdout=console, stderr=console)
        try:
            said: dict[str, Any] = json.loads(answers.get(timeout=120))
        finally:
            started.terminate()
            started.wait(timeout=60)
            server.shutdown()
            server.server_close()
    spoken = [line for line in heard.read_text(errors="replace").splitlines() if "CONSOLE" in line]
    assert len(spoken) == 1, spoken
    assert '"heard"' in spoken[0]
    assert asked == ["/", "/report.html"]
    assert "failed" not in said, said["failed"]
    assert "pwned" not in said
    return said


browser = pytest.mark.skipif(
    CHROMIUM is None and os.environ.get("HARNESS_BROWSER") != "required",  # CI has one
    reason=f"no browser: none of {', '.join(NAMES)} is on PATH",
)

CLICKS = """
said.width = page.documentElement.scrollWidth;
said.count = one("#count").textContent;
header("perplexity ratio").querySelector("button").click();
said.losses = methods();
said.sort = header("perplexity ratio").getAttribute("aria-sort");
header("perplexity ratio").querySelector("button").click();
said.turned = [methods(), header("perplexity ratio").getAttribute("aria-sort")];
header("method").querySelector("button").click();
said.names = methods();
one("#verdict").value = "bad"; one("#verdict").dispatchEvent(new view.Event("change"));
said.failing = methods();
one("#find").value = "TENSOR"; one("#find").dispatchEvent(new view.Event("input"));
said.found = methods();
one("#main tbody .verdict.bad").click();
await until(() => one("#panel").open);
said.opened = [one("#panel").open, one("#details pre").textContent, view.location.hash];
said.details = one("#details").textContent;
said.panel = [one("#panel").scrollWidth - one("#panel").clientWidth, page.documentElement.scrollWidth];
one("#close").click();
await until(() => !view.location.hash);
said.closed = [one("#panel").open, view.location.hash];
one("#main tbody .method a").click();
await until(() => one("#panel").open);
said.cases = all("#details > details").map((own) => own.querySelector("summary").textContent);
said.first = one("#details > details[open] pre").textContent;
said.folded = all("#details > details:not([open]) pre").length;
one("#close").click();
one("a.dot").dispatchEvent(new view.PointerEvent("pointerover", {bubbles: true}));
said.tip = one("#tip").textContent;
frame.style.width = "1280px";
await until(() => view.innerWidth === 1280);
said.wide = page.documentElement.scrollWidth;
"""


@browser
def test_a_browser_sorts_filters_and_shows_a_case_on_a_phone(tmp_path: Path) -> None:
    said = browse(tmp_path, made()[0], CLICKS)
    worst, tensor = "absmax-int8-tensor", "pytest --pyargs harness.cases"
    assert said["width"] <= 390
    assert said["wide"] <= 1280
    assert said["count"] == "1–6 of 6 lines"
    assert said["losses"][0] == worst
    assert said["sort"] == "descending"
    assert said["turned"][0][-3] == worst  # behind it stand the two without a figure
    assert said["turned"][1] == "ascending"
    assert said["names"] == sorted(said["names"])
    assert said["failing"] == [worst, "bnb-int8", "bnb-nf4"]
    assert said["found"] == [worst]
    opened, command, address = said["opened"]
    assert opened
    assert command.startswith(tensor)
    assert command.endswith(f"-k smollm2-135m/{worst}/lee/chunk:512/perplexity.delta/cpu")
    assert address.startswith("#case-")
    assert "perplexity.delta 3.2100 is above its bound 0.0050" in said["details"]
    assert said["panel"] == [0, said["width"]]
    assert said["closed"] == [False, ""]
    assert said["cases"][0].startswith("✕ out of bound perplexity.delta")
    assert said["first"].startswith(tensor)
    assert said["folded"] == 0  # made when they are opened
    assert "smollm2-135m, fp32 (reference, against itself): × 1.0000" in said["tip"]


@browser
def test_ten_thousand_lines_stay_usable(tmp_path: Path) -> None:
    began = time.perf_counter()
    text = many(10_000)
    assert time.perf_counter() - began < 60
    said = browse(
        tmp_path,
        text,
        """
        const times = [];
        const timed = async (work) => {
          const began = view.performance.now();
          work();
          page.body.offsetHeight;
          times.push(view.performance.now() - began);
        };
        await timed(() => header("perplexity ratio").querySelector("button").click());
        said.first = one("#main tbody .figure").textContent;
        await timed(() => one("#next").click());
        said.count = one("#count").textContent;
        one("#verdict").value = "worse";
        await timed(() => one("#verdict").dispatchEvent(new view.Event("change")));
        said.worse = [one("#count").textContent, one("#main tbody tr").textContent.includes("text:4998")];
        one("#verdict").value = "";
        one("#find").value = "text:77";
        await timed(() => one("#find").dispatchEvent(new view.Event("input")));
        said.rows = all("#main tbody tr").length;
        said.slowest = Math.max(...times);
        said.width = page.documentElement.scrollWidth;
        """,
    )
    assert said["slowest"] < 3000  # milliseconds; a tenth of it on a machine of one's own
    assert said["count"] == "101–200 of 10,000 lines"
    assert said["worse"] == ["1–1 of 1 lines (of 10,000)", True]
    assert said["rows"] == 22  # text:77 and text:770 to text:779, two methods each
    assert said["width"] <= 390


@browser
def test_hostile_names_do_nothing_in_a_browser(tmp_path: Path) -> None:
    said = browse(
        tmp_path,
        hostile(),
        """
        one("#main tbody .verdict").click();
        await until(() => one("#panel").open);
        said.text = one("#details").textContent;
        said.scripts = page.scripts.length;
        said.images = page.images.length;
        """,
    )
    assert said["text"].count("<script>window.top.pwned=1</script>") > 3
    assert (said["scripts"], said["images"]) == (2, 0)
