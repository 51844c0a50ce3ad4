"""docs/reference: pages that the code itself fills in, so that they cannot fall behind it.

`python -m studies.reference` writes them; `studies/tests/test_reference.py` holds them to what the code says.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from harness import __main__ as commanding
from harness.core.contracts import DEFAULT_DTYPES, Member, Method, Metric, Window
from harness.core.files import replace_text
from harness.core.options import SETTINGS, Declared
from harness.core.records import Case, Row, Verdict
from harness.inputs.models import names
from harness.inputs.texts import corpora
from harness.inputs.texts.protocols import AGGREGATES, FORMS, led
from harness.judge.verdicts import fails
from harness.plugin import MARKS
from harness.results import directory

HOME = Path(__file__).parents[1] / "docs" / "reference"
MADE = "This page is written by `python -m studies.reference`, from {}."


def table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A markdown table; what would break a cell is escaped."""
    written = [head, [":--"] * len(head), *lines]
    cells = ([" ".join(str(cell).split()).replace("|", r"\|") for cell in line] for line in written)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def code(text: object) -> str:
    """A word as it is typed."""
    return f"`{text}`"


def prose(documentation: str) -> str:
    """A docstring as markdown: its headings below ours, its columns kept in place."""
    text = re.sub(r"^# ", "#### ", inspect.cleandoc(documentation).replace("\\\n", ""), flags=re.MULTILINE)
    parts = []
    for part in text.split("\n\n"):
        columns = not part.startswith(("|", "    ")) and re.search(r"\S {3,}\S", part)
        parts.append(f"```text\n{part}\n```" if columns else part)
    return "\n\n".join(parts)


def modules(package: str) -> Iterator[ModuleType]:
    """The files of a room, by name; its workshops are left out."""
    for info in sorted(pkgutil.iter_modules(importlib.import_module(package).__path__), key=lambda info: info.name):
        if not info.ispkg:
            yield importlib.import_module(f"{package}.{info.name}")


# methods


def methods() -> str:
    """Every method that ships, with its arguments and what it computes."""
    found: list[tuple[ModuleType, Sequence[Method]]] = [
        (module, module.METHODS if hasattr(module, "METHODS") else (module.METHOD,))
        for module in modules("harness.methods")
    ]
    found.sort(key=lambda one: (not one[1][0].dtype, not one[1][0].core))  # references, the core list, the others
    overview = [
        (f"[`{method.name}`](#{method.name})", method.summary, f"{method.bits:g}", _planned(method), _needs(method))
        for _, several in found
        for method in several
    ]
    return "\n\n".join(
        [
            "# Methods",
            "Here you find every quantization method by the name that `--methods` takes, what it stores and computes, "
            f"and which arguments it has. {MADE.format('the files in `harness/methods/`')}",
            "A method turns a model's weights into fewer bits. A *reference* leaves them as they are, in one number "
            "format; every other method is compared with it. You write a method as `NAME` or `NAME:ARG:key=value`:",
            "```console\n"
            "$ pytest --methods nf4                                  # with its defaults\n"
            "$ pytest --methods nf4:block=128,absmax-int8:attention  # other blocks; attention only\n"
            "```",
            "*Bits* are those of one code, without scales; a report counts the scales too. *Planned* says when a "
            "session measures a method: by default, or only when you name it (`--methods all-installed` names every "
            "one whose packages are there). A method that needs a package which is not installed gives a `missing` "
            "row with the `pip` command.",
            table(("method", "what it is", "bits", "planned", "needs"), overview),
            "## Arguments that many methods share",
            _shared(),
            *(_of_file(module, several) for module, several in found),
        ]
    )


def _planned(method: Method) -> str:
    return "as the reference, or named" if method.dtype else "by default" if method.core else "when named"


def _needs(method: Method) -> str:
    return ", ".join(map(code, method.requires)) or "–"


def _shared() -> str:
    dtypes = " and ".join(f"`{dtype}` on {device}" for device, dtype in DEFAULT_DTYPES.items())
    lines = [
        ("`dtype=`", "`fp32`, `bf16`, `fp16`", f"number format of what is not quantized; by default {dtypes}"),
        (
            "a scope",
            "`linear`, `attention`, `mlp`, `all`",
            "which weights: the decoder's projections (the default), "
            "half of them, or every weight, embeddings and head too",
        ),
        ("`layers=`", "`3`, `0-11`", "these decoder layers only, the last one included"),
        ("`names=`", "a glob such as `*.q_proj`", "modules of such names only"),
    ]
    return table(("argument", "values", "meaning"), lines)


def _of_file(module: ModuleType, several: Sequence[Method]) -> str:
    documentation = prose(module.__doc__ or "")
    if len(several) == 1:
        return f"## `{several[0].name}`\n\n{_of_method(several[0])}\n\n{documentation}"
    family = module.__name__.rpartition(".")[2]
    parts = [f"## {family}", *(f"### `{one.name}`\n\n{_of_method(one)}" for one in several)]
    parts += [f"### {family} in detail", documentation]
    return "\n\n".join(parts)


def _of_method(method: Method) -> str:
    said = [f"{method.summary}."]
    if method.scoped:
        said.append("It takes a scope.")
    if method.calibrated:
        said.append("It looks at a calibration text, never at the measured one.")
    if not method.batch_invariant:
        said.append("A row's figures depend on its neighbours, so it is measured at batch 1.")
    if method.grid:
        said.append(f"Its codes can represent the grid `{method.grid}` exactly; the report marks models stored so.")
    said += [f"On {device}: {note}." for device, note in method.notes.items()]
    lines = [
        (code(f"{name}="), code(parameter.default), ", ".join(map(code, parameter.choices)) or "any", parameter.help)
        for name, parameter in method.parameters.items()
    ]
    arguments = f"\n\n{table(('argument', 'default', 'values', 'meaning'), lines)}" if lines else ""
    return " ".join(said) + arguments


# metrics

UNITS = {
    "ppl": "perplexity a token: e to the power of the mean loss",
    "ppl/word": "perplexity a word",
    "ppl/byte": "perplexity a byte",
    "bit/byte": "bits that a byte of text takes",
    "nat": "difference of natural logarithms; 0.01 nat is 1%",
    "share": "a part of the whole, 0 to 1",
    "probability": "0 to 1",
    "token": "tokens",
    "B": "bytes; reports show MiB, 1,048,576 bytes",
    "s": "seconds",
    "": "a plain number",
}
FAMILIES = {
    "perplexity": "How well the model predicts a text. Perplexity 20 means: as unsure as between 20 equally likely "
    "tokens. `perplexity.delta` is what a method costs against the reference, on the same tokens.",
    "divergence": "How far the method's predictions are from the reference's, token by token, whatever the text says. "
    "It sees small faults that perplexity does not.",
    "memory": "Bytes that the model takes: of its tensors, exactly, and of the process at its peak.",
    "latency": "How long the model takes. What counts is the ratio to the reference, timed in turn with it in one "
    "session; a time by itself belongs to one machine and one moment.",
    "invariant": "Behaviour that must hold whatever the version of a library: a model is the same behind a save and a "
    "load, an odd shape works, and so on. `pytest -m invariant` runs them.",
}


def metrics() -> str:
    """Every metric that ships, with units and definitions."""
    found: list[tuple[ModuleType, Metric]] = [(module, module.METRIC) for module in modules("harness.metrics")]
    units = dict.fromkeys(member.unit for _, metric in found for member in metric.members)
    return "\n\n".join(
        [
            "# Metrics",
            "Here you find every number that a report can hold: its name for `--metrics`, its unit, which way is "
            f"better, and its formula. {MADE.format('the files in `harness/metrics/`')}",
            "A *family* has several *members*. Name a family (`--metrics perplexity`) to get the members that are "
            "planned with it, name a member (`--metrics memory.storage`) to get it alone, or say `--metrics all`.",
            "## Units",
            table(("unit", "means"), ((code(unit) if unit else "none", UNITS.get(unit, unit)) for unit in units)),
            *(_of_family(module, metric) for module, metric in found),
        ]
    )


def _of_family(module: ModuleType, metric: Metric) -> str:
    lines = [
        (code(one.name), code(one.unit) if one.unit else "none", one.better, _compared(metric, one), _when(metric, one))
        for one in metric.members
    ]
    parts = [
        f"## {metric.family}",
        FAMILIES.get(metric.family, ""),
        table(("member", "unit", "better", "compared", "planned"), lines),
        f"### How {metric.family} is defined",
        prose(module.__doc__ or ""),
    ]
    return "\n\n".join(filter(None, parts))


def _compared(metric: Metric, member: Member) -> str:
    if metric.apart:
        return "with its limit, and known faults"
    if member.exact:
        return "byte for byte, everywhere"
    if member.timed:
        return "as a ratio to the reference, timed in turn"
    return "with the reference on the same tokens" if member.paired else "with its record"


def _when(metric: Metric, member: Member) -> str:
    under = f", under {', '.join(map(code, member.protocols))}" if member.protocols else ""
    if metric.apart:
        return f"with `-m {metric.family}`"
    if member.needs_file:
        return "for methods whose product is a file"
    return ("with its family" if member.core else "when named, or with `all`") + under


# protocols

BOS = -1  # in the pictures' made-up token ids, which are positions of a text
TOYS: Mapping[str, tuple[tuple[int, ...], int, int]] = {  # tokens of each document, width, step
    "chunk": ((14,), 5, 5),
    "stride": ((14,), 6, 3),
    "gptq": ((14,), 6, 6),
    "rolling": ((8, 6), 4, 4),
    "half": ((14,), 7, 7),
    "sentence": ((6, 3, 5), 5, 5),
}
CELL, LINE, LABEL = 30, 40, 96  # pixels: a token's width, a row's height, room for its name
SCORED, READ, LEAD = "#1b6ca8", "#d8e2ea", "#f2b33d"


def windows_of(name: str) -> tuple[list[int], list[Window]]:
    """Where documents end in a toy text, and its windows under a protocol with a BOS before whatever it may stand."""
    lengths, width, step = TOYS[name]
    ends = [sum(lengths[: count + 1]) for count in range(len(lengths))]
    documents = [np.arange(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    form = FORMS[name]
    fed = [led(documents[0], BOS)] if form.bos_once else documents
    return ends, form.build(fed, width, step, BOS)


def picture(name: str) -> str:
    """A protocol's windows over a toy text as SVG: what is read, what is scored, where BOS stands."""
    ends, windows = windows_of(name)
    width, height = LABEL + (ends[-1] + 2) * CELL, (len(windows) + 2) * LINE
    drawn = [_label("text", 0), *(_cell(at, 0, "none", str(at + 1)) for at in range(ends[-1]))]
    for end in ends[:-1]:
        x = LABEL + (end + 1) * CELL
        drawn.append(f'<line x1="{x}" y1="4" x2="{x}" y2="{height - LINE}" stroke="#b3261e" stroke-dasharray="4 3"/>')
    for row, window in enumerate(windows, start=1):
        drawn.append(_label(f"window {row}", row))
        first_scored = len(window.ids) - window.scored
        for place, token in enumerate(map(int, window.ids)):
            if token == BOS:
                behind = int(window.ids[place + 1]) if place + 1 < len(window.ids) else 0
                drawn.append(_cell(behind - 1, row, LEAD, "B"))
            else:
                drawn.append(_cell(token, row, SCORED if place >= first_scored else READ, str(token + 1)))
    y = (len(windows) + 1) * LINE + 8
    for place, (fill, told) in enumerate(((SCORED, "scored"), (READ, "read only"), (LEAD, "BOS"))):
        x = LABEL + CELL + place * 4 * CELL
        drawn.append(f'<rect x="{x}" y="{y}" width="16" height="16" fill="{fill}" stroke="#51606b"/>')
        drawn.append(f'<text x="{x + 24}" y="{y + 13}">{told}</text>')
    body = "\n".join(drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="13" role="img"><title>The windows of {name}</title>'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def _label(text: str, row: int) -> str:
    return f'<text x="8" y="{row * LINE + 26}">{text}</text>'


def _cell(at: int, row: int, fill: str, text: str) -> str:
    x, y = LABEL + (at + 1) * CELL, row * LINE + 6
    ink = "#ffffff" if fill == SCORED else "#1d262d"
    return (
        f'<rect x="{x + 1}" y="{y}" width="{CELL - 2}" height="28" rx="3" fill="{fill}" stroke="#51606b"/>'
        f'<text x="{x + CELL // 2}" y="{y + 19}" text-anchor="middle" fill="{ink}">{text}</text>'
    )


def protocols() -> str:
    """Every protocol with a picture of its windows."""
    parts = [
        "# Protocols",
        "Here you see, for each protocol that `--protocols` takes, which tokens the model reads, which of them are "
        f"scored, and how that becomes one number. {MADE.format('`harness/inputs/texts/protocols.py`')}",
        "A model reads a limited number of tokens at once, so a long text is cut into *windows*. How it is cut moves "
        "the perplexity by more than most methods do: a token with little text before it is hard to guess. So a "
        "perplexity without its protocol means nothing, and every figure here bears one.",
        "`W` is the width of a window, `S` the step to the next one, both in tokens. A width above the model's context "
        "shrinks to the context. *BOS* is a token that some tokenizers put at a text's beginning; where yours adds "
        "none, the windows are those of the pictures without it. `--max-tokens` reads the first so many tokens only.",
        "The pictures are of a toy text; each row is one pass of the model. A *scored* token's loss counts. The model "
        "reads everything before the last token of a window.",
    ]
    for name, form in FORMS.items():
        lengths, width, step = TOYS[name]
        usage = name + ("" if form.width is None else ":W:S" if name == "stride" else ":W")
        toy = f"{name}:{width}:{step}" if name == "stride" else f"{name}:{width}" if form.width else name
        context = "" if form.width else f", for a model that reads {width} tokens at once"
        documents = f"{len(lengths)} documents, parted by dashes" if len(lengths) > 1 else f"{lengths[0]} tokens"
        lines = [
            ("windows", form.windows.format(width="`W`", step="`S`")),
            ("scored", form.scored),
            ("BOS", form.bos or "BOS, else EOS, before every document, whatever the tokenizer adds"),
            ("default", f"`W` is {form.width}" if form.width else "`W` is the model's context"),
            ("becomes one number as", code(AGGREGATES[form.aggregate])),
        ]
        parts += [
            f"## `{usage}`",
            "\n".join(f"- *{name}*: {told}" for name, told in lines),
            f"![The windows of {name}](protocol-{name}.svg)",
            f"*`{toy}` over {documents}{context}.*",
        ]
    return "\n\n".join(parts)


# models and texts

MODELS = {
    "hub": ("`hub:ORG/NAME[@REVISION]`", "a model on the Hugging Face Hub, at a commit, tag or branch"),
    "path": ("`path:DIR`, `path:FILE.gguf`", "a folder with config.json, safetensors and tokenizer, or a GGUF file"),
    "package": ("`package:DIST/FILE`", "a file inside an installed Python package"),
}
TEXTS = {
    "lee": "300 news articles, English (the package gensim)",
    "lee-50": "50 other articles of that collection: what calibrated methods look at",
    "wikitext-2": "WikiText-2 raw, test split (Hub)",
    "synthetic": "a made-up language that the tiny models were trained on",
    "ptb": "your copy of the Penn Treebank's test split, whose licence forbids shipping it",
    "text": "a file of yours: text, or the column `text` of a .csv, .jsonl, .json or .parquet, packed (.gz) or not",
    "text-raw": "a file of yours, as it is, whatever its name says",
    "package": "a file inside an installed Python package",
    "hub": "a dataset on the Hugging Face Hub; split `test` unless named",
}


def inputs() -> str:
    """Every model and text that a name stands for, and where others may come from."""
    known = [
        (
            code(name),
            "in the package"
            if source.startswith("tiny:")
            else f"`{source.partition('/')[0]}/...`"
            if source.startswith("package:")
            else code(source),
        )
        for name, source in names.KNOWN.items()
    ]
    sources = [MODELS[name] for name in names.SOURCES if name in MODELS]
    texts = [
        (code(f"{name}:{kind.argument}" if kind.argument else name), TEXTS.get(name, ""))
        for name, kind in corpora.DATASETS.items()
    ]
    return "\n\n".join(
        [
            "# Models and texts",
            "Here you find what `--models` and `--datasets` take. "
            + MADE.format("`harness/inputs/models/names.py` and `harness/inputs/texts/corpora.py`"),
            "## Models with a name",
            table(("name", "comes from"), known),
            "The embedded model, `smollm2-135m`, comes with a package of its own; a missing one is told with its `pip` "
            "command. The tiny models lie in the package: they are there to try things, not to be read.",
            "## Models from elsewhere",
            table(("write", "reads"), sources),
            "`NAME=SPEC` reads a known name from somewhere else, such as a local copy: `--models gpt2=path:gpt2-copy`. "
            "Names of your own go into [`[tool.harness.models]`](options.md#in-pyprojecttoml).",
            "## Texts",
            table(("write", "reads"), texts),
            "[Measure models and texts of your own](../howto/models-and-texts.md) shows each at work.",
        ]
    )


# options

DECLARED = {
    "models": "a table of names and [specifications](inputs.md#models-from-elsewhere), read relative to this file",
    "datasets": "the same for texts",
    "options": "a table of defaults for the options above, by their short names",
    "methods": "files that hold a `METHOD` of yours",
    "metrics": "files that hold a `METRIC` of yours",
    "claims": "files or folders with [published figures](../claims.md) to judge",
}


def options() -> str:
    """Every option of a session, the marks, and what pyproject.toml may declare."""
    lines = [(code(f"--{one.flag} {one.metavar}".strip()), one.help, one.default or "off") for one in SETTINGS]
    keys = [one.name for one in fields(Declared) if one.name not in ("root", "sources")]
    return "\n\n".join(
        [
            "# Options",
            "Here you find every option of a session, its default, and what your `pyproject.toml` may say in its "
            f"place. {MADE.format('the declarations in `harness/core/options.py`')}",
            "The short names work where your project has a `[tool.harness]` table or the command says "
            "`-p harness.plugin`. Everywhere else only the long ones exist, `--harness-models` for `--models`, so that "
            "other projects' own options are left alone. `python -m harness run` takes the same options.",
            table(("option", "means", "default"), lines),
            "`--regen-all` records what is measured as the new baseline; `--force-regen` records it and fails. `-n N` "
            "(pytest-xdist) shares the work among N processes. All other options are pytest's own, `-k` and `-m` too.",
            "## Marks",
            '`-m` selects cases by what they are: `-m "perplexity and not gpu"`.',
            table(("mark", "selects"), ((code(name), meaning) for name, meaning in MARKS.items())),
            "## In pyproject.toml",
            "Under `[tool.harness]`; an empty table is enough to switch the short names on.",
            table(("key", "holds"), ((code(key), DECLARED.get(key, "")) for key in keys)),
            '```toml\n[tool.harness.models]\nmine = "path:checkpoints/mine"\n\n[tool.harness.datasets]\n'
            'notes = "text:notes.txt"\n\n[tool.harness.options]\nmax-tokens = 4096\n```',
            "To let bare `pytest` measure in a project that has no other tests:",
            '```toml\n[tool.pytest.ini_options]\naddopts = ["--pyargs"]\ntestpaths = ["harness.cases"]\n```',
            "A cloned repository's `[tool.harness]` can run code (`methods`, `metrics`), as its conftest.py can: when "
            "pytest collects there, and under the commands that load models. `report`, `compare`, `frontier`, `merge` "
            "and `rebaseline` run none of it, unless a report names a metric that the harness does not have.",
        ]
    )


# commands


def commands() -> str:
    """Every command of `python -m harness` with its arguments."""
    whole = commanding.parser()
    (group,) = (one for one in whole._actions if isinstance(one, argparse._SubParsersAction))
    told = {one.dest: one.help or "" for one in group._choices_actions}
    parts = [
        "# Commands",
        f"Here you find every command of `{whole.prog}`, which needs no pytest, with its arguments. "
        + MADE.format("its argument parser"),
        table(("command", "what it does"), ((f"[`{name}`](#{name})", told.get(name, "")) for name in group.choices)),
        "What each command's exit status means stands under [Exit statuses](exit-statuses.md).",
    ]
    for name, parser in group.choices.items():
        lines = [_argument(one) for one in parser._actions if not isinstance(one, argparse._HelpAction)]
        said = parser.description or told.get(name, "")
        parts += [f"## {name}", f"{said[:1].upper()}{said[1:].removesuffix('.')}."]
        if lines:
            parts.append(table(("argument", "means"), lines))
    return "\n\n".join(parts)


def _argument(action: argparse.Action) -> tuple[str, str]:
    choices = f" ({', '.join(map(str, action.choices))})" if action.choices else ""
    value = "" if action.nargs == 0 else str(action.metavar or ("WORD" if choices else action.dest.upper()))
    several = " ..." if action.nargs in ("+", "*") else ""
    spelled = f"{', '.join(action.option_strings)} {value}{several}".strip()
    told = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    return code(spelled), f"{told}{choices}"


# verdicts

WORDS: Mapping[Verdict, tuple[str, str]] = {  # what it means; what to do if you meant it
    Verdict.MISSING: ("the case was planned and has no number; the reason stands beside it", "`--allow-missing`"),
    Verdict.INPUT_CHANGED: (
        "the case was recorded, but of another model or other tokens; what differs is named, fact by fact",
        "`--allow-changed-input`, then record anew",
    ),
    Verdict.OUT_OF_BOUND: (
        "it loses more against the reference than its bound, or is not what was predicted",
        "a rule in your `bounds.toml`, with a reason",
    ),
    Verdict.WORSE: (
        "it moved against its record, for the worse; or an exact fact is another",
        "record it anew: `--regen-all`",
    ),
    Verdict.UNUSABLE: (
        "nothing can be decided: too wide an interval, other work beside a timing, a figure that is not finite",
        "measure again",
    ),
    Verdict.NOT_COMPARABLE: (
        "a record exists, and is of another machine, class of device or waiting policy",
        "leave `--require-baselines` out, or record here",
    ),
    Verdict.UNRECORDED: ("there is no record", "leave `--require-baselines` out, or record: `--regen-all`"),
    Verdict.BETTER: ("it moved against its record, for the better", ""),
    Verdict.WITHIN_NOISE: ("it did not move further than such a figure moves from run to run", ""),
    Verdict.SAME: ("bit for bit what was recorded", ""),
    Verdict.WITHIN_BOUND: ("against the reference: it loses no more than its bound", ""),
}


def _fails(word: Verdict) -> str:
    """Whether a case of that verdict fails a session, asked of the judge."""
    case = Case("m", "nf4", "lee", "chunk:512", "perplexity", "cpu")
    value = None if word is Verdict.MISSING else 1.0
    row = Row.of(case, value=value, verdict=word)
    if fails(row, require_baselines=False, allow_missing=False):
        return "yes"
    if fails(row, require_baselines=True, allow_missing=False):
        return "with `--require-baselines`, but for times"
    return "only where the reference's own losses are not finite" if word is Verdict.UNUSABLE else "no"


def verdicts() -> str:
    """The words of a report."""
    lines = [
        (f"**{word}**", WORDS[word][0], _fails(word), WORDS[word][1] or "–")
        for word in sorted(Verdict, key=lambda word: word.severity)
    ]
    return "\n\n".join(
        [
            "# Verdict words",
            "Here you look up a word of a report: what it means, whether it fails your session, and what to do if you "
            f"meant it. {MADE.format('`harness/core/records.py` and the judge')}",
            "Every figure is held against two things: the unquantized *reference*, measured in the same run, and the "
            "*record* of this very case in `baselines/`. A case shows the more severe word of the two. Quality, memory "
            "and speed have a verdict each. The most severe word stands first.",
            table(("word", "means", "fails a session", "if you meant it"), lines),
            "A case that `--stop-early` decided has no figure of its whole text: it is `not comparable`, and fails "
            "only by its bound. [How a verdict is made](../verdicts.md) has the rules.",
        ]
    )


# exit statuses

PYTEST = {
    pytest.ExitCode.OK: "every selected case has a figure, and none fails",
    pytest.ExitCode.TESTS_FAILED: "a case fails, by its verdict or because it is missing",
    pytest.ExitCode.INTERRUPTED: "you pressed Ctrl-C; what was measured is on the disk (`--resume` goes on)",
    pytest.ExitCode.INTERNAL_ERROR: "a fault of pytest or of a plugin; please report it",
    pytest.ExitCode.USAGE_ERROR: "the command line, the project's table or the machine does not fit: one line says how",
    pytest.ExitCode.NO_TESTS_COLLECTED: "nothing was selected (an empty `--shard` counts as done, 0)",
}
COMMANDS = {
    0: "fine: no harm, or done",
    commanding.HARM: "harm: something is worse, out of bound, does not fit, or no explanation was found",
    commanding.USAGE: "usage: one line says what to change",
    commanding.UNDECIDED: "undecided, or cases are missing",
}


def exit_statuses() -> str:
    """What a script can read off an exit status."""
    return "\n\n".join(
        [
            "# Exit statuses",
            "Here you find what a script or a CI job can read off the exit status. "
            + MADE.format("the constants in the code"),
            "## pytest",
            table(("status", "means"), ((int(status), told) for status, told in PYTEST.items())),
            "A session that a signal ends has 128 plus the signal's number, 143 for SIGTERM, as a shell says it.",
            f"## {commanding.parser().prog}",
            table(("status", "means"), COMMANDS.items()),
            "`compare`, `merge` and `upgrade` use all four. `memory --fits` answers 0 or 1. `doctor --recorded` is 0 "
            "where the model is recorded for this class of device, else 1. `explain` is 1 where nothing is found. "
            "`plan` is 1 where something does not fit, `history` where the last run made a figure worse or lost it. "
            "`published` is 0 whatever it finds: a refuted claim is no harm of yours. `run` has pytest's statuses.",
        ]
    )


# files

FILES = {
    directory.REPORT: "the report, in markdown",
    directory.PAGE: "the same to look at in a browser; one file, no network",
    directory.MEASUREMENTS: "one line a case, JSON, with a digest; everything else is made from it",
    directory.PLAN: "every case that was meant",
    directory.ENVIRONMENTS: "machine, versions and switches, by the id that rows name",
    directory.IDENTITIES: "what each model consists of, by the digest that rows name",
    directory.SESSION: "the command, and notes for the reader",
    directory.SHARD: "which part of which plan this is",
    directory.PUBLISHED: "published figures that the session computed again",
    directory.PUBLISHED_PAGE: "the same for a reader",
    directory.SIDE: "of an upgrade: which side this is",
    directory.TROUBLE: "of an upgrade: what went wrong on this side",
}
BASELINES = {
    "MODEL/METHOD.yaml": "exact facts (bytes, layers, token hashes), which hold on every machine",
    "MODEL/METHOD@CLASS.yaml": "losses and times, of one class of devices such as `cpu+avx2`",
    "MODEL/identities.yaml": "what the recorded model consists of",
    "MODEL/nll/": "losses token by token, which a paired comparison needs",
    "bounds.toml": "your rules: what may be lost, and what is noise, each with a reason",
    "known_faults.toml": "faults of libraries that the invariants expect, with versions and a reference",
}


def files() -> str:
    """What lies where."""
    more = sorted(set(directory.TABLES) - FILES.keys())  # a new one is there at once, its words follow
    lines = [
        *((code(name), told) for name, told in FILES.items()),
        *((code(name), "") for name in more),
        (code(f"{directory.LOSSES}/"), "losses token by token, an array a file"),
        ("`*.svg`", "the plots"),
    ]
    return "\n\n".join(
        [
            "# Files",
            "Here you find what a session reads and writes, so that you know what to commit, keep and upload. "
            + MADE.format("the names in `harness/results/directory.py`"),
            "## The report directory (`--report-dir`, `harness-report`)",
            "Upload it whole; do not commit it. It belongs to the harness: name a new or empty folder.",
            table(("file", "holds"), lines),
            "## Baselines (`--baselines`, `baselines`)",
            "Commit them: they are what a later session is held against.",
            table(("file", "holds"), ((code(name), told) for name, told in BASELINES.items())),
            "## The cache",
            "Checkpoints that were built from GGUF files, environments of upgrades, compiled loops and locks. It lies "
            "in your user cache, or where `HARNESS_CACHE` says; `python -m harness doctor` names the place, and "
            "`python -m harness cache` lists, sizes and prunes what is there. Deleting "
            "it costs time, never a figure. Models and texts of the Hub lie in the Hub's own cache (`HF_HOME`).",
        ]
    )


PAGES: Mapping[str, Callable[[], str]] = {
    "methods.md": methods,
    "metrics.md": metrics,
    "protocols.md": protocols,
    "inputs.md": inputs,
    "options.md": options,
    "commands.md": commands,
    "verdicts.md": verdicts,
    "exit-statuses.md": exit_statuses,
    "files.md": files,
}


def pages() -> dict[str, str]:
    """Every file of docs/reference by name."""
    written = {name: f"{make().strip()}\n" for name, make in PAGES.items()}
    return written | {f"protocol-{name}.svg": picture(name) for name in FORMS}


def main(arguments: Any = None) -> int:
    """Write the pages."""
    argparse.ArgumentParser(description="write docs/reference from the code").parse_args(arguments)
    for name, text in pages().items():
        replace_text(HOME / name, text)
        print(HOME / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
