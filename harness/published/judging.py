"""Verdicts on published figures, each with our number and the reason in words.

Every figure gets one of six words. What can be computed is computed from the architecture on the meta device (a memory
figure under its report's convention, with what separates it from every byte that the model needs); what cannot is never
guessed at: the reason then names the facts that are missing. BYTES_PER_SECOND and IMPLAUSIBLE are what no hardware and
no right protocol reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum

from msgspec.structs import replace

from harness.core.text import mib
from harness.published.claims import ROTARY, UNITS, Claim, Convention
from harness.published.counting import Count, Truth, anatomy, count, describe, explain, search, truth

GB, GIB = 10**9, 2**30
# Generous on purpose: A100 2.0, H100 3.35, H200 4.8, B200 8, and the HBM4 cards announced for 2026 up to 22 TB/s.
BYTES_PER_SECOND = Decimal(25 * 10**12)
BANDWIDTH_SOURCE = "an H200 has 4.8, a B200 8, cards announced with HBM4 22"
# Public figures of one model on English differ by protocol and text by a factor under 5 (GPT-2: 25 to 80).
IMPLAUSIBLE = 100


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


def judge(claims: Sequence[Claim]) -> tuple[Judgement, ...]:
    """A verdict on every claim, in order; all of them, since some are judged beside others.

    Imports torch, reads no weights and no network.
    """
    alone = {"memory": memory_judgement, "dtype": memory_judgement, "census": census_judgement}
    alone |= {"cpu": split_judgement, "gpu": split_judgement}
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
    held = truth(claim.report.model, claim.specification).storage if claim.specification else None
    command = f"python -m harness memory {claim.report.model} --method {claim.specification}" if held else ""
    if claim.convention is None:
        space = search(claim)
        finding = Finding.REPRODUCED if space.hits else Finding.NOT_DERIVABLE
        ours = _in_unit(space.hits[0].bytes, claim) if space.hits else None
        return Judgement(claim, finding, _joined(explain(space, claim), claim.remark), ours, held, command)
    total, note = counted(claim, claim.convention)
    agrees = claim.printed(total) == claim.value
    if not agrees:
        gives = f"under its convention ({describe(claim.convention)}) the architecture gives {claim.printed(total)}"
        note = f"{gives}; {note}"
    finding, note = Finding.REPRODUCED if agrees else Finding.REFUTED, _joined(note, claim.remark, _control(claim))
    return Judgement(claim, finding, note, _in_unit(total, claim), held, command)


def census_judgement(claim: Claim) -> Judgement:
    """Count modules of a class, by today's model or as many a layer as older versions built."""
    about, convention = anatomy(claim.report.model), claim.convention
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
    """Refuted where the weights would have to be read faster than any memory can; else not settled by anyone."""
    about, codes = anatomy(claim.report.model), 0
    if not claim.metric.startswith("latency_before"):
        if not claim.specification:
            raise ValueError(f"{claim.id} has no method of ours: give it a specification")
        codes = truth(claim.report.model, claim.specification).codes
    # bytes that a pass cannot do without: the codes, or all in fp32 but the tables, of which it reads a few rows
    weights = codes or 4 * sum(tensor.elements for tensor in about.tensors if tensor.role != "embedding")
    seconds = claim.in_base_units / claim.passes
    ratio, note = _ratio(claim, claims)
    rate = Decimal(weights) / seconds
    if rate > BYTES_PER_SECOND:
        least = Decimal(weights) / BYTES_PER_SECOND / UNITS[claim.unit] * claim.passes
        parts = f" / {claim.passes}" if claim.passes > 1 else ""
        whole = Decimal(weights) / claim.in_base_units
        reading = f"; read as one pass it would be {whole / 10**12:.1f} TB/s" if claim.passes > 1 else ""
        said = (
            f"a pass in {claim.published} {claim.unit}{parts} reads {weights / 10**6:,.0f} MB of weights at "
            f"{rate / 10**12:,.0f} TB/s; no accelerator has {BYTES_PER_SECOND / 10**12:.0f} TB/s "
            f"({BANDWIDTH_SOURCE}), so it takes at least {least:.3g} {claim.unit}{reading}"
        )
        return Judgement(claim, Finding.REFUTED, _joined(said, note, claim.remark), ratio=ratio)
    missing = f"not said: {claim.report.missing['latency']}"
    said = _joined(missing, note, claim.remark, _control(claim))
    return Judgement(claim, Finding.UNDERSPECIFIED, said, ratio=ratio)


def perplexity_judgement(claim: Claim, claims: Sequence[Claim]) -> Judgement:
    """Refuted beyond what any right protocol yields; settled by weights where text and protocol are named."""
    about, command = anatomy(claim.report.model), f"pytest tests/cases -m published --models {claim.report.model}"
    if claim.dataset and claim.text_protocol:
        note = _joined(f"{claim.dataset} under {claim.text_protocol}", claim.remark, f"run: {command}")
        return Judgement(claim, Finding.NEEDS_WEIGHTS, note, command=command)
    _, note = _ratio(claim, claims)
    if claim.value > about.vocabulary:
        said = (
            f"worse than a model that never looks at its input: {about.vocabulary:,} equally likely tokens give "
            f"{about.vocabulary:,}; 8 bits with their scale keep every weight within half a step"
        )
        return Judgement(claim, Finding.REFUTED, _joined(said, _control(claim), claim.remark))
    anchors = [other.value for other in claims if other.report.model == claim.report.model and other.text_protocol]
    if anchors and claim.value > IMPLAUSIBLE * max(anchors):
        said = (
            f"{claim.value / max(anchors):,.0f} times the largest public figure of the unquantized model on English "
            f"({max(anchors)}), its own reference included: the protocol is at fault, not the method"
        )
        return Judgement(claim, Finding.REFUTED, _joined(said, _control(claim), claim.remark))
    missing = f"not said: {claim.report.missing['perplexity']}"
    said = _joined(missing, note, _control(claim), claim.remark)
    if claim.tried == "sentences":  # the text is named: every reading of it can be tried
        command += f" --datasets {claim.dataset}:FILE"
        said = _joined("the text is named, so every reading of it can be tried", said, f"run: {command}")
        return Judgement(claim, Finding.NEEDS_WEIGHTS, said, command=command)
    if claim.tried:  # the protocol is said, the articles are not
        said = _joined(said, f"its protocol on {claim.dataset}, which settles nothing: {command}")
    return Judgement(claim, Finding.UNDERSPECIFIED, said)


def split_judgement(claim: Claim) -> Judgement:
    """What host and card held: bounded from below by the weights that must lie there."""
    held = truth(claim.report.model, claim.specification)
    missing = f"not said: {claim.report.missing['split']}"
    if not held.codes:
        return _unquantized_split(claim, held, missing)
    if claim.metric == "cpu_gb":
        said = "a quantized model on the card leaves nothing on the host that the method fixes"
        return Judgement(claim, Finding.UNDERSPECIFIED, _joined(missing, said), storage=held.storage)
    ours = _in_unit(held.storage, claim)
    sizes = f"{held.storage / GB:.2f} GB or {held.storage / GIB:.2f} GiB"
    if claim.value * GIB < held.codes:
        said = (
            f"the codes alone take {held.codes / GB:.2f} GB = {held.codes / GIB:.2f} GiB and the model {sizes}: more "
            "than the figure in either unit, unless layers stayed on the host, which the report does not say"
        )
        return Judgement(claim, Finding.REFUTED, said, ours, held.storage)
    said = f"the model holds {sizes} in full; the figure is {claim.value * GIB / held.storage - 1:+.1%} of the latter"
    return Judgement(claim, Finding.UNDERSPECIFIED, _joined(missing, said), ours, held.storage)


def _unquantized_split(claim: Claim, held: Truth, missing: str) -> Judgement:
    """Host and card together hold the weights; a host that holds them all leaves none for the card."""
    host, card = (Decimal({**claim.beside, claim.metric: claim.published}[name]) for name in ("cpu_gb", "gpu_gb"))
    whole = Decimal(held.parameters) / GB
    if host + card < whole:
        said = f"host and card together hold {host + card} GB, the weights alone take {whole:.2f}"
        return Judgement(claim, Finding.REFUTED, said, whole, held.storage)
    if claim.metric == "gpu_gb" and host >= whole:
        said = f"{host} GB on the host hold the whole model of {whole:.2f} GB, which leaves 0 for the card"
        finding = Finding.UNDERSPECIFIED if claim.value else Finding.REPRODUCED
        return Judgement(claim, finding, _joined(missing, said) if claim.value else said, Decimal(0), held.storage)
    said = f"the weights take {whole:.2f} GB of it, which fits"
    return Judgement(claim, Finding.UNDERSPECIFIED, _joined(missing, said), whole, held.storage)


def _in_unit(base: int, claim: Claim) -> Decimal:
    return Decimal(base) / UNITS[claim.unit]


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _control(claim: Claim) -> str:
    return f"what yields this: control {claim.fault} of docs/studies/pitfalls.md" if claim.fault else ""


def _ratio(claim: Claim, claims: Sequence[Claim]) -> tuple[Decimal | None, str]:
    """The claim over the same report's figure for the reference, as a plain factor and in words."""
    column = {"latency_ms": "latency_before_ms", "perplexity": "perplexity_before"}.get(claim.metric, "")
    base = claim.beside.get(column, "") if claim.reference == "before" else ""
    if not base:
        wanted = (claim.report.name, claim.reference, claim.metric.replace("latency_table_s", "latency_s"))
        others = [other for other in claims if (other.report.name, other.method, other.metric) == wanted]
        others.sort(key=lambda other: other.part != claim.part)  # its own part's, else the other part's
        base = others[0].published if others else ""
    ratio = claim.value / Decimal(base) if base else None
    return ratio, f"published ratio to its reference {ratio:.3f}" if ratio is not None else ""


def counted(claim: Claim, convention: Convention) -> tuple[int, str]:
    """Bytes under a convention, and in words how they differ from storage and what else would give them."""
    about = anatomy(claim.report.model)
    total = count(about, convention)
    if convention.only:
        return total.quantized if convention.only == "int8" else total.total - total.quantized, ""
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


def _difference(claim: Claim, found: Count) -> str:
    """Every term between storage and the published count, in bytes that add up exactly."""
    about, held = anatomy(claim.report.model), truth(claim.report.model, claim.specification)
    terms = [
        (held.state - found.scales, "scales and tables left out", "scales counted beyond ours"),
        (-found.head_copy, "", "the tied head counted again as an int8 copy"),
        (-found.masks, "", "causal masks, which transformers registers no longer"),
        (about.buffer_bytes - found.rotary, "rotary buffers of today left out", "more rotary buffers than today"),
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
