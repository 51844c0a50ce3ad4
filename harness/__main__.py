"""`python -m harness COMMAND`, or `harness-quant COMMAND`: what needs no pytest. A function a command, which imports.

Exit status: 0 fine, 1 harm, 2 usage, 3 undecided.
"""

from __future__ import annotations

import argparse
import inspect
import io
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import __version__
from harness.core.contracts import DTYPES
from harness.core.errors import HarnessError, UnknownName, refused
from harness.core.options import SETTINGS, read_declared
from harness.core.specification import items

HARM, USAGE, UNDECIDED = 1, 2, 3
CASES = "harness.cases.test_measured"  # what `run` measures
GGUF = "gguf-"  # how the methods begin that `convert` writes
REASONS = 20  # why cases are missing, as `merge` prints it
UPGRADED = "models methods metrics datasets protocols reference device max_tokens repetitions report_dir baselines"
UPGRADE_DEFAULTS = {  # where they are not a session's
    "metrics": "invariant,perplexity,memory,memory.storage_after,latency.prefill,latency.decode",
    "report_dir": "harness-upgrade",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; a HarnessError is one line and exit status 2."""
    read = parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks how a line could go on
        import argcomplete

        argcomplete.autocomplete(read)
    parsed = read.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a locale may lack a dagger
    try:
        declared = read_declared(Path.cwd())[1]
        if declared.methods or declared.metrics or declared.models or declared.datasets:
            from harness.run.plan import open_to

            open_to(declared)
        status: int = parsed.run(parsed)
    except HarnessError as error:
        print(f"python -m harness {parsed.command}: {error}", file=sys.stderr)
        return USAGE
    except BrokenPipeError:
        return 0
    except OSError as error:
        print(f"python -m harness {parsed.command}: {refused(error) or error}", file=sys.stderr)
        return USAGE
    return status


def parser() -> argparse.ArgumentParser:
    """Every command with its options; what it parses has the command's function as `run`."""
    whole = argparse.ArgumentParser(
        prog="python -m harness",
        description="Figures of LLM quantization: reports, comparisons and predictions, without pytest.",
        epilog='Completion in bash or zsh: eval "$(register-python-argcomplete harness-quant)"',
    )
    whole.add_argument("--version", action="version", version=f"llm-quantization-harness {__version__}")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(run: Callable[[argparse.Namespace], int], told: str, **options: Any) -> argparse.ArgumentParser:
        described = inspect.cleandoc(run.__doc__ or told)
        added: argparse.ArgumentParser = commands.add_parser(run.__name__, help=told, description=described, **options)
        added.set_defaults(run=run)
        return added

    add = command(cache, "what the harness keeps between runs, how large it is, and how to let go of it").add_argument
    add("--prune", type=float, metavar="DAYS", help="delete what was not used for so many days (0: all of it)")

    add = command(compare, "what moved between two sessions (exit 0 fine, 1 harm, 3 undecided)").add_argument
    add("before", type=Path, metavar="A", help="a report directory, or a measurements.jsonl")
    add("after", type=Path, metavar="B", help="the other one")

    add = command(convert, "write a model as a GGUF file").add_argument
    add("model", metavar="MODEL", help="a model as --models takes it")
    add("--to", metavar="METHOD", required=True, help="gguf-f32, gguf-f16, gguf-q8_0, ...")
    add("-o", "--output", metavar="FILE", type=Path, required=True, help="the file, FILE.gguf")

    add = command(doctor, "environment, devices, assets, cache, recorded baselines").add_argument
    add("--recorded", metavar="MODEL", help="exit 0 if MODEL is recorded for this device class")
    add("--baselines", type=Path, default=Path("baselines"), metavar="DIR", help="default: baselines")

    add_export(command)

    add = command(frontier, "which methods are on the front of quality, bytes and speed").add_argument
    add("directories", type=Path, nargs="+", metavar="DIR", help="report directories of one machine")
    add("-o", "--output", type=Path, metavar="DIR", help="where plots go (default: the last DIR)")

    add = command(history, "each figure over runs, and what moved (exit 1: the last run made one worse)").add_argument
    add("directories", type=Path, nargs="+", metavar="DIR", help="report directories, or a folder that keeps runs")
    add("--keep", type=Path, metavar="FOLDER", help="put the runs into this folder, a file each, and read its own too")
    add("-o", "--output", type=Path, metavar="FILE", help="plots and tables as HTML")
    add("--baselines", type=Path, default=Path("baselines"), metavar="DIR", help="whose bounds.toml says what is noise")

    _options_of_memory(command(memory, "predict bytes and bits per weight from config.json, without weights"))

    add = command(merge, "join shards' report directories (exit 0 complete, 1 harm, 3 cases are missing)").add_argument
    add("directories", nargs="+", type=Path, metavar="DIR", help="report directories of shards")
    add("-o", "--out", type=Path, required=True, metavar="OUT", help="a new directory for the whole")
    for name in ("missing", "changed-input"):
        add(f"--allow-{name}", action="store_true", help="as of a session; default: where every DIR ran with it")

    command(
        plan,
        "what a session would measure, take and need, pytest's options (exit 0 all fits, 1 something does not)",
        prefix_chars="\0",
        add_help=False,
    ).add_argument("options", nargs="*", metavar="OPTION", help="of `pytest --pyargs harness.cases`")

    _options_of_published(command(published, "a verdict on every figure of published reports"))
    _options_of_explain(command(explain, "which known fault or protocol makes somebody's perplexity out of ours"))

    told = "what a session would change in the baselines, as a markdown diff; --write records it"
    rebaselining(command(rebaseline, told).add_argument)

    add = command(report, "make a report anew from its measurements, and print it").add_argument
    add("directory", type=Path, metavar="DIR", help="the report directory")
    add("--models", default="", metavar="A,B", help="print these models' part only, and write nothing")

    command(
        run,
        "measure: pytest's cases and options (run --engine ray --models gpt2); exit status as pytest's",
        prefix_chars="\0",  # so that no option is read here
        add_help=False,
    ).add_argument("options", nargs="*", metavar="OPTION", help="of `pytest --pyargs harness.cases`")

    add_upgrade(command)
    return whole


def add_export(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The command that writes what other programs read."""
    add = command(export, "a report's figures for other programs").add_argument
    formats = ("csv", "parquet", "latex", "jsonl", "model-card")
    add("directory", type=Path, metavar="DIR", help="the report directory")
    told = "latex: a table a model and text, its caption the protocol; model-card: a Hub README's metadata"
    add("--to", choices=formats, required=True, help=told)
    add("--models", default="", metavar="A,B", help="of these models alone")
    add("--methods", default="", metavar="A,B", help="of these methods alone")
    add("-o", "--output", type=Path, metavar="FILE", help="default: printed")


def add_upgrade(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The command whose options are those of a session."""
    add = command(
        upgrade, "what an upgrade changes, measured on both sides (exit 0 no harm, 1 harm, 3 undecided)"
    ).add_argument
    add("sides", nargs="+", metavar="SIDE", help="NAME==VERSION, a wheel, or a source directory")
    for setting in (setting for setting in SETTINGS if setting.name in UPGRADED.split()):
        told = f"{setting.help} (default: {UPGRADE_DEFAULTS.get(setting.name, setting.default)})"
        add(f"--{setting.flag}", metavar=setting.metavar, help=told)


def rebaselining(add: Callable[..., Any]) -> None:
    """The options of `rebaseline`."""
    add("report", type=Path, nargs="?", metavar="DIR", help="a report directory")
    add("--baselines", type=Path, default=Path("baselines"), metavar="DIR", help="default: baselines")
    add("--write", action="store_true", help="record what is proposed (default: off, nothing is written)")
    told = "give recorded figures the identity of their models, read here, without measuring"
    add("--identify", action="store_true", help=f"without DIR: {told}")
    add("--trust-remote-code", action="store_true", help="--identify: run code that models bring along")
    add("--allow-pickle", action="store_true", help="--identify: read pickled weights, which can run code")


def _options_of_memory(predicted: argparse.ArgumentParser) -> None:
    add = predicted.add_argument
    add("model", metavar="MODEL_OR_CONFIG", help="a model's name, a folder, a config.json, or hub:org/name")
    add("--method", metavar="SPEC", help="default: the reference in --dtype, else fp32")
    add("--dtype", choices=DTYPES, help="of what is not quantized; default: the method's, else fp32")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: also what a card must hold")
    add("--window", type=int, metavar="N", help="cuda: tokens of the forward; default 512, or the context")
    add("--decode", type=int, metavar="N", help="cuda: tokens decoded behind the window, with a cache")
    add("--fits", metavar="SIZE", help="24GiB: whether it loads (and, on a card, runs); exit status 0 yes, 1 no")
    add("--json", action="store_true", help="as JSON")


def _options_of_published(judged: argparse.ArgumentParser) -> None:
    form = judged.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON")
    form.add_argument("--markdown", action="store_true", help="as the page docs/published.md")
    add = judged.add_argument
    add("--claims", type=Path, metavar="FILE", help="claims of your own, or a folder of them (docs/claims.md)")
    add(
        "--report-dir",
        type=Path,
        metavar="DIR",
        help="put the figures into this session's report, its own ratios of times beside the published ones",
    )


def _options_of_explain(explained: argparse.ArgumentParser) -> None:
    add = explained.add_argument
    add("theirs", nargs="+", metavar="METHOD=FIGURE", help="their table, as printed: fp32=3.05 bnb-int8=3.13")
    add("--ours", nargs="+", default=[], metavar="METHOD=FIGURE", help="ours of the same model and text: fp32=86.49")
    add("--report-dir", type=Path, metavar="DIR", help="take ours from this report")
    add("--model", default="", metavar="NAME", help="whose rows of the report; its context and vocabulary are known")
    add("--text", default="", metavar="NAME", help="whose rows of the report")
    add("--tokens", type=int, default=0, metavar="N", help="tokens of the text, which fix what overlapping windows do")
    add("--measure", action="store_true", help="read the text with the model under every rule (--model, --text)")


def note(line: str) -> None:
    """A line of progress, beside what the command prints."""
    print(line, file=sys.stderr, flush=True)


def cache(arguments: argparse.Namespace) -> int:
    """What lies in the cache, with its size and the days since it was used; --prune deletes what lay idle.

    Everything there can be made again: models converted to plain folders, environments of `upgrade`, compiled loops.
    Downloads of the Hub lie in its own cache (`hf cache ls`).
    """
    from harness.core import cached
    from harness.core.files import cache_dir

    if arguments.prune is not None and not arguments.prune >= 0:
        raise HarnessError("--prune takes the days that something lay unused: 30, or 0 for all")
    gone = cached.prune(arguments.prune) if arguments.prune is not None else None
    for entry in cached.entries() if gone is None else gone:
        done = "" if gone is None else "deleted "
        print(f"{done}{entry.name}: {entry.size / 2**20:,.1f} MiB, unused for {entry.idle_days:.0f} days")
    left = sum(entry.size for entry in cached.entries())
    print(f"{cache_dir()}: {left / 2**20:,.1f} MiB")
    if gone is None:
        kinds = "\n".join(f"  {name}: {told}" for name, (_, told) in cached.KINDS.items())
        print(f"{kinds}\nTo delete what was not used for 30 days: python -m harness cache --prune 30")
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Two report directories token by token, or two bare measurements.jsonl files by value."""
    from harness.report import compare, render

    comparison = compare(arguments.before, arguments.after)
    print(render(comparison))
    return comparison.status


def convert(arguments: argparse.Namespace) -> int:
    """Write a model as a GGUF file (weights, tokenizer, hyperparameters), whole or not at all; say what it holds."""
    from harness.core import catalog, specification
    from harness.inputs.models import checkpoints
    from harness.inputs.models.gguf_format import write
    from harness.inputs.models.gguf_format.file import GgufFile

    known = [name for name in catalog.methods() if name.startswith(GGUF)]
    if arguments.to not in known:
        raise UnknownName("GGUF format", arguments.to, known)
    output: Path = arguments.output
    if output.suffix != ".gguf":
        raise HarnessError(f"'{output}' does not end in .gguf, by which a file is known as a model: name it so")
    if not output.resolve().parent.is_dir():
        raise HarnessError(f"'{output}' cannot be written: there is no folder {output.resolve().parent}")
    declared = read_declared(Path.cwd())[1]
    checkpoint = checkpoints.materialise(specification.parse_model(arguments.model), declared, say=note)
    with tempfile.TemporaryDirectory(dir=output.resolve().parent, prefix=".convert-") as folder:
        whole = Path(folder) / "model.gguf"
        size = write.write(checkpoint, arguments.to.removeprefix(GGUF).upper(), whole)
        whole.replace(output)
    file = GgufFile(output)
    tokenizer = file.metadata["tokenizer.ggml.model"]
    print(f"{output}: {size:,} bytes, {len(file.tensors)} tensors, tokenizer {tokenizer}")
    if checkpoint.note:
        print(f"note: {checkpoint.note}")
    if tokenizer == "none":
        print("note: GGUF has no tokenizer of this kind; llama.cpp reads this file with token ids only")
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """The environment, devices, assets and cache as the harness sees them; with --recorded the exit status answers."""
    from harness.core import gpus
    from harness.core.environment import capture
    from harness.core.files import cache_dir
    from harness.core.specification import parse, parse_model
    from harness.inputs.models import names
    from harness.inputs.texts import corpora
    from harness.judge import known_faults
    from harness.methods.quantizing import compiled
    from harness.run import plan

    cards, trouble = gpus.now().gpus, gpus.trouble()
    world = capture("cuda" if cards else "cpu", plan.threads(), {"loops": compiled.runner()})
    if arguments.recorded:
        suffix = "@" + world.device_class.replace(":", "+")
        folder = arguments.baselines / parse_model(arguments.recorded).filename
        recorded = [path for path in folder.glob("*@*.yaml") if path.stem.endswith(suffix)]
        print(f"{len(recorded)} methods of {arguments.recorded} are recorded for {world.device_class}")
        return 0 if recorded else 1
    for name, value in world.to_dict().items():
        print(f"{name}: {value}")
    print(f"device class: {world.device_class}")
    print(f"gpus: {len(cards) or trouble}")
    for gpu in cards:
        print(f"  {gpu.index}: {gpu.name} ({gpu.sm}), {gpu.memory / 2**30:.0f} GiB, {gpu.uuid}")
    if any(gpu.partition for gpu in cards):
        print(f"  {gpus.ONE_PARTITION}")
    print(f"cache: {cache_dir()}")
    declared = read_declared(Path.cwd())[1]
    models, datasets = ("smollm2-135m", "tiny-gpt2", "tiny-olmo"), ("lee", "synthetic")
    for kind, looked_for, check in (("model", models, names.locate), ("dataset", datasets, corpora.check)):
        for name in looked_for:
            try:
                check(parse(name), declared)
                print(f"{kind} {name}: at hand")
            except HarnessError as error:
                print(f"{kind} {name}: {error}")
    faults = known_faults.applying(arguments.baselines, world)
    print(f"known faults that apply here: {len(faults)}")
    for fault in faults:
        print(f"  {fault.id}: {fault.summary} ({fault.package} {getattr(world, fault.package)}; {fault.reference})")
    return 0


def export(arguments: argparse.Namespace) -> int:
    """A report directory as CSV, Parquet, LaTeX, JSON lines or a model card's metadata."""
    from harness.report.export import export

    chosen = [list(filter(None, items(names))) for names in (arguments.models, arguments.methods)]
    print(export(arguments.directory, arguments.to, arguments.output, *chosen), end="")
    return 0


def explain(arguments: argparse.Namespace) -> int:
    """Known faults and protocols that turn our figures into theirs, the surest first; exit status 1 where none does."""
    from harness.published import explaining

    ours = explaining.readings(arguments)
    found = explaining.explain(explaining.figures(arguments.theirs), ours, arguments.model, arguments.tokens)
    print(found)
    return 0 if found.explanations or found.marks else HARM


def frontier(arguments: argparse.Namespace) -> int:
    """The methods on the Pareto front of quality, bytes and speed: a table and a plot for each model and text."""
    from harness.report.frontier import write

    print(write(arguments.directories, arguments.output or arguments.directories[-1]))
    return 0


def history(arguments: argparse.Namespace) -> int:
    """Each figure over runs; exit status 1 where the last run made one worse, or lost it."""
    from harness.core.files import replace_text
    from harness.report.history import history, page, render
    from harness.results.directory import writing
    from harness.results.runs import keep, read_runs

    places: list[Path] = arguments.directories
    if arguments.keep:
        for run in read_runs(places):
            note(f"kept: {keep(run, arguments.keep)}")
        places = [*places, arguments.keep]
    found = history(read_runs(places), arguments.baselines)
    if arguments.output:
        with writing(arguments.output, "--output "):
            replace_text(arguments.output, page(found))
    print(render(found), end="")
    return HARM if found.worse else 0


def memory(arguments: argparse.Namespace) -> int:
    """Bytes and bits per weight of a model under a method; exit status 1 where --fits says no."""
    from harness.run.prediction import in_words, predict

    name = arguments.method or arguments.dtype or "fp32"
    answer = predict(
        arguments.model,
        name,
        dtype=arguments.dtype,
        device=arguments.device,
        window=arguments.window,
        decode=arguments.decode,
        fits=arguments.fits,
    )
    print(json.dumps(answer, indent=1) if arguments.json else in_words(arguments.model, name, answer))
    return HARM if answer.get("fits") is False else 0


def merge(arguments: argparse.Namespace) -> int:
    """Join the report directories of shards into the report that one run would have given."""
    from harness import judge
    from harness.report.account import tally
    from harness.run.merge import merge

    merged = merge(arguments.directories, arguments.out)
    missing = [row for row in merged.rows if row.missing]
    changed = arguments.allow_changed_input or "allow_changed_input" in merged.allowed
    allowed = {"allow_missing": True, "allow_changed_input": changed}
    harm = [row for row in merged.rows if judge.fails(row, require_baselines=False, **allowed)]
    print(", ".join(f"{count:,} {name}" for name, count in tally(merged.rows).items()))
    if merged.absent:
        print(f"shards that never came: {', '.join(map(str, merged.absent))}")
    reasons = Counter(row.reason for row in missing)
    for reason, count in list(reasons.items())[:REASONS]:
        print(f"missing {count:,}: {reason}")
    if len(reasons) > REASONS:
        print(f"… and {len(reasons) - REASONS:,} more reasons, in the report")
    print(f"report: {merged.report}")
    complete = not missing or arguments.allow_missing or (not merged.absent and "allow_missing" in merged.allowed)
    return HARM if harm else 0 if complete else UNDECIDED


def plan(arguments: argparse.Namespace) -> int:
    """What a session with these options would measure, take and need; exit status 1 where something does not fit."""
    from harness.plugin.preview import selected
    from harness.run import forecast

    cases, options = selected(arguments.options, CASES)
    expected, fetched = forecast.forecast(cases, options), forecast.downloads(cases, options)
    print("\n".join(forecast.in_short(cases, options, expected, fetched)), flush=True)  # the rest takes seconds
    lines, fits = forecast.in_full(forecast.needs(cases, options, expected.seconds), fetched)
    print("\n".join(["", *lines]))
    return 0 if fits else HARM


def published(arguments: argparse.Namespace) -> int:
    """Every figure of the reports that ship, or of --claims; always 0, since a refuted claim is no harm of ours."""
    from harness import published, report
    from harness.published import beside, of_baselines, of_rows
    from harness.results.directory import PUBLISHED, ReportDirectory, published_json

    folders = (arguments.claims,) if arguments.claims else published.places(read_declared(Path.cwd())[1])
    directory: Path | None = arguments.report_dir
    measured = of_rows(report.read_report(directory).rows) if directory else of_baselines(Path("baselines"))
    entries = beside([published.entry(judgement) for judgement in published.judge(published.read(*folders))], measured)
    path = ""
    if directory:
        ReportDirectory(directory).put({PUBLISHED: published_json(entries) + "\n"})
        path = str(report.rewrite(directory))
    if arguments.json:
        print(published_json(entries))
    elif arguments.markdown:
        print(published.page(entries), end="")
    elif path:
        print(f"{published.summary(entries)}\nreport: {path}")  # which holds the table
    else:
        print(published.table(entries))
    return 0


def rebaseline(arguments: argparse.Namespace) -> int:
    """What a finished session would change in the baselines, recorded with --write; or --identify, written at once."""
    from harness.run import rebaseline

    if arguments.identify == bool(arguments.report):
        raise HarnessError("name a report directory, or --identify without one")
    if arguments.identify:
        return identify(arguments)
    proposal = rebaseline.propose(arguments.report, arguments.baselines)
    print(rebaseline.render(proposal))
    if not proposal.figures and not proposal.facts:
        print("Nothing to record.")
    elif arguments.write:
        written = rebaseline.write(proposal, arguments.baselines)
        print("\n".join(f"wrote {path}" for path in written))
    else:
        print("Nothing was written. To record this: the same command with --write.")
    return 0


def identify(arguments: argparse.Namespace) -> int:
    """Recorded figures gain the identity of their models; 0 also where some cannot be read here, which is said."""
    from harness.core.specification import parse
    from harness.inputs.models import checkpoints
    from harness.run import rebaseline

    allowed = {"allow_pickle": arguments.allow_pickle, "trust_remote_code": arguments.trust_remote_code}
    declared = read_declared(Path.cwd())[1]

    def materialise(model: str) -> Any:
        return checkpoints.materialise(parse(model), declared, say=note, **allowed)

    lines = list(rebaseline.identify(arguments.baselines, materialise))
    print("\n".join(lines) or f"every figure in {arguments.baselines} has its model's identity")
    return 0


def report(arguments: argparse.Namespace) -> int:
    """Make report.md and its plots anew and print it; with --models print a part, without plots, and write nothing."""
    from harness.report import excerpt, rewrite

    if arguments.models:
        print(excerpt(arguments.directory, items(arguments.models)))
    else:
        print(rewrite(arguments.directory).read_text(encoding="utf-8"))
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Measure as pytest does on the package's cases, wherever the current folder is, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-p", "harness.plugin", "-p", "no:cacheprovider", "--pyargs", CASES]
    return subprocess.run([*command, *arguments.options], check=False).returncode


def upgrade(arguments: argparse.Namespace) -> int:
    """What moves between versions of one package, measured here on both in turn; written to upgrade.md and printed."""
    from harness.run.measure import options_of
    from harness.run.upgrade.driver import run

    options = options_of({name: getattr(arguments, name) or UPGRADE_DEFAULTS.get(name) for name in UPGRADED.split()})
    command = shlex.join(["python", "-m", "harness", *sys.argv[1:]])
    text, status = run(arguments.sides, options, command, note)
    print(text)
    return status


if __name__ == "__main__":
    sys.exit(main())
