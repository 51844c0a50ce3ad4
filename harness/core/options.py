"""The session's options as one frozen value, each declared once: its default, its reader and its help together.

They come from the command line, then [tool.harness] of the user's pyproject.toml, then the defaults. Nothing below the
plugin sees pytest's config.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from harness.core.errors import BadFile, BadSpecification, HarnessError, UnknownName
from harness.core.specification import Specification, parse, parse_list, parse_models, parse_reference

DEVICES = ("auto", "cpu", "cuda")
ENGINES = ("local", "ray")
WAITS = ("auto", "active", "passive")


@dataclass(frozen=True)
class Shard:
    """The index-th of count parts, counted from 1."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def parse_shard(text: str) -> Shard:
    """'3/16' -> Shard(3, 16); BadSpecification where it is no part of a whole."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise BadSpecification(f"'{text}' is no shard: write I/N with 1 <= I <= N, such as 3/16")
    return Shard(int(match[1]), int(match[2]))


def names(text: str) -> tuple[str, ...]:
    """A comma-separated list of plain names."""
    listed = tuple(part.strip() for part in text.split(","))
    if not all(listed):
        raise BadSpecification(f"'{text}' has an empty name")
    return tuple(dict.fromkeys(listed))


def positive(text: str) -> int:
    """A whole number above zero."""
    if not re.fullmatch(r"[0-9]{1,18}", str(text)) or int(text) == 0:
        raise BadSpecification(f"'{text}' is no whole number above zero")
    return int(text)


def batch(text: str) -> int:
    """A whole number above zero; 0 for auto."""
    return 0 if text == "auto" else positive(text)


def device_name(text: str) -> str:
    """auto, cpu or cuda."""
    if text not in DEVICES:
        raise BadSpecification(f"'{text}' is no device: choose {', '.join(DEVICES)}")
    return text


def engine_name(text: str) -> str:
    """One of ENGINES."""
    if text not in ENGINES:
        raise UnknownName("engine", text, ENGINES)
    return text


def wait_policy_name(text: str) -> str:
    """One of WAITS."""
    if text not in WAITS:
        raise UnknownName("wait policy", text, WAITS)
    return text


def address(text: str) -> str:
    """HOST:PORT, or auto; Ray's client (ray://) is refused."""
    host, _, port = text.rpartition(":")
    if text == "auto" or (host and re.fullmatch("[0-9]{1,5}", port) and int(port) < 1 << 16 and "/" not in host):
        return text
    raise BadSpecification(
        f"'{text}' is no address of a Ray cluster: write HOST:PORT or auto, on a node of that cluster"
    )


@dataclass(frozen=True)
class Declared:
    """What the user's pyproject.toml declares under [tool.harness], as it is written there."""

    root: Path
    models: dict[str, str] = field(default_factory=dict)  # name -> specification
    datasets: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)  # by flag: what holds where the command line says nothing
    methods: tuple[str, ...] = ()  # files, relative to `root`, that hold a METHOD
    metrics: tuple[str, ...] = ()  # the same with a METRIC
    claims: tuple[str, ...] = ()  # files or folders with the figures of a paper, for `published`
    sources: Mapping[str, str] = field(
        default_factory=dict
    )  # of the command line's NAME=SPEC: what a name is read from


def option(
    default: Any, help: str, read: Callable[[str], Any] | None = None, metavar: str = "", shown: str = ""
) -> Any:
    """A field of Options that a user gives: its value where nobody gives one, and what `Setting` tells of it."""
    return field(default=default, metadata={"default": shown, "help": help, "read": read, "metavar": metavar})


@dataclass(frozen=True)
class Options:
    """Everything a run depends on."""

    declared: Declared
    models: tuple[Specification, ...] = option(
        (Specification("smollm2-135m"),),
        "models to measure; NAME=SPEC reads NAME from SPEC",
        parse_models,
        "SPEC,...",
        "smollm2-135m",
    )
    methods: tuple[Specification, ...] = option(
        (),
        "quantization methods, or all-installed",
        parse_list,
        "SPEC,...",
        "the core list; fp32 beside a reference that is another model",
    )
    metrics: tuple[str, ...] = option(
        ("perplexity", "memory", "latency"),
        "metric families or members, or all",
        names,
        "NAME,...",
        "perplexity,memory,latency",
    )
    datasets: tuple[Specification, ...] = option(
        (Specification("lee"),), "texts to measure on", parse_list, "SPEC,...", "lee"
    )
    protocols: tuple[Specification, ...] = option(
        (Specification("chunk", ("512",)),), "perplexity protocols", parse_list, "SPEC,...", "chunk:512"
    )
    reference: Specification = option(
        Specification("fp32"),
        "what others are compared with: the unquantized method, or another model (path:BASE, bf16=path:BASE)",
        parse_reference,
        "SPEC",
        "fp32",
    )
    device: str = option("auto", "auto (what is visible), cpu or cuda", device_name, "NAME", "auto")
    max_tokens: int | None = option(None, "read at most this many tokens of a text", positive, "N", "the whole text")
    batch_size: int = option(1, "windows in one forward pass, where the method allows it, or auto", batch, "N", "1")
    repetitions: int = option(10, "timed repetitions of candidate and reference each", positive, "N", "10")
    report_dir: Path = option(
        Path("harness-report"), "where report, plots and measurements go", Path, "DIR", "harness-report"
    )
    baselines: Path = option(Path("baselines"), "where recorded figures lie", Path, "DIR", "baselines")
    shard: Shard | None = option(
        None, "measure one of N parts of equal predicted cost", parse_shard, "I/N", "the whole plan"
    )
    engine: str = option(
        "local", "what runs the groups: local processes, or tasks of ray", engine_name, "NAME", "local"
    )
    ray_address: str | None = option(
        None, "with --engine ray, the cluster: HOST:PORT or auto", address, "ADDRESS", "a Ray of its own"
    )
    wait_policy: str = option(
        "auto",
        "how threads wait for work: auto (as in a plain script; asleep where -n shares the cores), active or passive",
        wait_policy_name,
        "NAME",
        "auto",
    )
    progress_timeout: int = option(
        30, "minutes without a step (tensor, window, repetition) after which a process is ended", positive, "N", "30"
    )
    stop_early: bool = option(
        False, "stop reading a text once its delta is decided against its bound, or known to 0.005 nat"
    )
    resume: bool = option(False, "keep finished measurements of the report directory whose content key is unchanged")
    allow_missing: bool = option(False, "do not fail the session for planned cases without a number")
    allow_changed_input: bool = option(False, "do not fail the session for cases whose model or text was changed")
    require_baselines: bool = option(False, "fail on unrecorded and not comparable too (latency excepted)")
    allow_pickle: bool = option(False, "load pickled weights (they can run code)")
    trust_remote_code: bool = option(False, "run the model repository's own code")
    regenerate: str = ""  # "", "force" (write and fail) or "all" (write and pass): pytest-regressions' own flags
    mark_expression: str = ""


@dataclass(frozen=True)
class Setting:
    """One option as users meet it: `name` is its field in Options and, with dashes, its flag."""

    name: str
    default: str  # as a user would write it, or in words; "" for a flag that is off
    help: str  # what it is, in a line
    read: Callable[[str], Any] | None  # a text -> its value; None: a flag, which is off by default
    metavar: str  # what stands for its text in help

    @property
    def flag(self) -> str:
        """The long spelling without its dashes, 'max-tokens'."""
        return self.name.replace("_", "-")


SETTINGS = tuple(Setting(one.name, **one.metadata) for one in fields(Options) if one.metadata)
PATHS = {"report_dir", "baselines"}


def read_declared(root: Path) -> tuple[bool, Declared]:
    """Whether pyproject.toml under `root` has a [tool.harness] table, and what it declares."""
    path = root / "pyproject.toml"
    if not path.is_file():
        return False, Declared(root)
    try:
        tools = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {})
    except (ValueError, OSError, RecursionError) as error:
        raise BadFile(f"{path} cannot be read as TOML: {error}") from error
    table = tools.get("harness") if isinstance(tools, dict) else None
    return table is not None, Declared(root) if table is None else read_table(path, table)


def read_table(path: Path, table: Any) -> Declared:
    """What the [tool.harness] table of the file at `path` declares; BadFile, one line, for what is wrong with it."""
    from harness.core.schema import fit  # local: a project without the table pays for no schema library

    where = f"{path}: [tool.harness]"
    known = [item.name for item in fields(Declared) if item.name not in ("root", "sources")]
    if isinstance(table, dict) and (unknown := set(table) - set(known)):
        raise BadFile(f"{where} has no '{min(unknown)}' (known: {', '.join(known)})")
    declared = fit({**table, "root": path.parent} if isinstance(table, dict) else table, Declared, where)
    for kind in ("models", "datasets"):
        for key, text in getattr(declared, kind).items():
            _checked(path, f"{kind}.{key}", functools.partial(parse, text))
    flags = {setting.flag for setting in SETTINGS}
    if unknown := set(declared.options) - flags:
        raise BadFile(f"{path}: [tool.harness.options]: {UnknownName('option', min(unknown), flags)}")
    return declared


def _checked(path: Path, key: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except HarnessError as error:
        raise BadFile(f"{path}: [tool.harness] {key}: {error}") from error


def build(given: Mapping[str, Any], declared: Declared, here: Path, **extra: Any) -> Options:
    """Options from what the command line gave (None where it did not), then declared defaults, then the defaults.

    Relative paths of the command line start at `here`, those of pyproject.toml at its folder.
    """
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        value, base = given.get(setting.name), here
        if value in (None, False) and setting.flag in declared.options:
            base, written = declared.root, declared.options[setting.flag]
            read = functools.partial(setting.read, str(written)) if setting.read else functools.partial(bool, written)
            value = _checked(base / "pyproject.toml", setting.flag, read)
        if value is not None:
            values[setting.name] = base / value if setting.name in PATHS else value
    if given.get("ray_address") and values.get("engine") != "ray":
        raise BadSpecification("--ray-address is for --engine ray: add that, or leave the address out")
    values.setdefault("report_dir", here / "harness-report")
    values.setdefault("baselines", declared.root / "baselines")
    if sources := {str(model): model.source for model in values.get("models", ()) if model.source}:
        declared = replace(declared, sources=sources)
    return Options(declared=declared, **values, **extra)
