"""Measure from Python what pytest measures: the same plan, processes, judge and rows. No pytest, no torch.

The options of a call are those of the command line (`core.options`), by the same names and with the same defaults,
but for `report_dir`: without one the measurements lie in a temporary folder for as long as this process lives.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from harness import report
from harness.core.errors import HarnessError, UnknownName
from harness.core.options import SETTINGS, Options, build, read_declared
from harness.core.records import Case, Row
from harness.core.specification import listed
from harness.judge import baselines, exact, rules
from harness.report.document import command_of, measured_into
from harness.run import merge
from harness.run import plan as planning
from harness.run.session import Session, check_engine, has_cuda

Say = Callable[[str], None]
Call = TypeVar("Call", bound=Callable[..., Any])
PER_SESSION = {"require_baselines", "allow_changed_input"}  # what decides over an exit status, which a call has not
OF_NAMED_MODELS = {  # options that say how a named model is found, quantized or distributed
    "methods", "shard", "engine", "ray_address", "wait_policy", "progress_timeout", "resume", "allow_pickle",
    "trust_remote_code",
}  # fmt: skip


def _with_options(call: Call) -> Call:
    """Let a function's signature and docstring name the options, from the one place that declares them."""
    known = [setting for setting in SETTINGS if setting.name not in PER_SESSION]
    signature = inspect.signature(call)
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    keyword = functools.partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY, default=None)
    more = [keyword(setting.name) for setting in known if setting.name not in signature.parameters]
    call.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
    lines = [f"    {setting.name}: {setting.help} (default: {setting.default or 'off'})." for setting in known]
    call.__doc__ = f"{inspect.cleandoc(call.__doc__ or '')}\n\nOptions:\n" + "\n".join(lines) + "\n"
    return call


@_with_options
def plan(**options: Any) -> list[Case]:
    """The cases that `measure` would measure with the same options, in its order; nothing is loaded or computed.

    Raises:
        HarnessError: an unknown option, name or argument.
    """
    asked = options_of(options)
    return list(planning.mine(planning.whole(asked, has_cuda(asked.device, asked.ray_address)), asked))


@_with_options
def measure(
    models: Any = None,
    tokenizer: Any = None,
    *,
    reference: Any = None,
    say: Say = lambda line: None,
    **options: Any,
) -> list[Row]:
    """Measure and judge every case of the options: one row a case, in the order of the plan.

    A list can be given as such or as the command line has it: `methods=["nf4", "fp4"]` or `methods="nf4,fp4"`. Each
    model under each method is loaded in a process of its own, as pytest does it, and what cannot be measured is a row
    with `value` None and a `reason`, never left out. [tool.harness] of the current folder's pyproject.toml holds here
    too.

    A live module of yours, without a checkpoint, is measured as well:

        measure(quantized, tokenizer, reference=original, metrics="perplexity,divergence,memory,latency")

    It must be a causal model that answers like those of transformers: `model(input_ids=..., use_cache=False).logits`,
    (1, L) ids to (1, L, vocabulary) logits, with a `config` for memory and latency. Its rows name the module's class
    as the model and `live` as the method; give a mapping, `measure({"mine": one, "other": two}, ...)`, to name
    several. `reference` is the unquantized module (its rows are called `reference`), on the same device; without one
    each module is its own reference: there is no delta, no divergence and no bits per weight, and a latency is timed
    against itself. A live module is measured in this process, which no process forked from it could do safely: it is
    put into eval mode meanwhile, its hooks run, whatever else this process does moves the latency, and a crash takes
    this process down. What needs a process of its own is a row without a value that says so: `memory.load_peak`,
    `memory.run_peak`. Bytes are as found, held to no prediction.

    Args:
        models: specifications of models, as for --models; or a live module, or a mapping of names to live modules.
        tokenizer: of live modules, transformers' own or one that answers alike.
        reference: the method that others are compared with, as for --reference; or the unquantized live module.
        say: gets a line on what takes long (a download, a conversion) and one a case; `print` shows them.
        options: as listed below; `report_dir` keeps measurements, losses, report and plots, none is written elsewhere.

    Returns:
        Rows: `case`, `value` in `unit`, `interval` (95%), `samples`, `detail`, `verdict` with its `reason`.
        `harness.render(rows)` makes a report of them; they can be compared token by token in this process.

    Raises:
        HarnessError: one line on what a caller must mend: an unknown option, name or argument, no CUDA device for any
            case; a model or text that cannot be had, where that leaves no case (else its cases are rows without value).
    """
    kept = options.get("report_dir") is not None
    if not kept:  # a folder for as long as this process lives
        options["report_dir"] = folder = Path(tempfile.mkdtemp(prefix="harness-measured-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if is_live(models) or is_live(reference):
        from harness.run import live  # local: torch

        for name in OF_NAMED_MODELS & {name for name, value in options.items() if value is not None}:
            why = "a live module is measured here, as it is"
            raise HarnessError(f"{name}= goes with a named model: {why}; leave it out")
        if options.get("device") is None:
            options["device"] = "auto"  # where the module lies, whatever the project declares
        with live.opened(models, tokenizer, reference, options_of(options)) as (session, cases):
            return run(session, cases, cases, say, kept=kept)
    if tokenizer is not None:
        raise HarnessError("tokenizer= goes with a live module, and a named model brings its own: leave it out")
    asked = options_of({"models": models, "reference": reference, **options})
    check_engine(asked.engine, workers=0)
    baselines.validate(asked.baselines)
    cuda = has_cuda(asked.device, asked.ray_address)
    whole = planning.whole(asked, cuda)
    session = Session(asked, planning.threads(), whole, cuda=cuda)
    return run(session, planning.mine(whole, asked), whole, say, kept=kept)


def is_live(models: Any) -> bool:
    """Whether a torch module was given, or a mapping; where torch is not loaded nobody has one."""
    torch = sys.modules.get("torch")
    return isinstance(models, Mapping) or (torch is not None and isinstance(models, torch.nn.Module))


def options_of(given: Mapping[str, Any]) -> Options:
    """The session's options from a call's: texts, numbers and paths, or lists of them; None is not given.

    Args:
        given: by the names of `SETTINGS`. Relative paths start at the current folder, whose pyproject.toml holds.

    Raises:
        HarnessError: an option that is not there, or a value that its reader refuses.
    """
    known = {setting.name: setting for setting in SETTINGS if setting.name not in PER_SESSION}
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise UnknownName("option", name, known)
        if value is None:
            continue
        read = known[name].read
        try:
            text = listed(value) if isinstance(value, list | tuple) else str(value)
            values[name] = read(text) if read else bool(value)
        except HarnessError as error:
            raise HarnessError(f"{name}={value!r}: {error}") from error
    _, declared = read_declared(Path.cwd())
    planning.open_to(declared)
    return build(values, declared, Path.cwd())


def run(session: Session, cases: Sequence[Case], whole: Sequence[Case], say: Say, *, kept: bool) -> list[Row]:
    """Measure cases and leave their report directory as a session of pytest leaves it.

    Args:
        session: that measures and judges.
        cases: in order.
        whole: the plan that they are a shard of, or they themselves: it shares one error rate.
        say: gets a line on what takes long, and one a case.
        kept: whether somebody will read the directory: report and plots are written then.
    """
    options, directory, troubles = session.options, session.directory, []
    try:
        if not (cases or options.shard):  # before the directory is taken: an earlier report stays
            raise HarnessError("nothing to measure: what compares with the reference needs a method beside it")
        session.open(cases, say, directory.append)
        rows = []
        for case in cases:
            row, trouble = session.check(case)
            troubles += [f"{case.id}: a bug met while measuring\n{trouble}"] if trouble else []
            directory.append(row, session.world(row) if row.environment else {})
            rows.append(row)
            say(f"{case.id}: {f'{row.value:.6g} {row.unit}' if row.value is not None else row.reason} ({row.verdict})")
        rows = exact.settle(rules.settle(rows, session.tests), set(whole) - set(cases))
        if directory.waits:
            say(f"nothing was measured: {directory.folder} stays as it was")
        else:
            directory.keep(rows)
            if options.shard:
                allowed = merge.allowances(options)
                merge.write_shard(directory.folder, options.shard, whole, session.tests, allowed)
            if kept:
                report.write(directory.folder, rows, cases, directory.environments, command=command_of(rows))
        measured_into(directory.folder, directory.environments)
    finally:
        session.close()
    for trouble in troubles:  # when every row is kept: a caller may have made errors of warnings
        warnings.warn(trouble, RuntimeWarning, stacklevel=3)
    return rows
