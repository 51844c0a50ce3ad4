"""README and the pages of docs: each command in them is one that there is, each link leads somewhere.

A command is run here (`long`), or stands under NEEDS with what it needs that no test has.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness import __main__ as commanding
from harness.core import catalog
from harness.core.contracts import Member
from harness.core.errors import HarnessError
from harness.core.files import cache_dir
from harness.core.options import SETTINGS, Declared
from harness.core.specification import SOURCES, Specification, parse_list, parse_model
from harness.inputs.models import names
from harness.inputs.texts import corpora, protocols
from harness.methods.quantizing import arguments
from harness.plugin import MARKS, as_argument

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
FENCE = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CACHE = cache_dir()
SECONDS = 600  # of a command, at most

NEEDS = {  # what a command needs that no test has, by what is in it; the first that fits
    "a CUDA card": r"-m gpu|-e gpu",
    "a cluster": r"sbatch|--engine ray|-e ray",
    "an index of packages": r"pip install|harness upgrade|\btox\b|-m venv|bin/activate",
    "the Hub": r"--models\s(\S+,)?(gpt2|olmo-1b|phi-3-mini)\b(?!=)|hub:|wikitext-2",
    "files of a reader's own": r"path:|text:|ptb:|paper\.toml|before/|shard-|history runs|checkpoints/|\.sbatch|'?\./",
    "a report of a reader's own": r"harness-report",
    "minutes, with the embedded model": r"harness run(?!.*tiny)|pytest(?!.*(tiny|tests/|test_int6|test_measured))",
    "a project of the reader's own": r"pytest.*harness\.cases",
    "a clone with its own environment": r"\.venv/bin",
}
OWN = {"mine", "int6", "example-int6", "my-int8", "yours"}  # methods that a reader brings along
OTHERS = {"sed", "source", "sbatch"}  # programs that are nobody's of ours


@dataclass(frozen=True)
class Command:
    """One command of a page, as it stands there; `status` is the one that the page says (0 where it says none)."""

    page: str
    text: str
    words: tuple[str, ...]
    status: int

    @property
    def need(self) -> str:
        """What it needs that no test has, or ''."""
        return next((need for need, pattern in NEEDS.items() if re.search(pattern, self.text)), "")


def commands_of(page: Path) -> Iterator[Command]:
    """The commands of a page's blocks: lines behind `$` of a console, every line of a script."""
    for kind, _, body in FENCE.findall(page.read_text()):
        if kind in {"console", "bash", "sh"}:
            joined = body.replace("\\\n", " ")
            for line in joined.splitlines():
                if kind == "console" and line.startswith("$ "):
                    yield from split(page, line[2:])
                elif kind != "console":
                    yield from split(page, line)


def split(page: Path, line: str) -> Iterator[Command]:
    """The commands of one line."""
    said = re.search(r"# exit status (\d)$", line)
    for part in re.split(r"&&|;", line.partition("  #")[0]):
        text = re.sub(r"\w+=\(.*?\)|\"\$\{\w+\[@\]\}\"|^\s*(if|then|fi)\b|^\s*\w+=\$\(|\)$", "", part).strip()
        if text and not re.fullmatch(r"\w+=.*|fi", text):
            yield Command(str(page.relative_to(ROOT)), text, tuple(shlex.split(text)), int(said[1]) if said else 0)


COMMANDS = [command for page in PAGES for command in commands_of(page)]


@functools.cache
def session_parser() -> argparse.ArgumentParser:
    """The options of a session: ours by their declarations, and those of pytest's that pages use."""
    parser = argparse.ArgumentParser(prog="pytest", allow_abbrev=False)
    for setting in SETTINGS:
        spelled = (f"--{setting.flag}", f"--harness-{setting.flag}")
        if setting.read is None:
            parser.add_argument(*spelled, dest=setting.name, action="store_true")
        else:
            parser.add_argument(*spelled, dest=setting.name, type=functools.partial(as_argument, setting.read))
    for flag in ("--pyargs", "--co", "--lf", "--regen-all", "--force-regen"):
        parser.add_argument(flag, action="store_true")
    for flag in ("-q", "-v", "-x"):
        parser.add_argument(flag, action="count")
    for flag in ("-m", "-k", "-n", "-p", "--junitxml", "--dist", "--maxschedchunk"):
        parser.add_argument(flag)
    parser.add_argument("places", nargs="*")
    return parser


def check_session(words: Sequence[str]) -> None:
    """The options parse, and what they name is there."""
    parsed = session_parser().parse_intermixed_args(list(words))
    for place in parsed.places:
        module = place.startswith("harness.") and importlib.util.find_spec(place)
        assert module or (ROOT / place).exists() or place == "test_int6.py", f"no {place}"
    unknown = set(re.findall(r"[a-z_]+", parsed.m or "")) - MARKS.keys() - {"and", "or", "not"}
    assert not unknown, f"no mark {unknown}"
    for specification in (*(parsed.methods or ()), *filter(None, [parsed.reference])):
        check_method(specification)
    for specification in parsed.models or ():
        check_model(specification)
    for specification in parsed.datasets or ():
        if specification.name != "example-text":
            corpora.resolve(specification, Declared(ROOT))
    for specification in parsed.protocols or ():
        protocols.parse(specification)
    members: dict[str, Member] = {one.name: one for metric in catalog.metrics().values() for one in metric.members}
    for name in parsed.metrics or ():
        plain = str(name).partition(":")[0]
        assert plain == "all" or plain in catalog.metrics() or plain in members, f"no metric {name}"


def check_method(specification: Specification) -> None:
    if specification.name in OWN | SOURCES or str(specification) == "all-installed":
        return
    assert specification.name in catalog.methods(), f"no method {specification.name}"
    arguments.resolve(specification, catalog.methods()[specification.name], "cpu")


def check_model(specification: Specification) -> None:
    names.declared_source(specification, Declared(ROOT))


def check_harness(words: Sequence[str]) -> None:
    """`python -m harness ...`."""
    parsed = commanding.parser().parse_args(list(words))
    if parsed.command in ("run", "plan"):
        check_session(parsed.options)
    for specification in parse_list(getattr(parsed, "methods", None) or getattr(parsed, "method", None) or "nf4"):
        check_method(specification)
    if parsed.command in ("memory", "convert"):
        check_model(parse_model(parsed.model))
    if parsed.command == "convert":
        assert parsed.to in catalog.methods()


def check_pip(words: Sequence[str]) -> None:
    """Every extra that is asked for is declared."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        named = re.search(r"(?:llm-quantization-harness|^\.)\[(.+?)\]", word)
        unknown = set(named[1].split(",")) - project["optional-dependencies"].keys() if named else set()
        assert not unknown, f"no extra {unknown}"


def check_tox(words: Sequence[str]) -> None:
    """The environment is there."""
    settings = ConfigParser(interpolation=None)
    settings.read(ROOT / "tox.ini")
    known = {re.sub(r"\{.*\}", "", section.removeprefix("testenv:")) for section in settings.sections()}
    if "-e" in words:
        asked = words[words.index("-e") + 1]
        assert asked in known or re.fullmatch(r"bnb-[\d.]+", asked), f"no environment {asked}"


def check(command: Command) -> None:
    """AssertionError or a parser's error where the command is none that there is."""
    program, *rest = (Path(command.words[0]).name, *command.words[1:])
    if program in ("python", "python3") and rest[:1] == ["-m"]:
        program, *rest = rest[1:]
    checks = {"pytest": check_session, "harness": check_harness, "pip": check_pip, "tox": check_tox}
    checks["harness-quant"] = check_harness
    if program in checks:
        checks[program](rest)
    else:
        assert program in OTHERS | {"venv"}, f"nobody knows {program}"


def test_every_command_of_a_document_is_one_that_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    wrong = []
    for command in COMMANDS:
        try:
            check(command)
        except (AssertionError, HarnessError) as error:
            wrong.append(f"{command.page}: {command.text}: {error}")
        except SystemExit:
            wrong.append(f"{command.page}: {command.text}: {capsys.readouterr().err.strip().splitlines()[-1]}")
    assert not wrong, "\n".join(wrong)
    assert len(COMMANDS) > 100


def test_every_need_is_of_some_command() -> None:
    assert {command.need for command in COMMANDS} == {*NEEDS, ""}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Also links that mkdocs does not see, since README and CONTRIBUTING lie outside its folder."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for target in LINK.findall(text):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        assert not path or (page.parent / path).exists(), target
        if anchor and (found := page.parent / path if path else page).suffix == ".md":
            assert anchor in set(anchors(found)), target


def anchors(page: Path) -> Iterator[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    for heading in re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE):
        plain = re.sub(r"[^\w\s-]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)).strip().lower()
        yield re.sub(r"\s", "-", plain)


def test_what_the_site_includes_whole_has_no_links() -> None:
    """They are read from the repository's root and on the site, where a link would lead elsewhere."""
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        assert "](" not in (ROOT / name).read_text(), name


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    listed = re.findall(r"(\S+\.md)", navigation)
    assert sorted(listed) == sorted(
        str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if "example-plugin" not in page.parts
    )


# what a reader can do in an empty folder, done


def run(command: Command, folder: Path) -> str:
    """What it prints when it is run in that folder; AssertionError where its status is not the page's."""
    words = list(command.words)
    if words[0] in ("python", "python3", "pytest"):
        words[:1] = [sys.executable] if words[0] != "pytest" else [sys.executable, "-m", "pytest"]
    world = os.environ | {"HARNESS_CACHE": str(CACHE)}
    done = subprocess.run(words, cwd=folder, env=world, capture_output=True, text=True, timeout=SECONDS, check=False)
    said = f"{command.page}: {command.text}: exit status {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-2000:]}"
    allowed = {command.status} if "tutorials" in command.page else {0, 1, 3}
    assert done.returncode in allowed, said
    return done.stdout


@pytest.mark.long
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_works_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    """Its files are written where they stand, its commands run in order, what needs more left out."""
    ran, printed = 0, ""
    for kind, title, body in FENCE.findall(page.read_text()):
        if title:
            (tmp_path / title).write_text(body)
        elif kind == "console":
            for line in body.replace("\\\n", " ").splitlines():
                for command in split(page, line.removeprefix("$ ")):
                    if not command.need or command.need == "a project of the reader's own":
                        printed, ran = run(command, tmp_path), ran + 1
        elif kind == "text":  # what the command before it prints
            assert body.splitlines()[0] in printed
    assert ran >= 2


@pytest.mark.long
def test_what_needs_nothing_is_run(tmp_path: Path) -> None:
    chosen = {command.text: command for command in COMMANDS if not command.need and "tutorials" not in command.page}
    alone = [one for one in chosen.values() if "test_int6" not in one.text and "tests/" not in one.text]
    (tmp_path / "pyproject.toml").write_text("[tool.harness.options]\nmax-tokens = 1024\n")
    for command in alone:
        run(command, tmp_path)
    assert len(alone) >= 8
