"""Measured pages: what a script measured is kept as JSON beside the page, and the page is a pure function of it.

`python -m studies.FOLDER.SCRIPT -o docs/studies/NAME.md`, run from the repository's root, measures and writes the page,
docs/studies/data/NAME.json and the page's plots; without -o the page goes to stdout. `--data
docs/studies/data/NAME.json` renders what was measured before.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.core import environment
from harness.core.errors import BadFile
from harness.core.files import replace_text
from harness.core.values import decode_number, encode
from harness.methods.quantizing import compiled

KEPT = ("torch", "transformers", "bitsandbytes", "numpy")  # versions that a page names


@dataclass(frozen=True)
class Document:
    """One page.

    Attributes:
        name: of the page and its data.
        title: its heading.
        measure: (names of models, or () for the page's own) -> results, JSON values and non-finite floats only.
        render: results -> markdown below the heading.
        plots: results -> SVG by file name, to lie beside the page.
        script: module below `studies` that makes it, "quantizers.nf4".
        folder: of the page.
    """

    name: str
    title: str
    measure: Callable[[Sequence[str]], Mapping[str, Any]]
    render: Callable[[Mapping[str, Any]], str]
    plots: Callable[[Mapping[str, Any]], Mapping[str, str]] = lambda results: {}
    script: str = field(kw_only=True)
    folder: str = field(default="docs/studies", kw_only=True)

    @property
    def command(self) -> str:
        """What makes the page."""
        return f"python -m studies.{self.script} -o {self.folder}/{self.name}.md"


def world(seconds: float) -> dict[str, Any]:
    """Date, machine and versions of a measurement that took so long."""
    import torch

    now = environment.capture("cpu", torch.get_num_threads(), {"loops": compiled.runner()})
    kept = {name: getattr(now, name) for name in ("cpu", "instructions", "threads", "python", *KEPT)}
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    return {**kept, "date": today, "minutes": round(seconds / 60, 1)}


def machine(made: Mapping[str, Any]) -> str:
    """Where a world was measured: threads, processor, instructions."""
    return f"{made['threads']} thread{'s' * (made['threads'] != 1)} of an {made['cpu']} ({made['instructions']})"


def page(document: Document, data: Mapping[str, Any]) -> str:
    """The whole page from what was kept: {"world": ..., "results": ...}; a world's `note` says what else to know."""
    made = data["world"]
    versions = ", ".join(f"{name} {made[name]}" for name in KEPT if made[name])
    return (
        f"# {document.title}\n\n"
        f"Made by `{document.command}` on {made['date']}, in {made['minutes']} minutes on {machine(made)}; "
        f"Python {made['python']}, {versions}. Every figure is rendered from "
        f"[what the command measured](data/{document.name}.json)."
        f"{' ' + made['note'] if made.get('note') else ''}\n\n"
        f"{document.render(data['results']).strip()}\n"
    )


def read(path: Path) -> dict[str, Any]:
    """What a script kept; BadFile where it is not that."""
    try:
        data: dict[str, Any] = _decoded(json.loads(path.read_text(encoding="utf-8")))
        if data.keys() == {"world", "results"}:
            return data
    except (OSError, ValueError, AttributeError) as error:
        raise BadFile(f"{path} cannot be read as a page's data ({error}): make the page again with -o") from error
    raise BadFile(f"{path} holds no 'world' and 'results': make the page again with -o")


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decoded(item) for key, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else decode_number(value)


def text_of(data: Mapping[str, Any]) -> str:
    """The data as it is kept: strict JSON, one figure a line."""
    return json.dumps(encode(data), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def run(document: Document, arguments: Sequence[str] | None = None) -> int:
    """The script's command line."""
    parser = argparse.ArgumentParser(description=document.title, epilog=f"the page's command: {document.command}")
    parser.add_argument("-o", "--output", type=Path, metavar="PAGE.md", help="write page, data and plots; else stdout")
    parser.add_argument("--data", type=Path, metavar="DATA.json", help="render what was measured before")
    parser.add_argument("--models", default="", metavar="A,B", help="measure these only (the page's own otherwise)")
    chosen = parser.parse_args(arguments)
    if chosen.data:
        data = read(chosen.data)
    else:
        start = time.monotonic()
        results = document.measure([name for name in chosen.models.split(",") if name])
        data = {"world": world(time.monotonic() - start), "results": results}
    kept = text_of(data)
    rendered = page(document, _decoded(json.loads(kept)))  # from what is kept, so that a reader gets the same page
    if chosen.output is None:
        print(rendered, end="")
        return 0
    replace_text(chosen.output, rendered)
    replace_text(chosen.output.parent / "data" / f"{document.name}.json", kept)
    for name, svg in document.plots(data["results"]).items():
        replace_text(chosen.output.parent / name, svg)
    return 0
