"""Where options come from: the command line, then [tool.harness] of the user's pyproject.toml, then the defaults."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import BadFile, BadSpecification, HarnessError, UnknownName
from harness.options import DEVICES, ENGINES, Declared, Options
from harness.sharding import parse_shard
from harness.specifications import parse, parse_list


def names(text: str) -> tuple[str, ...]:
    """A comma-separated list of plain names."""
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise BadSpecification(f"'{text}' has an empty name")
    return tuple(dict.fromkeys(found))


def positive(text: str) -> int:
    """A whole number above zero."""
    if not str(text).isdigit() or int(text) == 0:
        raise BadSpecification(f"'{text}' is no whole number above zero")
    return int(text)


def batch(text: str) -> int:
    """A whole number above zero; 0 for auto."""
    return 0 if text == "auto" else positive(text)


def device(text: str) -> str:
    """auto, cpu or cuda."""
    if text not in DEVICES:
        raise BadSpecification(f"'{text}' is no device: choose {', '.join(DEVICES)}")
    return text


def engine(text: str) -> str:
    """One of ENGINES."""
    if text not in ENGINES:
        raise UnknownName("engine", text, ENGINES)
    return text


def address(text: str) -> str:
    """HOST:PORT, or auto; Ray's client (ray://) is refused."""
    host, _, port = text.rpartition(":")
    if text == "auto" or (host and port.isdigit() and int(port) < 1 << 16 and "/" not in host):
        return text
    raise BadSpecification(
        f"'{text}' is no address of a Ray cluster: write HOST:PORT or auto, on a node of that cluster"
    )


@dataclass(frozen=True)
class Setting:
    """One option: `name` is its field in Options and, with dashes, its flag."""

    name: str
    default: str  # as a user would write it; "" for a flag that is off
    help: str
    read: Callable[[str], Any] | None = None  # None: a flag
    metavar: str = ""

    @property
    def flag(self) -> str:
        """The long spelling without its dashes, 'max-tokens'."""
        return self.name.replace("_", "-")


SETTINGS = (
    Setting("models", "smollm2-135m", "models to measure", parse_list, "SPEC,..."),
    Setting("methods", "the core list", "quantization methods, or all-installed", parse_list, "SPEC,..."),
    Setting("metrics", "perplexity,memory,latency", "metric families or members, or all", names, "NAME,..."),
    Setting("datasets", "lee", "texts to measure on", parse_list, "SPEC,..."),
    Setting("protocols", "chunk:512", "perplexity protocols", parse_list, "SPEC,..."),
    Setting("reference", "fp32", "the unquantized method that others are compared with", parse, "SPEC"),
    Setting("device", "auto", "auto (what is visible), cpu or cuda", device, "NAME"),
    Setting("max_tokens", "the whole text", "read at most this many tokens of a text", positive, "N"),
    Setting("batch_size", "1", "windows in one forward pass, where the method allows it, or auto", batch, "N"),
    Setting("repetitions", "10", "timed repetitions of candidate and reference each", positive, "N"),
    Setting("report_dir", "harness-report", "where report, plots and measurements go", Path, "DIR"),
    Setting("baselines", "baselines", "where recorded figures lie", Path, "DIR"),
    Setting("shard", "the whole plan", "measure one of N parts of equal predicted cost", parse_shard, "I/N"),
    Setting("engine", "local", "what runs the groups: local processes, or tasks of ray", engine, "NAME"),
    Setting("ray_address", "a Ray of its own", "with --engine ray, the cluster: HOST:PORT or auto", address, "ADDRESS"),
    Setting("stop_early", "", "stop reading a text once its delta is decided against its bound, or known to 0.005 nat"),
    Setting("resume", "", "keep finished measurements of the report directory whose content key is unchanged"),
    Setting("allow_missing", "", "do not fail the session for planned cases without a number"),
    Setting("require_baselines", "", "fail on unrecorded and not comparable too (latency excepted)"),
    Setting("allow_pickle", "", "load pickled weights (they can run code)"),
    Setting("trust_remote_code", "", "run the model repository's own code"),
)
PATHS = {"report_dir", "baselines"}


def read_declared(root: Path) -> tuple[bool, Declared]:
    """Whether pyproject.toml under `root` has a [tool.harness] table, and what it declares."""
    path = root / "pyproject.toml"
    if not path.is_file():
        return False, Declared(root)
    try:
        tools = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {})
    except (ValueError, OSError, RecursionError) as error:
        raise BadFile(f"{path} is no TOML: {error}") from error
    table = tools.get("harness") if isinstance(tools, dict) else None
    if table is None:
        return False, Declared(root)
    return True, read_table(path, table)


def read_table(path: Path, table: Any) -> Declared:
    """What the [tool.harness] table of the file at `path` declares; BadFile, one line, for what is wrong with it."""
    if not isinstance(table, dict):
        raise BadFile(f"{path}: [tool.harness] must be a table")
    _check_shape(path, table)
    names, files = ("models", "datasets", "options"), ("methods", "metrics")
    return Declared(
        path.parent, *(table.get(name, {}) for name in names), *(tuple(table.get(kind, ())) for kind in files)
    )


def _check_shape(path: Path, table: Mapping[str, Any]) -> None:
    known = {"models": "name = specification", "datasets": "name = specification", "options": "option = value"}
    files = ("methods", "metrics")
    flags = {setting.flag for setting in SETTINGS}
    for kind, value in table.items():
        if kind in files:
            if not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
                raise BadFile(f"{path}: [tool.harness] {kind} must be a list of files, ['my_{kind[:-1]}.py']")
            continue
        if kind not in known:
            raise BadFile(f"{path}: [tool.harness] has no '{kind}' (known: {', '.join((*known, *files))})")
        if not isinstance(value, dict):
            raise BadFile(f"{path}: [tool.harness.{kind}] must be a table of {known[kind]}")
        for key, text in value.items():
            if kind != "options" and not isinstance(text, str):
                raise BadFile(f"{path}: [tool.harness.{kind}] {key} must be text, a specification")
            if kind != "options":
                _checked(path, f"{kind}.{key}", functools.partial(parse, str(text)))
            elif key not in flags:
                raise BadFile(f"{path}: [tool.harness.options]: {UnknownName('option', key, flags)}")


def _checked(path: Path, key: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except HarnessError as error:
        raise BadFile(f"{path}: [tool.harness] {key}: {error}") from error


def _declared_value(setting: Setting, declared: Declared) -> Any:
    written, read = declared.defaults[setting.flag], setting.read
    if read is None:
        return bool(written)
    return _checked(declared.root / "pyproject.toml", setting.flag, lambda: read(str(written)))


def build(given: Mapping[str, Any], declared: Declared, here: Path, **extra: Any) -> Options:
    """Options from what the command line gave (None where it did not), then declared defaults, then the defaults.

    Relative paths of the command line start at `here`, those of pyproject.toml at its folder.
    """
    values: dict[str, Any] = {}
    for setting in SETTINGS:
        value, base = given.get(setting.name), here
        if value in (None, False) and setting.flag in declared.defaults:
            base = declared.root
            value = _declared_value(setting, declared)
        if value is not None:
            values[setting.name] = base / value if setting.name in PATHS else value
    if given.get("ray_address") and values.get("engine") != "ray":
        raise BadSpecification("--ray-address is for --engine ray: add that, or leave the address out")
    values.setdefault("report_dir", here / "harness-report")
    values.setdefault("baselines", declared.root / "baselines")
    return Options(declared=declared, **values, **extra)
