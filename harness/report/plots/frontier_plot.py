"""The front as a plot: quality over bytes, the colour saying what the data say of a method."""

from __future__ import annotations

import io
from collections.abc import Sequence

from harness.core.text import MIB, visible
from harness.report.frontier import CENTRE, Standing
from harness.report.plots.draw import BLUE, GREY, VERMILION, canvas_of, label, plain, style

COLOURS = {"front": BLUE, "undecided": VERMILION, "dominated": GREY}
MEANINGS = {
    "front": "front: no other dominates it",
    "undecided": "undecided: the data cannot separate it from a better one",
    "dominated": "dominated",
}


def svg(title: str, places: Sequence[Standing]) -> str:
    """One model's plot; methods without bytes are left out."""
    from matplotlib.lines import Line2D

    shown = [place for place in places if place.point.bytes is not None and place.point.delta is not None]
    with style():
        canvas, (axes,) = canvas_of(5.2, title)
        spots, names, lines = [], [], []
        for place in shown:
            point = place.point
            x, y = (point.bytes or 0) / MIB, point.delta or 0.0
            low, high = point.interval or CENTRE
            colour = COLOURS[place.kind]
            errors = [[max(0.0, y - low)], [max(0.0, high - y)]] if point.interval else None
            axes.errorbar(x, y, yerr=errors, fmt="o", ms=6.5, color=colour, ecolor=GREY, lw=1, capsize=2)
            spots.append((x, y))
            names.append(plain(point.method))
            lines.append(((x, low), (x, high)))
        axes.set_xlabel("storage, MiB (2^20 bytes; lower is better)")
        axes.set_ylabel("ln perplexity over the reference's, nat (lower is better)")
        axes.margins(x=0.12, y=0.12)
        handles = [
            Line2D([], [], ls="none", marker="o", color=COLOURS[word], ms=6.5, label=MEANINGS[word]) for word in COLOURS
        ]
        canvas.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8.5)
        label(canvas, axes, names, spots, lines)
        buffer = io.StringIO()
        metadata = {"Date": None, "Creator": None, "Title": visible(title)}
        canvas.savefig(buffer, format="svg", metadata=metadata)
        return buffer.getvalue()
