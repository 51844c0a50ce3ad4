"""The page docs/studies/upgrades.md: what three releases of bitsandbytes and two of transformers change, measured here.

`python -m studies.upgrades.upgrades -o docs/studies/upgrades.md` measures upgrades and a package with a seeded fault,
keeps every side's measurements under docs/studies/data/upgrades, and writes the page from them. `--only NAME` measures
one of them anew, `--render` none.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness import __main__ as commands
from harness.core.files import replace_text
from harness.report import read_report
from harness.run.upgrade.driver import report_on
from studies.upgrades import seeded

HOME = Path(__file__).parents[2]
DATA = HOME / "docs" / "studies" / "data" / "upgrades"


@dataclass(frozen=True)
class Upgrade:
    """One measured upgrade: its sides, as typed, and what the page says of it before its report."""

    name: str
    title: str
    sides: tuple[str, ...]
    why: str
    options: tuple[str, ...] = ()
    methods: str = "bnb-int8,bnb-fp4,bnb-nf4,bnb-nf4-dq"

    @property
    def command(self) -> str:
        """As a user would type it."""
        chosen = ["--models smollm2-135m", f"--methods {self.methods}", *self.options]
        return " ".join(["python -m harness upgrade", *self.sides, *chosen])


BITSANDBYTES = Upgrade(
    "bitsandbytes",
    "bitsandbytes 0.48.2, 0.49.2, 0.50.2",
    ("bitsandbytes==0.48.2", "bitsandbytes==0.49.2", "bitsandbytes==0.50.2"),
    """\
*Why*: 0.48 has no compiled 4-bit code for CPUs: it dequantizes a whole weight in PyTorch at every product, which is
most of a decoded token's time. 0.49 brought compiled dequantization and, on processors with AVX512-BF16, weights that
the first forward packs into another layout and a product of its own in bf16. Decoding gains most, since nothing hides
the dequantization there; a prompt of 128 tokens gains less. Packing also explains the behaviour: bf16 scales whatever
the compute dtype, double quantization undone, odd shapes that fail, and a `state_dict()` that gives the scales back
transposed ([told upstream](../upstream/bitsandbytes-cpu-packing.md)). 0.50 rounds 4-bit codes by thresholds rather than
to the nearest level, which moves single codes of FP4 and leaves int8 alone.""",
)
SPEED = Upgrade(
    "speed",
    "bitsandbytes once more: times with nothing beside them",
    BITSANDBYTES.sides,
    """\
The times above were taken on a machine that did other work; these were not. `evaluation` is one window of 512 tokens
without a cache: the longest product, where a dense kernel on a dequantized weight is at its best.""",
    ("--metrics latency.prefill,latency.decode,latency.evaluation", "--max-tokens 512"),
    "bnb-nf4",
)
TRANSFORMERS = Upgrade(
    "transformers",
    "transformers 5.18.0 and 5.23.0",
    ("transformers==5.18.0", "transformers==5.23.0"),
    """\
*Why these*: 5.18.0 is an older release whose requirements the lock meets; 5.13.0 and older want an older
`huggingface_hub`, so that more than one package would have to differ, which `upgrade` refuses in one line.""",
    ("--max-tokens 2048",),
    "bnb-int8,bnb-nf4",
)
SEEDED = Upgrade(
    "seeded",
    "A package with a seeded fault",
    ("bitsandbytes==0.50.2", "bitsandbytes-0.50.2+seeded"),
    """\
The second side is a wheel made of the installed bitsandbytes by `studies/upgrades/seeded.py`: the scales of LLM.int8
are one per cent too large, everything else is untouched. `bnb-int8` must be accused and nothing else.""",
    ("--metrics invariant,perplexity,memory", "--max-tokens 2048"),
)
UPGRADES = (BITSANDBYTES, SPEED, TRANSFORMERS, SEEDED)
INTRODUCTION = """\
# What upgrades change

Made by `python -m studies.upgrades.upgrades -o docs/studies/upgrades.md`; every table below is rendered from what it
measured, kept under `docs/studies/data/upgrades`. Each section is the report of one command, which stands at its end.
Exit statuses: 0 no harm, 1 harm, 3 undecided. {minutes}
"""


def measure(upgrade: Upgrade) -> None:
    """Run the command and keep its sides' measurements."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report"
        sides = list(upgrade.sides)
        if upgrade is SEEDED:
            sides[1] = str(seeded.wheel(Path(scratch)))
        command = upgrade.command.split()[3:]
        arguments = [command[0], *sides, *command[1 + len(sides) :], "--report-dir", str(report)]
        status = commands.main(arguments)
        minutes = (time.monotonic() - started) / 60
        target = DATA / upgrade.name
        shutil.rmtree(target, ignore_errors=True)
        order = [folder for side in sides for folder in report.iterdir() if _label(folder) == Path(side).name]
        for number, folder in enumerate(order):
            keep(folder, target / f"{number}-{folder.name}")
        facts = {"status": status, "minutes": round(minutes, 1)}
        replace_text(target / "run.json", json.dumps(facts, indent=1) + "\n")


def _label(folder: Path) -> str:
    side = folder / "side.json"
    return str(json.loads(side.read_text())["label"]) if side.is_file() else ""


def keep(side: Path, target: Path) -> None:
    """One side's measurements without the census of every row and without losses that no row names."""
    session = read_report(side)
    rows = [replace(row, census={}) for row in session.rows]
    replace_text(target / "measurements.jsonl", "".join(row.to_json() + "\n" for row in rows))
    replace_text(target / "plan.json", json.dumps([case.told() for case in session.planned]) + "\n")
    for name in ("environments.json", "side.json"):
        shutil.copyfile(side / name, target / name)
    (target / "nll").mkdir()
    for sha in {row.nll for row in rows if row.nll}:
        shutil.copyfile(side / "nll" / f"{sha}.npz", target / "nll" / f"{sha}.npz")


def sides_of(upgrade: Upgrade) -> list[Path]:
    """The kept sides, in order."""
    return sorted(path for path in (DATA / upgrade.name).iterdir() if path.is_dir())


def page() -> str:
    """The whole page from what was kept."""
    told = [
        f"{upgrade.title}: {json.loads((DATA / upgrade.name / 'run.json').read_text())['minutes']} minutes"
        for upgrade in UPGRADES
        if (DATA / upgrade.name).is_dir()
    ]
    absent = [f"`--only {upgrade.name}`" for upgrade in UPGRADES if not (DATA / upgrade.name).is_dir()]
    minutes = f"Time taken, with other work beside it: {'; '.join(told)}."
    parts = [INTRODUCTION.format(minutes=minutes + (f" Not measured yet: {', '.join(absent)}." if absent else ""))]
    for upgrade in UPGRADES:
        if (DATA / upgrade.name).is_dir():
            text, _ = report_on(sides_of(upgrade), HOME / "baselines", upgrade.command)
            text = re.sub(r"^#", "##", text.partition("\n")[2].strip(), flags=re.MULTILINE)
            parts.append(f"## {upgrade.title}\n\n{upgrade.why}\n\n{text}\n")
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, metavar="PAGE.md", help="default: stdout")
    parser.add_argument("--only", choices=[upgrade.name for upgrade in UPGRADES], help="measure this one alone")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    chosen = parser.parse_args(arguments)
    for upgrade in UPGRADES:
        if not chosen.render and chosen.only in (None, upgrade.name):
            measure(upgrade)
    text = page()
    if chosen.output:
        replace_text(chosen.output, text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
