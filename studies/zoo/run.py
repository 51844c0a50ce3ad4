"""docs/studies/zoo.md: every causal architecture of the installed transformers, small, through the harness.

`python -m studies.zoo.run --tenth` examines every tenth of them and fails on a difference that the page does not name;
`--models gemma2,mpt` examines these.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from harness.methods.quantizing import bnb
from harness.report import markup
from studies import pages
from studies.zoo import examine, small

LIMIT = 240.0  # seconds of a family: most take some five
TENTH = 10
PAGE_DATA = Path("docs/studies/data/zoo.json")
INTRODUCTION = f"""\
Does a family measure rightly here? Every class of transformers' mapping of causal models is built with random weights
({small.LAYERS} layers, width {small.WIDTH}, a vocabulary of {small.VOCABULARY}), saved, and measured on
{examine.TOKENS} tokens under the reference, `{examine.OURS}`, `{examine.FOUR_BITS}`, `bnb-int8` and `bnb-nf4`, each in
a process of its own. Weights are random, so a perplexity means nothing in itself. What is held:

- *plain loop*: the reference's perplexity is that of a loop of six lines in transformers, within {examine.CLOSE:g};
- *bytes*: `memory.parameters`, `memory.footprint` and `memory.storage` are as predicted, to the byte, of each method;
- *batch*: losses of windows of many lengths at batch 3, 7 and auto are those of each alone, within {examine.MEAN:g} nat
  in the mean and {examine.TOKEN:g} a token;
- *nothing*: a method of ours that stores weights as they are gives the reference's losses bit for bit;
- *decode*: a token behind a cached prompt is predicted as in the whole forward, also after the cache is rewound;
- *saved*: what a quantized model saves (state_dict; `save_pretrained` of bitsandbytes) gives its logits again.

A check passes where nothing stands under *what is not so*. `--` is a figure that the harness refuses, in one line."""


def child(family: str, connection: Connection) -> None:
    """Examine one family and tell what is known after each step."""
    examine.examine(family, connection.send)
    connection.close()


def examined(family: str) -> dict[str, Any]:
    """What came of one family's process, whatever became of it."""
    context = multiprocessing.get_context("fork")  # of a process that has imported everything and run nothing
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(family, there))
    process.start()
    there.close()
    found: dict[str, Any] = vars(examine.Found(family, small.families()[family]))
    end, how = time.monotonic() + LIMIT, ""
    try:
        while not how and here.poll(max(0.0, end - time.monotonic())):
            found = here.recv()
        how = f"it took more than {LIMIT:g} seconds"
        process.kill()
    except EOFError:
        process.join()
        how = "" if process.exitcode == 0 else f"its process ended with exit status {process.exitcode}"
    process.join()
    if how and found["plain"] is None:
        found["why"] = how
    elif how:
        found["faults"] = {**found["faults"], "process": how}
    return found


def measure(families: Sequence[str]) -> dict[str, Any]:
    """Every family asked for, or all of the mapping."""
    bnb.preload()
    importlib.import_module("harness.methods.quantizing.compiled")
    gc.collect()
    gc.freeze()  # what is imported stays: a child that collects garbage need not look at it
    rows = []
    for family in families or small.families():
        start = time.monotonic()
        rows.append(examined(family))
        words = [f"{name}: {text}" for name, text in troubles(rows[-1]).items()]
        told = rows[-1]["why"] or "; ".join(words) or "as it should"
        print(f"{family}: {told} ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)
    return {"rows": rows}


def troubles(row: Mapping[str, Any]) -> dict[str, str]:
    """What of a row is not as it should be: refusals by the harness, and what differs."""
    refused = {} if not row["causal"] else row["refused"]
    return {**refused, **row["faults"], **row["notes"]}


def refusals(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Families whose plain loop runs as a causal model's, and which the reference or our method refuses."""
    both = ("fp32", examine.OURS)
    return [
        row["family"] for row in rows if row["causal"] and any(row["perplexity"].get(name) is None for name in both)
    ]


def render(results: Mapping[str, Any]) -> str:
    """The page: counts, the table, what could not be built."""
    rows = results["rows"]
    running = [row for row in rows if not row["why"]]
    causal = [row for row in running if row["causal"]]
    refused = refusals(causal)
    ahead = [row["family"] for row in running if not row["causal"]]
    fine = [row for row in causal if not troubles(row)]
    share = len(refused) / max(1, len(causal))
    head = (
        f"**{len(rows)} families: {len(running)} run small in a plain loop, of which {len(ahead)} look ahead and are "
        f"refused as they should be; of {len(causal)} causal ones the harness refuses {len(refused)} ({share:.1%}) "
        f"under the reference or `{examine.OURS}`, and {len(fine)} are as they should be in every check.**"
    )
    named = f"\n\nRefused: {', '.join(f'`{name}`' for name in refused)}." if refused else ""
    looking = f"\n\nLook ahead: {', '.join(f'`{name}`' for name in ahead)}." if ahead else ""
    table = markup.table(
        ("family", "class", "attention", "plain loop", *examine.METHODS, "what is not so"),
        [
            (
                f"`{row['family']}`",
                row["architecture"],
                row["attention"] or "--",
                figure(row["plain"]),
                *(figure(row["perplexity"].get(method)) for method in examine.METHODS),
                told(row),
            )
            for row in running
        ],
        words=(0, 1, 2, 4 + len(examine.METHODS)),
    )
    out = [row for row in rows if row["why"]]
    missing = markup.table(
        ("family", "class", "why"), [(f"`{row['family']}`", row["architecture"], plain(row["why"])) for row in out]
    )
    behind = f"\n\n## Not built small\n\n{missing}" if out else ""
    return f"{INTRODUCTION}\n\n{head}{named}{looking}\n\n## Families\n\n{table}{behind}"


def figure(value: float | None) -> str:
    """A perplexity, short."""
    return "--" if value is None else f"{value:.6g}"


def told(row: Mapping[str, Any]) -> str:
    """A row's troubles, those of equal words together."""
    if not row["causal"]:
        return "looks ahead"
    by_words: dict[str, list[str]] = {}
    for name, text in troubles(row).items():
        by_words.setdefault(plain(text), []).append(name)
    return "; ".join(f"{', '.join(names)}: {words}" for words, names in by_words.items())


def plain(text: str) -> str:
    """Words of a library without what a table or a machine would trip over."""
    return " ".join(text.replace("|", "/").replace("<", "(").replace(">", ")").split())


DOCUMENT = pages.Document("zoo", "The zoo: every causal architecture", measure, render, script="zoo.run")


def tenth() -> int:
    """Every tenth family; exit status 1 where one shows what the page's data does not know."""
    families = list(small.families())[::TENTH]
    known = {row["family"]: row for row in pages.read(PAGE_DATA)["results"]["rows"]}
    new = {}
    for row in measure(families)["rows"]:
        before = known[row["family"]]
        unknown = troubles(row).keys() - troubles(before).keys()
        if unknown or (row["why"] and not before["why"]):
            new[row["family"]] = row["why"] or {name: troubles(row)[name] for name in unknown}
    for family, what in new.items():
        print(f"{family}: {what}, which {PAGE_DATA} does not know", file=sys.stderr)
    print(f"{len(families)} families, {len(new)} with something new")
    return 1 if new else 0


if __name__ == "__main__":
    sys.exit(tenth() if sys.argv[1:] == ["--tenth"] else pages.run(DOCUMENT))
