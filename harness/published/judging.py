"""Verdicts on published figures, each with our number and the reason in words.

Every figure gets one of six words. What can be computed is computed from the architecture on the meta device (a memory
figure under its report's convention, with what separates it from every byte that the model needs). A perplexity whose
rule is known is refuted where the rule gives none, and else turned back into the true one that it is a power of;
weights settle it. A time whose making is known is refuted where it is not the time of what it is called. What cannot be
settled is never guessed at: the reason then names the facts that are missing. BYTES_PER_SECOND and IMPLAUSIBLE are what
no hardware and no right protocol reaches.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum

from msgspec.structs import replace

from harness.core.text import mib
from harness.inputs.texts import corpora
from harness.published import origins
from harness.published.claims import ANCHORS, ROTARY, SHIPPED, UNITS, Claim, Convention, read
from harness.published.counting import (
    Count,
    anatomy_of,
    by_tensor,
    count,
    describe,
    explain,
    search,
    truth_of,
)
from harness.published.pitfalls import PITFALLS

GIB = 2**30
# Generous on purpose: A100 2.0, H100 3.35, H200 4.8, B200 8, and the HBM4 cards announced for 2026 up to 22 TB/s.
BYTES_PER_SECOND = Decimal(25 * 10**12)
BANDWIDTH_SOURCE = "an H200 has 4.8, a B200 8, cards announced with HBM4 22"
# Public figures of one model on English differ by protocol and text by a factor under 5 (GPT-2: 25 to 80).
IMPLAUSIBLE = 100
METRICS = {"": "latency", "forward": "latency.prefill", "generate": "latency.generate", "evaluation": "latency.prefill"}


class Finding(StrEnum):
    """What became of a published figure."""

    REPRODUCED = "reproduced"  # to the printed precision
    REFUTED = "refuted"  # by a measurement or by arithmetic
    NOT_DERIVABLE = "not derivable"  # the space searched stands in the reason
    NEEDS_WEIGHTS = "needs weights"  # the command settles it
    NEEDS_GPU = "needs a GPU"  # the command settles it
    UNDERSPECIFIED = "underspecified"  # nobody can settle it; the reason names what is missing


@dataclass(frozen=True)
class Judgement:
    """A claim and what became of it."""

    claim: Claim
    finding: Finding
    note: str
    ours: Decimal | None = None  # our number in the claim's unit
    storage: int | None = None  # bytes that the corresponding method of ours holds
    command: str = ""  # what reproduces or settles it
    ratio: Decimal | None = None  # the published figure over the same report's figure for its reference
    true: Decimal | None = None  # the perplexity or time that the published figure stands for, by its rule
    true_ratio: Decimal | None = None  # the same over the reference's


def judge(claims: Sequence[Claim]) -> tuple[Judgement, ...]:
    """A verdict on every claim, in order; all of them, since some are judged beside others.

    Imports torch, reads no weights and no network.
    """
    alone = {"memory": memory_judgement, "dtype": memory_judgement, "census": census_judgement}
    alone |= {"cpu": host_judgement, "gpu": card_judgement}
    found = []
    for claim in claims:
        kind = claim.metric.partition(".")[0].partition("_")[0]
        if kind in alone:
            found.append(alone[kind](claim))
        else:
            found.append((perplexity_judgement if kind == "perplexity" else time_judgement)(claim, claims))
    return tuple(found)


def memory_judgement(claim: Claim) -> Judgement:
    """Count under the claim's convention; without one, search."""
    held = truth_of(claim).storage if claim.specification else None
    command = f"python -m harness memory {claim.report.model} --method {claim.specification}" if held else ""
    if claim.report.architecture:
        command = ""  # the command knows names and folders, not a file of claims
    if claim.convention is None or claim.convention.whole_tensors:
        return _without_convention(claim, held, command)
    total, note = counted(claim, claim.convention)
    agrees = claim.printed(total) == claim.value
    if not agrees:
        gives = f"under its convention ({describe(claim.convention)}) the architecture gives {claim.printed(total)}"
        note = f"{gives}; {note}"
    finding = Finding.REPRODUCED if agrees else Finding.REFUTED
    note = _joined(note, _in_full(claim, total), claim.remark, _control(claim))
    return Judgement(claim, finding, note, _in_unit(total, claim), held, command)


def _without_convention(claim: Claim, held: int | None, command: str) -> Judgement:
    space = search(claim)
    if space.hits:
        note = _joined(explain(space, claim), claim.remark)
        return Judgement(claim, Finding.REPRODUCED, note, _in_unit(space.hits[0].bytes, claim), held, command)
    whole, counted_so = by_tensor(claim), claim.convention is not None
    if whole.fits:
        said = f"some choice of whole tensors at 1 byte, the others at 4, gives it ({', '.join(whole.fits)}), unnamed"
    else:
        said = (
            f"no count of whole tensors at 1 and 4 bytes gives it, whichever of the {whole.tensors} tensors are taken, "
            f"layer by layer: each is a multiple of {whole.step} elements, and no sum fits ({'; '.join(whole.tried)})"
        )
    finding = Finding.REFUTED if counted_so and not whole.fits else Finding.NOT_DERIVABLE
    return Judgement(claim, finding, _joined(said, explain(space, claim), claim.remark), None, held, command)


def _in_full(claim: Claim, total: int) -> str:
    """What separates the count from all digits that the program printed, where a table rounds them."""
    if not claim.full:
        return ""
    exact = Decimal(claim.full) * UNITS[claim.unit]
    off = Decimal(total) - exact
    said = f"the program printed {claim.full}"
    if abs(off) < 1:
        return f"{said}: {total:,} bytes, the same to the byte"
    return f"{said}, {exact:,.0f} bytes; the count is {abs(off):,.0f} {'above' if off > 0 else 'below'}"


def census_judgement(claim: Claim) -> Judgement:
    """Count modules of a class, by today's model or as many a layer as older versions built."""
    about, convention = anatomy_of(claim.report), claim.convention
    kind = claim.metric.partition(".")[2]
    today = about.modules.get(kind, 0)
    ours = today
    if convention and convention.per_layer:
        ours = convention.per_layer * about.layers + convention.more
    elif convention and convention.named:
        ours = about.modules.get(convention.named, 0)
    note = f"{today} in this version of transformers" if today != ours else ""
    finding = Finding.REPRODUCED if Decimal(ours) == claim.value else Finding.REFUTED
    note = note if finding is Finding.REPRODUCED else _joined(f"the architecture gives {ours}", note)
    return Judgement(claim, finding, _joined(note, claim.remark), Decimal(ours))


def time_judgement(claim: Claim, claims: Sequence[Claim]) -> Judgement:
    """Refuted where it is no time of what it is called, or reads weights faster than any memory can.

    Of a time whose making is known but for its machine the ratio can be measured again: by weights, or on a card.
    """
    ratio, note = _ratio(claim, claims)
    real, real_ratio, real_note = _real_time(claim, claims)
    impossible = too_fast(claim)
    how, made = claim.timing, ""
    if how is not None:
        made = _joined(f"it is {how.of} ({origins.FROM[how.source]})", _on(claim), _because(claim), real_note)
    if impossible or (how is not None and (how.faults or how.against)):
        said = _joined(impossible, made, note, claim.remark)
        return Judgement(claim, Finding.REFUTED, said, ratio=ratio, true=real, true_ratio=real_ratio)
    if how is not None and ratio is not None and claim.specification:
        command = f"python -m harness run --models {claim.report.model} --methods {claim.specification}"
        command += f" --metrics {METRICS[claim.report.timed]} --device {'cuda' if how.device == 'card' else 'cpu'}"
        said = _joined(f"the ratio travels, the time does not: {command}", note, made, claim.remark, _control(claim))
        finding = Finding.NEEDS_GPU if how.device == "card" else Finding.NEEDS_WEIGHTS
        return Judgement(claim, finding, said, command=command, ratio=ratio, true=real, true_ratio=real_ratio)
    missing = how.missing if how is not None else ""
    missing = missing or claim.report.missing.get("latency", "how it was timed")
    said = _joined(f"not said: {missing}", made, note, claim.remark, _control(claim))
    return Judgement(claim, Finding.UNDERSPECIFIED, said, ratio=ratio, true=real, true_ratio=real_ratio)


def too_fast(claim: Claim) -> str:
    """Why a pass cannot take so little time, in words; "" where it can."""
    about, codes = anatomy_of(claim.report), 0
    if not claim.metric.startswith("latency_before"):
        if not claim.specification:
            raise ValueError(f"{claim.id} has no method of ours: give it a specification")
        codes = truth_of(claim).codes
    # bytes that a pass cannot do without: the codes, or all in fp32 but the tables, of which it reads a few rows
    weights = codes or 4 * sum(tensor.elements for tensor in about.tensors if tensor.role != "embedding")
    rate = Decimal(weights) / (claim.in_base_units / claim.passes)
    if rate <= BYTES_PER_SECOND:
        return ""
    least = Decimal(weights) / BYTES_PER_SECOND / UNITS[claim.unit] * claim.passes
    parts = f" / {claim.passes}" if claim.passes > 1 else ""
    whole = Decimal(weights) / claim.in_base_units
    reading = f"; read as one pass it would be {whole / 10**12:.1f} TB/s" if claim.passes > 1 else ""
    return (
        f"a pass in {claim.published} {claim.unit}{parts} reads {weights / 10**6:,.0f} MB of weights at "
        f"{rate / 10**12:,.0f} TB/s; no accelerator has {BYTES_PER_SECOND / 10**12:.0f} TB/s "
        f"({BANDWIDTH_SOURCE}), so it takes at least {least:.3g} {claim.unit}{reading}"
    )


def _on(claim: Claim) -> str:
    how = claim.timing
    if how is None or not how.device:
        return ""
    return f"on a {how.device}" + f" ({how.machine})" * bool(how.machine)


def _because(claim: Claim) -> str:
    """The faults of a time, each in its title's words."""
    faults = claim.timing.faults if claim.timing else ()
    named = ", ".join(f"{PITFALLS[name].title[0].lower()}{PITFALLS[name].title[1:]} ({name})" for name in faults)
    said = f"no time of what it is called: {named}, of docs/studies/pitfalls.md" if named else ""
    return _joined(said, claim.timing.against if claim.timing else "")


def _real_time(claim: Claim, claims: Sequence[Claim]) -> tuple[Decimal | None, Decimal | None, str]:
    """The time that other outputs of the same run give, its ratio to the reference's, and both in words."""
    if not claim.seconds or claim.timing is None:
        return None, None, ""
    real = Decimal(claim.seconds)
    said = f"by the run's other outputs {claim.seconds} s a {claim.timing.each}"
    others = [other for other in _references(claim, claims) if other.seconds]
    if not others:
        return real, None, said
    ratio = real / Decimal(others[0].seconds)
    return real, ratio, f"{said}, {ratio:.3f} times its reference"


def perplexity_judgement(claim: Claim, claims: Sequence[Claim]) -> Judgement:
    """Refuted beyond what any right protocol yields or where the rule gives none; else settled by weights."""
    about, command = anatomy_of(claim.report), f"pytest tests/cases -m published --models {claim.report.model}"
    if claim.dataset and claim.text_protocol:
        note = _joined(f"{claim.dataset} under {claim.text_protocol}", claim.remark, f"run: {command}")
        return Judgement(claim, Finding.NEEDS_WEIGHTS, note, command=command)
    ratio, note = _ratio(claim, claims)
    how = origins.words(claim.rule) if claim.rule else ""
    impossible = _beyond(claim, claims, about.vocabulary)
    if claim.rule is not None and claim.rule.labels != 1:
        said = "no perplexity: the labels are of the wrong place, and nothing turns it into one"
        said = _joined(said, how, impossible, _control(claim), claim.remark)
        return Judgement(claim, Finding.REFUTED, said, ratio=ratio)
    if impossible:
        return Judgement(claim, Finding.REFUTED, _joined(impossible, how, _control(claim), claim.remark))
    if claim.rule is None or not (claim.specification or claim.codes):
        missing = f"not said: {claim.report.missing.get('perplexity', 'text and protocol')}"
        said = _joined(missing, how, note, _control(claim), claim.remark)
        return Judgement(claim, Finding.UNDERSPECIFIED, said, ratio=ratio)
    true, true_ratio = _true(claim), None
    others = [other for other in _references(claim, claims) if other.rule]
    if true is not None and others and (base := _true(others[0])):
        true_ratio = true / base
    command += f"=path:DIR{given_text(claim)}"
    meaning = _mapped(claim, true, true_ratio)
    said = _joined(how, meaning, note if ratio is not None else "", _control(claim), claim.remark, f"run: {command}")
    return Judgement(claim, Finding.NEEDS_WEIGHTS, said, command=command, ratio=ratio, true=true, true_ratio=true_ratio)


def _beyond(claim: Claim, claims: Sequence[Claim], vocabulary: int) -> str:
    """Why no right protocol gives such a perplexity, in words; "" where one may."""
    if claim.value > vocabulary:
        return (
            f"worse than a model that never looks at its input: {vocabulary:,} equally likely tokens give "
            f"{vocabulary:,}; 8 bits with their scale keep every weight within half a step"
        )
    known = [*claims, *_anchors()]
    anchors = [other.value for other in known if other.report.model == claim.report.model and other.text_protocol]
    if anchors and claim.value > IMPLAUSIBLE * max(anchors):
        return (
            f"{claim.value / max(anchors):,.0f} times the largest public figure of the unquantized model on English "
            f"({max(anchors)}), its own reference included: the protocol is at fault, not the method"
        )
    return ""


@functools.cache
def _anchors() -> tuple[Claim, ...]:
    """Right public figures, whatever claims are judged."""
    return read(SHIPPED / f"{ANCHORS}.toml")


def given_text(claim: Claim) -> str:
    """What a command needs beside the weights: the text, where nobody may ship it."""
    name = claim.rule.dataset if claim.rule else claim.dataset
    if name == "ptb":
        return " --datasets ptb:FILE"
    return f" --datasets text:DIR/{name}.jsonl" if name and name not in corpora.DATASETS else ""


def _true(claim: Claim) -> Decimal | None:
    """The perplexity that a printed one is a power of, where it is one."""
    assert claim.rule is not None
    true = origins.true_figure(claim.rule, float(claim.full or claim.published))
    return None if true is None else Decimal(true)


def _mapped(claim: Claim, true: Decimal | None, ratio: Decimal | None) -> str:
    """The formula that maps the printed figure to a true one, and what it gives."""
    assert claim.rule is not None
    power = origins.exponent(claim.rule)
    if true is None or power is None:
        return "no power turns it into a perplexity: weights tell it"
    over, times = origins.of_the_figure(claim.rule), f", {ratio:.4f} times its reference" if ratio is not None else ""
    if power == 1:
        return f"a perplexity {over} as it stands{times}"
    return f"printed = true^{power:.6g}: the true one, {over}, is {true:.4f}{times}"


def card_judgement(claim: Claim) -> Judgement:
    """What a card held: counted as memory is where the rule is known; nothing, where the row ran on the processor."""
    held = truth_of(claim)
    if not held.codes:
        said = "the unquantized model lies on the host, which leaves 0 for the card"
        finding = Finding.REFUTED if claim.value else Finding.REPRODUCED
        return Judgement(claim, finding, _joined(said, claim.remark), Decimal(0), held.storage)
    if claim.convention is not None:
        return memory_judgement(claim)
    said = f"the codes alone take {held.codes / GIB:.2f} GiB and the model {held.storage / GIB:.2f}"
    finding = Finding.REFUTED if claim.in_base_units < held.codes else Finding.UNDERSPECIFIED
    missing = "" if finding is Finding.REFUTED else f"not said: {claim.report.missing.get('split', 'what was asked')}"
    return Judgement(claim, finding, _joined(missing, said), _in_unit(held.storage, claim), held.storage)


def host_judgement(claim: Claim) -> Judgement:
    """What a process held on the host: refuted as the model's bytes where a program shows that it is the process's."""
    held = truth_of(claim)
    gib, figure = Decimal(held.parameters) / GIB, claim.in_base_units / GIB
    if held.codes:
        ours = Decimal(0)
        said = "the row's weights lie on the card, so none of it is the model's: it is what the process held by then"
    else:
        ours = _in_unit(held.parameters, claim)
        said = f"the model is {gib:.2f} GiB of it, the other {figure - gib:.2f} GiB are the process that reads it"
        if figure < gib:
            said = f"the host holds {figure:.2f} GiB, the weights alone take {gib:.2f}"
    known = claim.source == "program" or (figure < gib and not held.codes)
    missing = "" if known else f"not said: {claim.report.missing.get('split', 'what was asked')}"
    finding = Finding.REFUTED if known else Finding.UNDERSPECIFIED
    return Judgement(claim, finding, _joined(missing, said, claim.remark), ours, held.storage)


def _in_unit(base: int, claim: Claim) -> Decimal:
    return Decimal(base) / UNITS[claim.unit]


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _control(claim: Claim) -> str:
    return f"what yields this: control {claim.fault} of docs/studies/pitfalls.md" if claim.fault else ""


def _references(claim: Claim, claims: Sequence[Claim]) -> list[Claim]:
    """The same figure of the line that the claim's is compared with: its own part's, else the other part's."""
    wanted = (claim.report.name, claim.reference, claim.metric.replace("latency_table_s", "latency_s"))
    others = [other for other in claims if (other.report.name, other.method, other.metric) == wanted]
    return sorted(others, key=lambda other: other.part != claim.part)


def _ratio(claim: Claim, claims: Sequence[Claim]) -> tuple[Decimal | None, str]:
    """The claim over the same report's figure for the reference, as a plain factor and in words."""
    column = {"latency_ms": "latency_before_ms", "perplexity": "perplexity_before"}.get(claim.metric, "")
    base = claim.beside.get(column, "") if claim.reference == "before" else ""
    if not base:
        others = _references(claim, claims)
        base = others[0].published if others else ""
    ratio = claim.value / Decimal(base) if base else None
    return ratio, f"published ratio to its reference {ratio:.3f}" if ratio is not None else ""


def counted(claim: Claim, convention: Convention) -> tuple[int, str]:
    """Bytes under a convention, and in words how they differ from storage and what else would give them."""
    about = anatomy_of(claim.report)
    total = count(about, convention)
    if convention.only == "saved":
        whole = count(about, Convention()).total
        return whole - total.total, f"{whole:,} bytes in fp32 less {total.total:,}"
    if convention.only:
        return total.quantized if convention.only == "int8" else total.total - total.quantized, ""
    if convention.allocated:
        return total.total, _allocated(claim, convention, total)
    notes = [_difference(claim, total)] if claim.specification else []
    for names in convention.same_bytes:  # other tensors at the same width: then the figure cannot tell them apart
        other = replace(convention, quantized=(replace(convention.quantized[0], tensors=names),))
        same = "the same bytes" if count(about, other).total == total.total else "other bytes"
        notes.append(f"{' and '.join(names)} instead would give {same}")
    if about.rotary_elements and convention.rotary == "none":
        with_them = count(about, replace(convention, rotary=ROTARY[1]))
        buffers, printed = f"{with_them.rotary:,} bytes of rotary buffers", claim.printed(with_them.total)
        hidden = printed == claim.printed(total.total)
        words = f"{buffers} would not show at this precision" if hidden else f"with {buffers} it would print {printed}"
        notes.append(words)
    return total.total, _joined(*notes)


def _allocated(claim: Claim, convention: Convention, found: Count) -> str:
    """What a card's allocator adds to the tensors, and which part of a spread model lies on it."""
    about = anatomy_of(claim.report)
    exact = count(about, replace(convention, allocated=False)).total
    notes = [f"{found.total:,} bytes: {exact:,} of tensors, the rest blocks that the allocator does not split"]
    if convention.holds is not None:
        whole = count(about, replace(convention, holds=None)).total
        first, last = convention.holds
        share = f"the embedding and layers {first}-{last} of {about.layers}"
        notes.append(f"allocated on one card of several, which holds {share}; the row takes {whole:,} bytes in all")
    return _joined(*notes)


def _buffers(today: int, found: Count) -> tuple[int, str, str]:
    """Buffers of today's transformers less those that were counted, and both ways in words."""
    fewer = "causal masks, which transformers registers no longer" if found.masks else "more rotary buffers than today"
    return today - found.rotary - found.masks, "buffers of today left out", fewer


def _difference(claim: Claim, found: Count) -> str:
    """Every term between storage and the published count, in bytes that add up exactly."""
    about, held = anatomy_of(claim.report), truth_of(claim)
    terms = [
        (held.state - found.scales, "scales and tables left out", "scales counted beyond ours"),
        (-found.head_copy, "", "the tied head counted again as an int8 copy"),
        _buffers(about.buffer_bytes, found),
    ]
    explained = sum(term for term, _, _ in terms)
    rest = held.storage - found.total - explained
    terms.append((rest, "other tensors at a smaller width than ours", "other tensors at a larger width than ours"))
    said = [f"{abs(term):,} bytes {more if term > 0 else less}" for term, more, less in terms if term]
    gap = held.storage - found.total
    where = f"true storage {mib(held.storage)} MiB under {claim.specification}"
    if not gap:
        return f"{where}, the same to the byte"
    return f"{where}, {abs(gap):,} bytes {'more' if gap > 0 else 'less'}: {', '.join(said)}"
