"""The session's options as one frozen value; nothing below the plugin sees pytest's config."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.sharding import Shard
from harness.specifications import Specification

DEVICES = ("auto", "cpu", "cuda")
ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Declared:
    """What the user's pyproject.toml declares under [tool.harness], beside defaults for the options."""

    root: Path
    models: dict[str, str] = field(default_factory=dict)  # name -> specification
    datasets: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] = ()  # files, relative to `root`, that hold a METHOD
    metrics: tuple[str, ...] = ()  # the same with a METRIC


@dataclass(frozen=True)
class Options:
    """Everything a run depends on."""

    declared: Declared
    models: tuple[Specification, ...] = field(default_factory=lambda: (Specification("smollm2-135m"),))
    methods: tuple[Specification, ...] = ()  # () means the core list
    metrics: tuple[str, ...] = ("perplexity", "memory", "latency")
    datasets: tuple[Specification, ...] = field(default_factory=lambda: (Specification("lee"),))
    protocols: tuple[Specification, ...] = field(default_factory=lambda: (Specification("chunk", ("512",)),))
    reference: Specification = field(default_factory=lambda: Specification("fp32"))
    device: str = "auto"
    max_tokens: int | None = None
    batch_size: int = 1
    repetitions: int = 10
    report_dir: Path = Path("harness-report")
    baselines: Path = Path("baselines")
    stop_early: bool = False
    resume: bool = False
    allow_missing: bool = False
    require_baselines: bool = False
    allow_pickle: bool = False
    trust_remote_code: bool = False
    regenerate: str = ""  # "", "force" (write and fail) or "all" (write and pass)
    mark_expression: str = ""
    engine: str = "local"
    ray_address: str | None = None  # of a running cluster; None: a Ray of this machine's own
    shard: Shard | None = None  # which part of the selected plan this session measures; None: all of it
