"""One model under one method in a process of its own, which answers requests until the other end of a pipe is gone.

Forked from a server that has imported torch but loaded no model, touched no device and started no thread pool,
so that a segfault or the kernel's out-of-memory killer takes down one group and nothing else.

A `Group` is what metrics measure, and what makes a row of it; a `LayerGroup` stands in its place for the invariants of
one layer, where no model is loaded. What needs no group is answered too: making ready, and predicting what each takes.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers.models.gpt2.modeling_gpt2  # this, the next and tiny: so that the fork server imports them, once
import transformers.models.llama.modeling_llama  # noqa: F401

from harness.core import catalog, environment, errors, gpus, progress
from harness.core.contracts import Arguments, Checkpoint, Method, TokenPlan, Window
from harness.core.errors import HarnessError, LeftOut, MissingPackage
from harness.core.files import locked, replace_text
from harness.core.identity import identity_of
from harness.core.options import Options
from harness.core.records import Case, Figure, Row
from harness.core.specification import parse, parse_method
from harness.core.values import digest
from harness.inputs.models import checkpoints, sizes
from harness.inputs.models.context import context_of
from harness.inputs.models.folder import no_room, stamp
from harness.inputs.texts import corpora, protocols
from harness.methods.quantizing import arguments, bnb, calibration, compiled
from harness.metrics.measuring import census, engine, sequential
from harness.metrics.measuring.checks import LAYER
from harness.metrics.measuring.devices import open_device
from harness.results import losses
from harness.results.directory import IDENTITIES, LOSSES
from harness.run.fingerprints import StartInputs, files, protocol_of
from harness.run.lifetime import end_with_controller, work_told
from harness.run.messages import UNFIT, Job, Reply, ReplyLine, Stop
from harness.run.plan import method_of, missing_packages, models_of, open_to, packages
from harness.run.upgrade import interleaved

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Losses = NDArray[np.float32]
    from torch import nn

OF_ALL_LOGITS = ("divergence", "latency")  # families that need the reference to take and give what the model does
BECAME = re.compile(r" before they became this (?:fp32 )?reference\b")  # of a checkpoint's note
RESOLUTION_NATS = 0.005  # half-width at which an undecided, early-stopped delta is known well enough: 0.5% perplexity


def as_run(text: str, device: str, batch_size: int, known: Mapping[str, Method]) -> tuple[Method, Arguments, int, str]:
    """A method as it is run on a device: itself, its arguments, windows in one forward pass, and the id of all that."""
    method = method_of(specification := parse_method(text), known)
    values = arguments.resolve(specification, method, device)
    windows = batch_size if method.batch_invariant else 1
    return method, values, windows, arguments.method_id(method, values, windows)


def unlike(plan: TokenPlan, other: TokenPlan) -> str:
    """What two plans of a text do not share, 'tokens' or 'windows'; '' where every window is the same."""
    if plan.token_hash != other.token_hash:
        return "tokens"
    pairs = itertools.zip_longest(plan.windows, other.windows)
    same = all(a and b and a.scored == b.scored and np.array_equal(a.ids, b.ids) for a, b in pairs)
    return "" if same and plan.aggregate == other.aggregate else "windows"


def embedding_rows(model: nn.Module) -> int | None:
    """How many ids the model's embedding knows; None where it is no embedding, or the model's code does not say."""
    try:
        return getattr(getattr(model, "get_input_embeddings", lambda: None)(), "num_embeddings", None)
    except NotImplementedError:  # transformers', of models with code of their own
        return None


def as_stored(checkpoint: Checkpoint, grid: str, *, alone: bool) -> dict[str, Any]:
    """What a reader must know of how weights were stored, and whether a method's grid can represent theirs.

    Beside another model (not `alone`) they became no reference, and their own loss is counted too.
    """
    note = checkpoint.note if alone else BECAME.sub("", checkpoint.note)
    return {"model_note": note, "grid_aligned": alone and bool(grid) and grid == checkpoint.grid}


class Group:
    """One model under one method in this process: the `Subject` that metrics measure."""

    def __init__(
        self,
        job: Job,
        line: ReplyLine | None,
        methods: Mapping[str, Method] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Of the catalogue's methods and the job's checkpoint, unless others are given (`live`)."""
        self.job, self.line, options = job, line, job.options
        open_to(options.declared)
        known = catalog.methods() if methods is None else methods
        batch = options.batch_size
        self.method, self.arguments, self.batch_size, self.method_id = as_run(job.method, job.device, batch, known)
        reference = as_run(job.reference, job.device, batch, known)
        self.reference_method, self.reference_arguments, self.reference_batch, self.reference_id = reference
        self.arguments = replace(self.arguments, declared=options.declared)
        self.reference_arguments = replace(self.reference_arguments, declared=options.declared)
        every = packages(self.method, self.arguments.values)
        every |= {name: environment.installed_version(name) or "absent" for name in self.method.uses}
        self.libraries = {name: version for name, version in every.items() if name not in environment.LIBRARIES}
        self.inputs = StartInputs(job.inputs)
        named = checkpoint or self.inputs.checkpoint(lambda: checkpoints.of_session(job.model, options))
        self.named = self.checkpoint = self.reference_checkpoint = (
            named  # whose tokens are read, what is loaded, beside
        )
        other = parse_method(job.reference).model
        if other and other != job.model:
            self.reference_checkpoint = self.inputs.checkpoint(lambda: checkpoints.of_session(other, options))
            self.checkpoint = self.reference_checkpoint if job.method == job.reference else named
        self.repetitions = options.repetitions
        self.device = open_device(job.device)
        self.environment = environment.capture(job.device, job.threads, loaded_facts(job.device))
        self._model: nn.Module | None = None
        self._reference: nn.Module | None = None
        self._nll: dict[str, NDArray[np.float32]] = {}
        self.predicted: dict[str, int] = {}
        self.before: dict[str, int] = {}
        self.census: dict[str, Any] = {}
        self.proof: Mapping[str, Any] = {}

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model that is measured."""
        return checkpoints.tokenizer(self.named)

    @functools.cached_property
    def config(self) -> Any:
        """The checkpoint's configuration."""
        return checkpoints.read_config(self.checkpoint)

    @functools.cached_property
    def world(self) -> tuple[str, ...]:
        """What a number depends on beside model, method and tokens: a hit under equal worlds is never stale."""
        here = self.environment
        chip = here.gpu or here.machine  # losses are shared by equal cards, wherever they are
        return here.environment_class, chip, str(here.threads), CODE

    @functools.lru_cache(maxsize=16)  # noqa: B019  the group lives as long as its process
    def plan_of(self, dataset: str, protocol: str) -> TokenPlan:
        """The token plan of a text under a protocol; HarnessError where a reference of another model reads others."""
        config = self.config if self.named is self.checkpoint else checkpoints.read_config(self.named)
        plan, beside = self._plan(dataset, protocol, self.tokenizer, config), self.reference_checkpoint
        if beside is not self.named:
            theirs = self._plan(dataset, protocol, checkpoints.tokenizer(beside), checkpoints.read_config(beside))
            if what := unlike(plan, theirs):
                raise HarnessError(
                    f"{self.named.specification} and its reference {beside.specification} read other {what} of "
                    f"{dataset} under {protocol}: name the model that it was made from, with the same tokenizer"
                )
        self.inputs.hold(f"tokens of {dataset} under {protocol} for {self.job.model}", plan.token_hash)
        self.inputs.seen[protocol_of(dataset, protocol, self.job.model)] = plan.protocol_id  # told, held to by nobody
        return plan

    def _plan(self, dataset: str, protocol: str, tokenizer: Any, config: Any) -> TokenPlan:
        options = self.job.options
        return protocols.plan(
            corpora.read(parse(dataset), options.declared),
            protocols.parse(parse(protocol)),
            tokenizer,
            context=context_of(config) or sys.maxsize,
            max_tokens=options.max_tokens,
        )

    @property
    def plan(self) -> TokenPlan:
        """The plan of the case in hand."""
        return self.plan_of(self.case.dataset, self.case.protocol)

    @property
    def model(self) -> nn.Module:
        """The model under the method; predicted first, so that a death while loading can say what it needed."""
        if self._model is None:
            for name in missing_packages(self.method, self.arguments.values):
                raise MissingPackage(name, f"the method '{self.job.method}'")
            predicted = sizes.predict(self.config, self.method, self.arguments)
            self.predicted = {name: int(value) for name, value in predicted.items() if name.startswith("memory.")}
            if self.line is not None:
                self.line.send(Reply("predicted", data=self.predicted))
            original = checkpoints.modules(self.checkpoint, self.config, self.arguments.dtype)
            self.device.reset_peak()
            progress.note(f"loading {self.job.model} under {self.job.method}")
            model = self.method.load(self.checkpoint, self.arguments, self.job.device)
            self.examine(model, original)
            self._model = model
        return self._model

    def examine(self, model: nn.Module, original: Mapping[str, nn.Module]) -> None:
        """What every row of the loaded model holds; `original` as in `census`."""
        self.before = {**self.device.peak(), **sizes.measure(model)}
        self.census = self.counted(model, original)
        if self.job.device != "cpu":  # evidence that the device did the work, kept with every row; else no row
            ids = torch.ones((1, 8), dtype=torch.long, device=self.job.device)
            with torch.inference_mode():
                self.proof = self.device.proof(lambda: model(input_ids=ids))

    def counted(self, model: nn.Module, original: Mapping[str, nn.Module]) -> dict[str, Any]:
        """The census of the loaded model."""
        return census.census(model, self.method, self.arguments, original)

    @property
    def reference(self) -> nn.Module:
        """The unquantized model, loaded apart: it shares nothing mutable with the candidate."""
        if self._reference is None:
            progress.note(f"loading {self.job.model} under {self.job.reference}")
            beside = self.reference_checkpoint
            self._reference = self.reference_method.load(beside, self.reference_arguments, self.job.device)
        return self._reference

    def release_reference(self) -> None:
        """Drop the reference and give its memory back."""
        self._reference = None
        self.device.release()

    def nll(self) -> NDArray[np.float32]:
        """Per-token NLL of the case in hand under the model, nats, computed once a plan."""
        if self.case.method == self.case.reference:
            return self.reference_nll()
        key = self.plan.token_hash + self.plan.protocol_id
        if key not in self._nll:
            self._nll[key] = self.score(self.model, self.method, self.batch_size)
        return self._nll[key]

    def reference_nll(self) -> NDArray[np.float32]:
        """The reference's, once a session: the first process to need it computes it, the others wait and read."""
        plan = (self.plan.protocol_id, self.plan.token_hash)
        key = digest([identity_of(self.reference_checkpoint), self.reference_id, *plan, *self.world])
        folder = self.job.options.report_dir / LOSSES
        index = folder / f"reference-{key[:32]}"
        with locked(folder / f".{key[:32]}.lock"):
            sha = index.read_text("utf-8", "replace") if index.is_file() else ""
            if not losses.holds(folder, sha):  # nobody computed it yet, or what was kept is damaged
                model = self.model if self.case.method == self.case.reference else self.reference
                self.refuse_strange_ids(model, self.reference_checkpoint.specification)
                self.refuse_bidirectional(model)
                sha = losses.save(folder, self.score(model, self.reference_method, self.reference_batch))
                self.inputs.untouched(self.reference_checkpoint)
                replace_text(index, sha)
            nll = losses.load(folder, sha)
            assert nll is not None
            return nll

    def refuse_bidirectional(self, model: nn.Module) -> None:
        """HarnessError where the reference's predictions depend on what comes after them.

        Not asked of weights that are no floats: LLM.int8 mixes rows, which a probe takes for looking ahead.
        """
        windows = [window.ids for window in self.plan.windows if window.scored]
        plain = all(parameter.is_floating_point() for parameter in model.parameters())
        if plain and engine.looks_ahead(model, max(windows, key=len), self.job.device):
            raise HarnessError(
                f"{self.reference_checkpoint.specification} ({type(model).__name__}) is no causal model: a later token "
                "moves its predictions of earlier ones, so that no likelihood of a text comes of them; a decoder says "
                "is_decoder: true in its config.json"
            )

    def refuse_strange_ids(self, model: nn.Module, called: str) -> None:
        """HarnessError where the text's ids lie beyond the embedding of the model that is called so."""
        rows = embedding_rows(model)
        largest = max(int(window.ids.max()) for window in self.plan.windows if len(window.ids))
        if rows is not None and largest >= rows:
            name = getattr(self.tokenizer, "name_or_path", "") or type(self.tokenizer).__name__
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise HarnessError(
                f"the tokenizer in {name} reads '{token}' as {largest}, and the embedding of {called} has "
                f"{rows} rows: take the tokenizer that the model was trained with, or resize the embedding"
            )

    def score(self, model: nn.Module, method: Method, batch_size: int, some: Sequence[Window] = ()) -> Losses:
        """Run the engine over the plan's windows, or over some of them."""
        return engine.score(
            model,
            some or self.plan.windows,
            device=self.job.device,
            batch_size=batch_size,
            concurrent=method.concurrent and not self.checkpoint.trust_remote_code,  # whose forward may keep a state
        )

    def key(self, case: Case, stop: Stop | None = None) -> str:
        """What --resume compares: equal keys mean that measuring again would repeat the same work."""
        self.case = case
        plan = (self.plan.protocol_id, self.plan.token_hash) if case.dataset else ()
        early = asdict(stop) if stop else {}  # an early-stopped delta is another figure than that of every token
        code = (catalog.outside_code(), self.libraries)
        models = (identity_of(self.checkpoint), identity_of(self.reference_checkpoint))
        known = [*models, self.method_id, *plan, *self.world, *code, early]
        here = self.environment
        waiting = here.wait_policy, here.spin_count, here.thread_library
        timed = [self.repetitions, here.machine, *waiting] if catalog.member_of(case).timed else []
        return digest([case.id, case.reference, *known, *timed])

    def measure(self, case: Case, stop: Stop | None = None) -> Row:
        """Measure one case, no further than `stop` asks; no verdict yet."""
        self.case = case
        member = catalog.member_of(case)
        started = time.perf_counter()
        against_another = self.reference_checkpoint is not self.checkpoint
        if against_another and case.family in OF_ALL_LOGITS:
            self.refuse_other_vocabulary()
        assert self.model is not None  # load outside the metric, so that a failure to load reads as one
        if case.dataset:
            self.refuse_strange_ids(self.model, self.checkpoint.specification)
        figure = self.stopped(stop) if stop else catalog.metrics()[case.family].measure(self, member)
        texts: dict[str, Any] = {}
        on_text: dict[str, Any] = {}
        if case.dataset:
            plan, folder = self.plan, self.job.options.report_dir / LOSSES
            texts = {"protocol_id": plan.protocol_id, "token_hash": plan.token_hash}
            on_text = {"protocol": plan.protocol}
            if not member.timed and figure.detail.get("whole", True):
                texts["nll"] = losses.save(folder, self.nll())
                counts = [window.scored for window in plan.windows if window.scored]
                on_text |= {"window_counts": counts, "tokens": plan.tokens}
                if case.method != case.reference:
                    on_text["reference_nll"] = losses.save(folder, self.reference_nll())
        calibrated: Any = self.model.calibration if self.method.calibrated else None  # what the method looked at
        if calibrated is not None and case.dataset:  # never the text that is measured on
            declared = self.job.options.declared
            lines = corpora.read(parse(case.dataset), declared)
            calibration.refuse_shared_lines(calibrated, lines, declared, case.method)
        facts = {
            "calibration": calibrated,
            **as_stored(self.checkpoint, self.method.grid, alone=not against_another),
            "attention": getattr(getattr(self.model, "config", None), "_attn_implementation", None),
            "proof": self.proof,
            "libraries": self.libraries,
            "precision": self.device.precision,
            "method_note": self.method.notes.get(case.device, ""),
            # its dtype may be another: a ratio of times holds both
            "reference_id": self.reference_id if member.timed and case.method != case.reference else "",
            # what the other model is whose losses or times these were set against
            "reference_identity": identity_of(self.reference_checkpoint)
            if against_another and (member.paired or member.timed)
            else "",
        }
        notes = {name: value for name, value in facts.items() if value}
        detail = {**figure.detail, **notes, **on_text}
        for checkpoint in (self.checkpoint, self.reference_checkpoint):
            self.inputs.untouched(checkpoint)
        return Row.of(
            case,
            revision=self.checkpoint.revision,
            identity=identity_of(self.checkpoint),
            method_id=self.method_id,
            value=float(figure.value),
            detail=detail,
            census=self.census,
            bits_per_weight=self.census.get("bits_per_weight"),
            environment=self.environment.id,
            seconds=round(time.perf_counter() - started, 3),
            key=self.key(case, stop),
            **{name: getattr(figure, name) for name in ("unit", "count", "spread", "interval", "samples")},
            **texts,
        )

    def refuse_other_vocabulary(self) -> None:
        """HarnessError where the other model that is the reference has more or fewer logits."""
        configs = (checkpoints.read_config(one) for one in (self.checkpoint, self.reference_checkpoint))
        ours, theirs = (int(config.get_text_config().vocab_size) for config in configs)
        if ours != theirs:
            raise HarnessError(
                f"{self.case.metric} sets {ours} logits of {self.checkpoint.specification} against {theirs} of "
                f"{self.reference_checkpoint.specification}: give both one vocabulary, or measure perplexity alone"
            )

    def stopped(self, stop: Stop) -> Figure:
        """The paired delta over as many windows, in their seeded order, as decide it against its bound."""
        windows = [window for window in self.plan.windows if window.scored]
        counts, spans = [window.scored for window in windows], protocols.window_slices(self.plan)
        reference = self.reference_nll().astype(np.float64)
        variance = stop.variance if stop.token_hash == self.plan.token_hash else None
        sequence = sequential.Sequential(variance, stop.bound, RESOLUTION_NATS, counts=counts, alpha=stop.alpha)

        known: dict[int, NDArray[np.float32]] = {}  # losses of the windows read, by their place in the text
        order = sequential.order(self.plan.token_hash, counts).tolist()

        def difference(index: int) -> tuple[float, int]:
            if index not in known:  # as many as run at once: the next one is hardly ever read in vain
                ahead = order[order.index(index) :][: engine.STREAMS]
                values = self.score(self.model, self.method, 1, [windows[place] for place in ahead])
                ends = np.cumsum([counts[place] for place in ahead])
                known.update(zip(ahead, np.split(values, ends[:-1]), strict=True))
            return float((known[index] - reference[spans[index]]).mean()), counts[index]

        state = sequential.read(sequence, order, difference)
        detail = {
            "decided": state.decided,
            "tokens_used": state.tokens_used,
            "tokens_available": state.tokens_available,
            "whole": state.decided == "end",
            "why_whole": state.whole,
            "usable": True,
        }
        if detail["whole"]:  # every token was read: the ordinary figure, with its losses
            key = self.plan.token_hash + self.plan.protocol_id
            self._nll[key] = np.concatenate([known[index] for index in range(len(windows))])
            figure = catalog.metrics()[self.case.family].measure(self, catalog.member_of(self.case))
            return replace(figure, detail=detail | dict(figure.detail))
        return Figure(state.value, "nat", state.windows, interval=(state.low, state.high), detail=detail)


CODE = catalog.code_version()  # of what this process runs: taken at import, in the fork server, once a session


def loaded_facts(device: str) -> dict[str, str]:
    """What only the loaded libraries know."""
    bnb.preload()  # beside a card the fork server has left it to this process
    library = getattr(getattr(sys.modules["bitsandbytes.cextension"], "lib", None), "_lib", None)
    name = Path(getattr(library, "_name", "") or "").name
    cuda = str(torch.version.cuda or "")
    return {"cuda": cuda, "bitsandbytes_library": name, "loops": compiled.runner(), "thread_library": thread_library()}


def thread_library() -> str:
    """File name of the OpenMP library that torch brought, '' where it cannot be told: others wait in other ways."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text("utf-8", "replace").splitlines() if maps.is_file() else []
    loaded = {Path(line.split()[-1]) for line in lines if re.search(r"/lib(gomp|iomp|omp)[^/]*$", line)}
    own = [path.name for path in sorted(loaded) if "torch" in path.parts or "torch.libs" in path.parts]
    return re.sub(r"-[0-9a-f]{6,}", "", (own or sorted(path.name for path in loaded) or [""])[0])


class LayerGroup:
    """One method's layers in this process: the `Subject` of checks, as far as they ask."""

    case: Case
    checkpoint: Any = None  # no model

    def __init__(self, job: Job) -> None:
        self.method, self.arguments, _, self.method_id = as_run(job.method, job.device, 1, catalog.methods())
        self.device = open_device(job.device)
        self.environment = environment.capture(job.device, job.threads, loaded_facts(job.device))

    def key(self, case: Case, stop: Stop | None = None) -> str:
        """What --resume compares."""
        alike = replace(self.environment, wait_policy="", spin_count="")  # how threads wait moves no finding
        return digest([case.id, self.method_id, alike.id, CODE])

    def measure(self, case: Case, stop: Stop | None = None) -> Row:
        """Run one check; no verdict yet."""
        self.case = case
        started = time.perf_counter()
        subject: Any = self  # a Subject without model, plan and reference
        figure = catalog.metrics()[case.family].measure(subject, catalog.member_of(case))
        return Row.of(
            case,
            method_id=self.method_id,
            value=float(figure.value),
            unit=figure.unit,
            count=figure.count,
            detail={**figure.detail, **({"precision": self.device.precision} if self.device.precision else {})},
            environment=self.environment.id,
            seconds=round(time.perf_counter() - started, 3),
            key=self.key(case),
        )


def plan_texts(
    job: Job, cases: Sequence[Case], line: ReplyLine, cost: Callable[[Sequence[Case], Exception], None]
) -> dict[str, str]:
    """Make every token plan of one model's cases; what identifies the texts. `cost` gets the cases without one."""
    methods = [case.method for case in cases]
    usual = next((method for method in methods if not parse_method(method).model), methods[0])
    try:
        group = Group(Job(job.options, cases[0].model, usual, "cpu", job.reference, job.threads, job.log), line)
    except Exception as error:
        cost(cases, error)
        return {}
    for dataset, protocol in dict.fromkeys((case.dataset, case.protocol) for case in cases if case.dataset):
        progress.note(f"reading {dataset} under {protocol}")
        try:
            group.plan_of(dataset, protocol)
        except Exception as error:
            cost([case for case in cases if (case.dataset, case.protocol) == (dataset, protocol)], error)
    return group.inputs.seen


def prepare(job: Job, cases: list[Case], line: ReplyLine) -> dict[str, Any]:
    """Make every checkpoint and token plan that the cases need, so that what cannot be is said before measuring.

    Returns what identifies each (a group that reads something else later refuses to measure); as `IDENTITIES` the facts
    behind the models' digests, and as `UNFIT` the cases whose model or text cannot be had, each with the reason.
    """
    step = "preparing"  # the last line that was said

    def say(text: str) -> None:
        nonlocal step
        step = text
        line.send(Reply("said", text=text))

    def cost(own: Sequence[Case], error: Exception) -> None:
        reply = failure(error)
        reason = reply.text
        if reply.kind == "bug":  # of one model's code, maybe: the others are measured all the same
            line.send(Reply("said", text=reason))
            reason = reason.strip().splitlines()[-1]
        unfit.extend((case, reason) for case in own)

    options, inputs, identities = job.options, dict[str, str](), dict[str, Mapping[str, str]]()
    unfit, stamps = list[tuple[Case, str]](), dict[str, str]()
    with work_told(lambda: step):
        for model in models_of(cases):
            try:
                checkpoint = checkpoints.of_session(model, options, say, verify=True)
                stamps[files(model)] = stamp(checkpoint.directory)  # before a group hashes them
            except Exception as error:
                cost([case for case in cases if model in models_of([case])], error)
            else:
                identities[identity_of(checkpoint)] = checkpoint.identity
        lost = {case for case, _ in unfit}
        for model in dict.fromkeys(case.model for case in cases if case.model != LAYER and case not in lost):
            inputs |= plan_texts(job, [case for case in cases if case.model == model and case not in lost], line, cost)
    return {**inputs, **stamps, IDENTITIES: identities, UNFIT: unfit}


def begun(job: Job, line: ReplyLine) -> Group | LayerGroup:
    """The group; HarnessError where this process was forked from one that had started CUDA, which it then cannot."""
    if job.device == "cuda" and torch.cuda._is_in_bad_fork() and gpus.cuda_devices():
        raise HarnessError(
            "CUDA was initialised before this process was forked: something that every Python of this environment "
            "imports at its start (sitecustomize, a .pth file) asks for a card; take it out"
        )
    return LayerGroup(job) if job.model == LAYER else Group(job, line)


def answered(group: Group | LayerGroup, verb: str, argument: Any) -> Reply:
    """What a living group answers: a key, one repetition of a timing, or a row."""
    if verb == "key":
        return Reply("key", text=group.key(*argument))
    if verb == "repetition" and isinstance(group, Group):
        return interleaved.answer(group, argument)
    if verb == "reference" and isinstance(group, Group):
        for case in argument:  # its losses on each text, where they are not there yet
            group.case = case
            group.reference_nll()
        return Reply("done")
    row = group.measure(*argument)
    kind, _ = errors.blamed(RuntimeError(row.detail.get("exception", "")))  # a finding of an invariant's
    return Reply("row", row=row, data=group.environment.to_dict(), blamed=kind)


def serve(job: Job, connection: Connection) -> None:
    """The process's main loop: a request in, a `Reply` out, until 'close' or the other end is gone.

    Behind a device error it ends: its context is dead, and the controller starts another process for what is left.
    """
    end_with_controller(connection)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the controller's to handle
    with job.log.open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    line = ReplyLine(connection)
    progress.tell_to(line.at)
    group: Group | LayerGroup | None = None
    with bnb.quiet():
        while True:
            try:
                verb, argument = line.receive()
            except (EOFError, OSError):  # a controller that was killed resets it
                return
            if verb == "close":
                return
            try:
                if verb == "prepare":
                    reply = Reply("done", data=prepare(job, argument, line))
                elif verb == "needs":
                    reply = Reply("needs", data=needs(job.options, argument))
                elif verb == "code":
                    reply = Reply("code", text=CODE)
                else:
                    group = group or begun(job, line)
                    reply = answered(group, verb, argument)
            except Exception as error:
                reply = failure(error)
            line.send(reply)
            if reply.blamed == errors.DEVICE:
                return


def failure(error: Exception) -> Reply:
    """What went wrong: one line where the user or the machine is to blame, else a traceback."""
    if isinstance(error, HarnessError):
        return Reply("left out" if isinstance(error, LeftOut) else "error", text=str(error))
    kind, line = errors.blamed(error)
    if kind:
        return Reply("error", text=errors.explained(kind, line), blamed=kind)
    if no_room(error):
        text = str(error).partition("\n")[0]
        return Reply("error", text=f"a disk is full or cannot be written ({text}): make room, then --resume")
    if text := errors.refused(error):
        return Reply("error", text=text)
    return Reply("bug", text="".join(traceback.format_exception(error)))


def needs(options: Options, cases: Sequence[Case]) -> dict[str, Any]:
    """What groups will take, for an engine that places them by it.

    Returns:
        `bytes`, predicted, by group (`Case.group`; one that cannot be predicted counts as the reference alone), and
        `folders`, by model, where its plain folder lies.
    """
    found: dict[str, dict[str, Any]] = {"bytes": {}, "folders": {}}
    known = {model: checkpoints.of_session(model, options) for model in models_of(cases)}
    found["folders"] = {model: str(checkpoint.directory) for model, checkpoint in known.items()}
    for case in {case.group: case for case in cases if case.model in known}.values():
        beside = known[parse_method(case.reference).model or case.model]
        found["bytes"][case.group] = group_bytes(case, known[case.model], beside)
    return found


def group_bytes(case: Case, checkpoint: Checkpoint, other: Checkpoint) -> int:
    """The larger of loading the model under its method, and of what is left of it with the reference (of `other`)
    loaded beside.
    """
    asked, named = parse_method(case.reference), parse_method(case.method)
    reference, method = (method_of(one, catalog.methods()) for one in (asked, named))
    given = arguments.resolve(asked, reference, case.device)
    beside = sizes.loading_peak(checkpoints.read_config(other), reference, given).bytes
    if case.method == case.reference or missing_packages(method):
        return beside
    config = checkpoints.read_config(checkpoint)
    try:
        given = arguments.resolve(named, method, case.device)
        loading = sizes.loading_peak(config, method, given).bytes
        return max(loading, int(sizes.predict(config, method, given)["memory.storage"]) + beside)
    except HarnessError:
        return beside  # its cases will say why
