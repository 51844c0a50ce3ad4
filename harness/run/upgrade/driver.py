"""The whole of an upgrade: sides read and built, the same cases measured on each in turn, one report. No torch.

A side is a release, a wheel or a source directory. Its environment is built once and kept in the cache: a virtual
environment of its own whose import path goes on, behind its own packages, to those of the environment that runs this
command. pip installs the named package into it with everything else held at the version that is installed here, so that
only that package (and what it needs and nobody had) differs, and torch lies on the disk once. Nothing is taken from
this environment but its packages: no startup hook of it is run.

Cases go one after another; within one, the sides alternate in who is first. A timed case keeps every side's process
alive at once and interleaves them. A side that cannot be built, loaded or asked gives rows that say why.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from harness import report
from harness.core.catalog import member_of
from harness.core.environment import Environment, first_card
from harness.core.errors import BadFile, BadSpecification, HarnessError, MissingAsset
from harness.core.files import cache_dir, locked, replace_text, sha256_file, timing_lock
from harness.core.options import Options
from harness.core.records import Case, Row
from harness.core.values import digest
from harness.judge import exact
from harness.report import compare
from harness.results.directory import SIDE, TROUBLE, UPGRADE, ReportDirectory
from harness.run import plan as planning
from harness.run.local import missing
from harness.run.messages import Repetition
from harness.run.session import has_cuda
from harness.run.upgrade.interleaved import interleave
from harness.run.upgrade.process import Remote, SideFailed, SideGone

BUILT = {"build", "dist", "__pycache__", "node_modules", "venv"}  # of a source directory, never part of its content
FORMAT = 1  # of a built environment: raise it when they are built in another way
RECORD = "harness.json"  # written last: an environment without it was not finished
NOT_PINNED = {"pip", "setuptools", "wheel", "llm-quantization-harness"}  # the installers, and this code itself
REASON_CHARACTERS = 300  # of pip's own words in one line
Say = Callable[[str], None]


@dataclass(frozen=True)
class Side:
    """One side."""

    label: str  # 'bitsandbytes==0.50.2', or the file's name
    distribution: str  # canonical name
    install: str  # what pip is given
    content: str  # digest of what is installed

    @property
    def slug(self) -> str:
        """A folder's name: the label with whatever is special replaced, and what tells equal labels apart."""
        plain = re.sub(r"[^A-Za-z0-9.]+", "-", self.label).strip("-")
        return plain if "==" in self.label else f"{plain}-{self.content[:8]}"


def parse(text: str) -> Side:
    """Read NAME==VERSION, a path of a wheel, or a path of a directory with a pyproject.toml.

    Raises:
        BadSpecification: anything else; a requirement without one exact version says nothing to measure.
        MissingAsset: a path that is not there.
    """
    path = Path(text).expanduser().resolve()
    if path.is_dir():
        project = path / "pyproject.toml"
        try:
            name = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["name"]
        except (OSError, ValueError, KeyError) as error:
            raise BadSpecification(
                f"{path} has no pyproject.toml that names its project: build a wheel of it"
            ) from error
        content = hashlib.sha256()
        for file in sorted(path.rglob("*")):
            parts = file.relative_to(path).parts
            if file.is_file() and not any(part in BUILT or part.startswith(".") for part in parts):
                content.update("/".join(parts).encode() + b"\0" + sha256_file(file).encode())
        return Side(path.name, canonicalize_name(str(name)), str(path), content.hexdigest())
    if not path.is_file() and (text.endswith(".whl") or "/" in text):
        raise MissingAsset(f"{text} is not there: name a wheel, a source directory or NAME==VERSION")
    if text.endswith(".whl"):
        try:
            name, _, _, _ = parse_wheel_filename(path.name)
        except InvalidWheelFilename as error:
            raise BadSpecification(f"{path.name} is no wheel's file name ({error})") from error
        return Side(path.name, name, str(path), sha256_file(path))
    try:
        requirement = Requirement(text)
    except InvalidRequirement as error:
        raise BadSpecification(f"'{text}' is no side: write NAME==VERSION, a wheel or a source directory") from error
    exact = [item for item in requirement.specifier if item.operator == "==" and "*" not in item.version]
    if len(exact) != 1 or len(requirement.specifier) != 1 or requirement.url or requirement.marker:
        raise BadSpecification(f"'{text}' names no one version: write {requirement.name}==VERSION")
    name = canonicalize_name(requirement.name)
    return Side(f"{name}=={exact[0].version}", name, str(requirement), digest(str(requirement)))


def parse_all(texts: Sequence[str]) -> tuple[Side, ...]:
    """Two or more different sides of one distribution, BadSpecification otherwise."""
    sides = tuple(parse(text) for text in texts)
    if len(sides) < 2:
        raise BadSpecification("an upgrade has two sides or more: name what you have, then what you would move to")
    names = sorted({side.distribution for side in sides})
    if len(names) > 1:
        raise BadSpecification(f"the sides name {' and '.join(names)}: all but one package must be equal")
    if len({side.slug for side in sides}) < len(sides):
        raise BadSpecification("two sides are the same: nothing would move")
    return sides


def installed(folders: Sequence[str]) -> dict[str, str]:
    """Distributions by canonical name with their versions; of two of one name the first on the path."""
    versions: dict[str, str] = {}
    for distribution in distributions(path=list(folders)):
        name = distribution.metadata["Name"]
        if name:
            versions.setdefault(canonicalize_name(name), distribution.version)
    return dict(sorted(versions.items()))


def build(side: Side, say: Say) -> tuple[Path, dict[str, str]]:
    """The side's environment, built where it is not there yet: its interpreter, and the packages that it sees.

    Raises:
        HarnessError: pip will not install it; one line.
    """
    paths = sysconfig.get_paths()
    named = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]  # in import order
    folders = [path for path in dict.fromkeys([paths["purelib"], paths["platlib"], *named]) if Path(path).is_dir()]
    lock = {name: version for name, version in installed(folders).items() if name not in NOT_PINNED}
    lock.pop(side.distribution, None)
    told = {"format": FORMAT, "side": side.content, "lock": lock, "folders": folders, "python": sys.version}
    home = cache_dir() / "environments"
    folder = home / f"{side.slug}-{digest(told)[:16]}"
    python = folder / "bin" / "python"
    with locked(home / f"{folder.name}.lock"):
        if not (folder / RECORD).is_file():
            say(f"building an environment for {side.label}")
            shutil.rmtree(folder, ignore_errors=True)  # a build that was interrupted
            try:
                venv.create(folder, with_pip=True, symlinks=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise HarnessError(f"no environment could be made in {folder}: {error}") from error
            own = next(folder.glob("lib/python*/site-packages"))
            (own / "behind.pth").write_text("".join(f"{path}\n" for path in folders), encoding="utf-8")
            constraints = folder / "lock.txt"
            constraints.write_text("".join(f"{name}=={version}\n" for name, version in lock.items()), encoding="utf-8")
            # the variable takes the place of a constraint of the user's, which would hold the package itself
            variables = {**os.environ, "PIP_CONSTRAINT": str(constraints)}
            variables.pop("PYTHONPATH", None)
            command = [str(python), "-m", "pip", "install", "--no-input", side.install]
            done = subprocess.run(
                command, capture_output=True, encoding="utf-8", errors="replace", env=variables, check=False
            )
            if done.returncode:
                shutil.rmtree(folder, ignore_errors=True)
                raise HarnessError(f"{side.label} cannot be installed: {reason_of(done.stdout + done.stderr)}")
            facts = {"label": side.label, "install": side.install, "packages": installed([str(own), *folders])}
            replace_text(folder / RECORD, json.dumps(facts, indent=1) + "\n")
    return python, json.loads((folder / RECORD).read_text(encoding="utf-8"))["packages"]


def reason_of(output: str) -> str:
    """Why pip did not install, in one line: the conflict it names, else its first error."""
    lines = [re.sub(r"\s+", " ", line).strip() for line in output.splitlines()]
    if "The conflict is caused by:" in lines:
        start = lines.index("The conflict is caused by:") + 1
        conflict = itertools.takewhile(bool, lines[start:])
        return ("it conflicts with the lock: " + "; ".join(conflict))[:REASON_CHARACTERS]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    error = next((line for line in errors if line.startswith("No matching distribution")), "") or " ".join(errors[:1])
    return (error or " ".join(lines[-1:]) or "pip said nothing")[:REASON_CHARACTERS]


@dataclass
class Running:
    """One side of a running upgrade."""

    side: Side
    directory: ReportDirectory
    packages: Mapping[str, str] = field(default_factory=dict)
    remote: Remote | None = None
    trouble: str = ""  # why it cannot be asked, in one line
    rows: dict[Case, Row] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)  # tracebacks of bugs, with their cases

    def ask(self, verb: str, argument: Any, say: Say = lambda line: None) -> Any:
        """One request; a process that is gone takes the rest of the side's cases with it."""
        if self.remote is None:
            raise SideFailed(self.trouble)
        try:
            return self.remote.ask(verb, argument, say)
        except SideGone as error:
            self.end(str(error))
            raise

    def end(self, trouble: str = "") -> None:
        """Close the process."""
        self.trouble = trouble or self.trouble
        if self.remote is not None:
            self.remote.close()
            self.remote = None

    def put(self, row: Row, world: Mapping[str, Any]) -> None:
        """Keep a row, flushed."""
        self.rows[row.case] = row
        self.directory.append(row, world)

    def measure(self, case: Case, verb: str, argument: Any) -> None:
        """Ask for a case's row, and keep it or why there is none."""
        try:
            row, trouble, world = self.ask(verb, argument)
        except SideFailed as error:
            row, trouble, world = missing(case, str(error)), "", {}
        except RuntimeError as error:  # a bug met in the side's process: kept whole beside the rows
            row, trouble, world = missing(case, str(error).strip().splitlines()[-1]), str(error), {}
        if trouble:
            self.troubles.append(f"{case.id}\n{trouble}")
            self.directory.lay({TROUBLE: "\n".join(self.troubles) + "\n"})
        self.put(row, world)

    def finish(self, cases: Sequence[Case], command: str) -> None:
        """End the process and leave the side's own report, every planned case in it; none where no side measured."""
        self.end()
        for case in cases:
            if case not in self.rows:
                self.put(missing(case, self.trouble or "not reached: the upgrade stopped before it"), {})
        if not self.directory.waits:
            self.publish(cases, command)

    def publish(self, cases: Sequence[Case], command: str) -> None:
        """The side's own report."""
        rows = exact.settle([self.rows[case] for case in cases])
        self.directory.keep(rows)
        facts = {"label": self.side.label, "trouble": self.trouble, "packages": dict(self.packages)}
        self.directory.put({SIDE: json.dumps(facts, indent=1) + "\n"})
        notes = [f"This is the side {self.side.label} of an upgrade; its times are paired with the other sides'."]
        worlds = self.directory.environments
        report.write(self.directory.folder, rows, cases, worlds, notes=notes, command=command)


def run(texts: Sequence[str], options: Options, command: str, say: Say) -> tuple[str, int]:
    """Measure the sides and compare them.

    Returns:
        The report, which lies in `options.report_dir`/upgrade.md too, and the exit status.
    """
    if options.device == "cuda":
        first_card()  # or one line, and not a row without a number a case
    cases = planning.whole(options, has_cuda(options.device, None))
    sides = parse_all(texts)
    ReportDirectory(options.report_dir).claim()
    live = measure(sides, options, cases, command, say)
    if any(one.directory.waits for one in live):
        reasons = dict.fromkeys(one.trouble or row.reason for one in live for row in one.rows.values())
        raise HarnessError(f"nothing was measured, and {options.report_dir} stays as it was: {'; '.join(reasons)}")
    text, status = report_on([one.directory.folder for one in live], options.baselines, command)
    path = options.report_dir / UPGRADE
    replace_text(path, text)
    say(f"report: {os.path.relpath(path)}")
    return text, status


def measure(sides: Sequence[Side], options: Options, cases: Sequence[Case], command: str, say: Say) -> list[Running]:
    """Measure the cases on every side; each leaves its report in a folder of its own under `options.report_dir`.

    Raises:
        HarnessError: no side at all could be built and started, with the reasons.
    """
    live = [Running(side, ReportDirectory(options.report_dir / side.slug)) for side in sides]
    with contextlib.ExitStack() as stack:
        for one in live:
            one.directory.own()
            stack.callback(one.directory.release)
            one.directory.open(keep=False)
            one.directory.keep_plan(cases)
        measure_in_turn(live, options, cases, command, say)
    return live


def measure_in_turn(live: Sequence[Running], options: Options, cases: Sequence[Case], command: str, say: Say) -> None:
    """`measure`, once every side has its folder."""
    try:
        for one in live:
            try:
                python, one.packages = build(one.side, say)
                folder = one.directory.folder
                own = replace(options, report_dir=folder, engine="local")  # its processes alternate with the others'
                one.remote = Remote(python, own, planning.threads(), folder / "side.log")
                one.directory.keep_identities(one.ask("prepare", cases, say))
            except HarnessError as error:
                one.end(str(error))
                say(f"{one.side.label}: {error}")
        if not any(one.remote for one in live):
            raise HarnessError("no side can be measured: " + "; ".join(one.trouble for one in live))
        for number, case in enumerate(cases):
            say(f"[{number + 1}/{len(cases)}] {case.id}")
            ordered = live if number % 2 == 0 else live[::-1]
            if not member_of(case).timed:
                for one in ordered:
                    one.measure(case, "check", case)
                replace_earlier(live)
                continue
            asks = {one.side.label: functools.partial(one.ask, "repetition") for one in ordered if one.remote}
            with locked(timing_lock()):  # machine-wide, as for a session's timed cases
                figures = interleave(asks, case, options.repetitions)
            for one in ordered:
                figure = figures.get(one.side.label, one.trouble)
                if isinstance(figure, str):
                    one.put(missing(case, figure), {})
                else:
                    one.measure(case, "repetition", Repetition(case, figure=figure))
            replace_earlier(live)
    finally:
        for one in live:
            one.finish(cases, command)


def replace_earlier(live: Sequence[Running]) -> None:
    """An earlier upgrade's reports stay until a side has measured something; then they go on every side."""
    if any(row.value is not None for one in live for row in one.rows.values()):
        for one in live:
            one.directory.begin()


def pairs(count: int) -> list[tuple[int, int]]:
    """Which sides are compared: every step, and with more than one step the whole way, last."""
    steps = list(itertools.pairwise(range(count)))
    return steps + ([(0, count - 1)] if count > 2 else [])


def report_on(folders: Sequence[Path], baselines: Path, command: str) -> tuple[str, int]:
    """The report over the sides' directories, in order, and its exit status; nothing is measured."""
    sides, where = [], ""
    for folder in folders:
        try:
            facts = json.loads((folder / SIDE).read_text(encoding="utf-8"))
            label, packages, trouble = str(facts["label"]), dict(facts["packages"]), str(facts["trouble"])
        except (OSError, ValueError, KeyError) as error:
            raise BadFile(f"{folder} is no side of an upgrade ({error}): measure it again") from error
        session = report.read_report(folder)
        sides.append(report.SideFacts(label, packages, trouble, {row.case: row for row in session.rows}))
        for world in list(session.environments.values())[:1]:
            here = Environment.from_dict(world)
            machine = f"{here.gpu or here.cpu} ({here.device_class}), {here.threads} threads, Python {here.python}"
            where = where or machine
    steps = [report.Step(a, b, compare(folders[a], folders[b], baselines=baselines)) for a, b in pairs(len(folders))]
    where = where or "a machine that measured nothing"
    return report.render_upgrade(sides, steps, where=where, command=command), report.worst(steps)
