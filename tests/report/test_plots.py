"""The plots: which exist, that they are deterministic and harmless, and that labels keep out of each other's way."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from harness.core.records import Case, Row, Verdict
from harness.report import read_report
from harness.report.account import Section, sections
from harness.report.plots import (
    Box,
    canvas_of,
    filename,
    label,
    over_reference,
    pareto,
    place,
    plain,
    plots_of,
    style,
    svgs,
)

MADE = Path(__file__).parent / "data" / "made-session"


def row(method: str, metric: str, value: float | None, **more: Any) -> Row:
    text = metric.startswith("perplexity")
    if value is not None and metric.startswith("latency"):  # as often as the reference's tenth of a second
        detail = {"log_ratio": math.log(value / 0.1)} if 0 < value < math.inf else {}
        more.setdefault("detail", detail)
    where = Case("m", method, "lee" if text else "", "chunk:512" if text else "", metric, "cpu")
    return Row.of(where, value=value, verdict=Verdict.MISSING if value is None else Verdict.SAME, **more)


def kinds(rows: list[Row]) -> list[str]:
    return [plot.kind for section in sections(rows) for plot in plots_of(section)]


def test_the_made_up_session_has_its_three_plots_as_clean_svg() -> None:
    session = read_report(MADE)
    found = svgs(session.rows, session.planned)
    assert sorted(name.partition("--")[0] for name in found) == [
        "latency",
        "memory",
        "quality-memory",
    ]
    for text in found.values():
        assert ElementTree.fromstring(text).tag.endswith("svg")
        assert "dc:date" not in text
        assert "<script" not in text


def test_the_same_rows_give_the_same_bytes() -> None:
    rows = [row("fp32", "latency.decode", 0.1), row("nf4", "latency.decode", 0.2)]
    assert svgs(rows) == svgs(rows)


def test_drawing_leaves_the_users_matplotlib_settings_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    svgs([row("fp32", "latency.decode", 0.1)])
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"font.size": 30.0}):
        large = svgs([row("fp32", "latency.decode", 0.1)])
    assert large == svgs([row("fp32", "latency.decode", 0.1)])


def test_only_plots_with_data_exist() -> None:
    perplexities = [row("fp32", "perplexity", 20.0), row("nf4", "perplexity", 22.0)]
    assert kinds([]) == []
    assert kinds([row("fp32", "perplexity", None), row("nf4", "latency.decode", math.nan)]) == []
    assert kinds(perplexities) == []
    assert kinds([row("fp32", "latency.decode", 0.1)]) == ["latency"]
    stored = [row("fp32", "memory.storage", 8.0), row("nf4", "memory.storage", 2.0)]
    assert kinds(stored) == ["memory"]
    assert kinds([*perplexities, stored[0]]) == ["memory"]
    assert kinds([*perplexities, *stored]) == ["quality", "memory"]


def test_values_that_cannot_be_drawn_do_not_stop_the_others() -> None:
    broken = {"inf": math.inf, "nan": math.nan, "zero": 0.0, "none": None}
    rows = []
    for metric, good in (("perplexity", 20.0), ("memory.storage", 8e6), ("latency.decode", 0.1)):
        rows += [row("fp32", metric, good), row("fp4", metric, good / 2)]
        rows += [row(name, metric, value) for name, value in broken.items()]
    assert len(svgs(rows)) == 3


def test_hostile_names_are_drawn_as_they_are() -> None:
    names = ["$x^$", "a|<b>&--c", "\x1b[31m", "漢字", "x" * 200, "\u202eabc"]
    rows = [row(name, "perplexity", 20.0 + index) for index, name in enumerate(["fp32", *names])]
    rows += [row(name, "memory.storage", 1e6 * (index + 1)) for index, name in enumerate(["fp32", *names])]
    found = svgs(rows)
    assert len(found) == 2
    for text in found.values():
        ElementTree.fromstring(text)
        assert "\x1b" not in text
        assert "\u202e" not in text


def test_plain_cuts_long_names_and_spells_out_what_the_font_lacks() -> None:
    assert plain("nf4") == "nf4"
    assert plain("$a$") == r"\$a\$"
    assert plain("漢") == "?"
    assert plain("\x1b") == r"\x1b"
    assert plain("a" * 20 + "b" * 20) == "a" * 14 + "…" + "b" * 14


def section(model: str = "m", device: str = "cpu") -> Section:
    return Section(model, device, "fp32", (), (), {})


def test_file_names_never_collide_and_need_no_quoting() -> None:
    models = [
        "gpt2",
        "gpt2_nf4",
        "gpt2-nf4",
        "path:a/b",
        "path:a-b",
        "a--b",
        "a",
        "b--a",
        "a+b",
        "a:b",
        "é",
        "è",
        "x" * 300,
    ]
    texts = [("", ""), ("lee", "chunk:512"), ("lee", "chunk:256"), ("lee--chunk", "512"), ("text:a b", "sentence")]
    names = [filename("latency", section(model), text) for model, text in itertools.product(models, texts)]
    assert len(set(names)) == len(names)
    assert all(
        set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._=+-") for name in names
    )
    assert max(map(len, names)) < 200
    assert filename("latency", section("gpt2"), ("", "")) == "latency--gpt2--cpu--fp32.svg"


def test_the_pareto_front_by_hand() -> None:
    sizes, losses = [100, 50, 50, 25, 60], [0.0, 1.0, 2.0, 9.0, 1.0]
    assert pareto(sizes, losses) == [3, 1, 0]  # 60 MiB at loss 1 is beaten by 50 MiB at loss 1
    assert pareto([10], [0.0]) == [0]


def test_a_bar_of_time_is_the_paired_ratio_with_its_interval() -> None:
    logs = {"log_ratio": math.log(2), "log_ratio_low": math.log(1.5), "log_ratio_high": math.log(3)}
    assert over_reference(row("a", "latency.decode", 9.0, detail=logs)) == pytest.approx((2, 1.5, 3))
    assert over_reference(row("a", "latency.decode", 9.0, detail={**logs, "log_ratio_usable": False})) == (2, 2, 2)
    assert all(map(math.isnan, over_reference(row("a", "latency.decode", 9.0, detail={}))))


def test_labels_overlap_neither_each_other_nor_points_nor_lines() -> None:
    generator = random.Random(3)
    points = [(generator.uniform(60, 740), generator.uniform(60, 440)) for _ in range(20)]
    points += [(400.0, 250.0)] * 4  # coinciding methods
    sizes = [(generator.uniform(30, 120), 13.0) for _ in points]
    frame, line = Box(0, 0, 800, 500), Box(0, 200, 800, 204)
    boxes = place(points, sizes, frame, [line])
    for one, other in itertools.combinations(boxes, 2):
        assert one.overlap(other) == pytest.approx(0, abs=1e-6)
    for box, size in zip(boxes, sizes, strict=True):
        assert (box.right - box.left, box.top - box.bottom) == pytest.approx(size)
        assert box.overlap(frame) == pytest.approx(box.area)
        assert box.overlap(line) == pytest.approx(0, abs=1e-6)
        assert all(box.distance(point) > 0 for point in points)


def test_a_label_stands_nearer_to_its_own_point() -> None:
    boxes = place([(100, 100), (112, 100)], [(40, 12), (40, 12)], Box(0, 0, 400, 200))
    assert boxes[0].distance((100, 100)) <= boxes[0].distance((112, 100))
    assert boxes[1].distance((112, 100)) <= boxes[1].distance((100, 100))


def test_a_label_too_large_for_the_frame_is_still_placed() -> None:
    (box,) = place([(5, 5)], [(900, 20)], Box(0, 0, 100, 100))
    assert box.right - box.left == pytest.approx(900)


def test_names_do_not_move_the_axes_that_they_were_placed_by() -> None:
    with style():
        canvas, (axes,) = canvas_of(4.0, "crowded")
        spots = [(100.0, 0.0)] * 12 + [(101.0, 0.5)]
        for x, y in spots:
            axes.plot(x, y, "o")
        axes.margins(x=0.12, y=0.12)
        canvas.draw_without_rendering()
        before = (*axes.get_xlim(), *axes.get_ylim())
        label(canvas, axes, [f"a long name {place}" for place in range(13)], spots, [(at, at) for at in spots])
        leaders = [line for line in axes.lines if len(np.asarray(line.get_xdata())) == 2]
        assert leaders
        canvas.draw_without_rendering()
        assert (*axes.get_xlim(), *axes.get_ylim()) == before
