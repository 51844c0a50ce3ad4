"""Verdicts on published figures, each with our number and the reason in words.

Every figure gets one of six words. What can be computed is computed from the architecture on the meta device (a memory
figure under its report's convention, with what separates it from every byte that the model needs); what cannot is never
guessed at: the reason then names the facts that are missing. BYTES_PER_SECOND and IMPLAUSIBLE are what no hardware and
no right protocol reaches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum

from msgspec.structs import replace

from harness.core.text import mib
from harness.published.claims import ROTARY, UNITS, Claim, Convention
from harness.published.counting import (
    Anatomy,
    Count,
    Truth,
    anatomy,
    count,
    describe,
    explain,
    read_by_a_pass,
    search,
    truth,
)

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
    """A claim and what became of it.

    Attributes:
        ours: our number in the claim's unit, None where there is none.
        storage: bytes that the corresponding method of ours holds, None where there is none.
        command: what reproduces or settles it.
        ratio: the published figure over the same report's figure for its reference, None where it has none.
    """

    claim: Claim
    finding: Finding
    note: str
    ours: Decimal | None = None
    storage: int | None = None
    command: str = ""
    ratio: Decimal | None = None


def judge(claims: Sequence[Claim]) -> tuple[Judgement, ...]:
    """A verdict on every claim, in order; all of them, since some are judged beside others.

    Imports torch, reads no weights and no network.
    """
    return tuple(_judge(claim, claims) for claim in claims)


def _judge(claim: Claim, claims: Sequence[Claim]) -> Judgement:
    kind = claim.metric.partition(".")[0].partition("_")[0]
    if kind == "memory" or kind == "dtype":
        return memory_judgement(claim)
    if kind == "census":
        return census_judgement(claim)
    if kind == "perplexity":
        return perplexity_judgement(claim, claims)
    if kind in ("cpu", "gpu"):
        return split_judgement(claim)
    return time_judgement(claim, claims)


def memory_judgement(claim: Claim) -> Judgement:
    """Count under the claim's convention; without one, search."""
    held = truth(claim.report.model, claim.specification).storage if claim.specification else None
    command = f"python -m harness memory {claim.report.model} --method {claim.specification}" if held else ""
    if claim.convention is None:
        space = search(claim.report.model, claim.value, int(UNITS[claim.unit]), claim.digits)
        finding = Finding.REPRODUCED if space.hits else Finding.NOT_DERIVABLE
        ours = _in_unit(space.hits[0].bytes, claim) if space.hits else None
        return Judgement(claim, finding, _joined(explain(space, claim), claim.remark), ours, held, command)
    total, note = counted(claim, claim.convention)
    agrees = claim.printed(total) == claim.value
    if not agrees:
        note = (
            f"under its convention ({describe(claim.convention)}) the architecture gives {claim.printed(total)}; {note}"
        )
    finding = Finding.REPRODUCED if agrees else Finding.REFUTED
    return Judgement(
        claim, finding, _joined(note, claim.remark, _control(claim)), _in_unit(total, claim), held, command
    )


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
    weights = weights_of_a_pass(claim)
    seconds = claim.in_base_units / claim.passes
    ratio = _ratio(claim, claims)
    note = _published_ratio(ratio)
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
    about = anatomy(claim.report.model)
    if claim.dataset and claim.text_protocol:
        command = f"pytest tests/cases -m published --models {claim.report.model}"
        note = _joined(f"{claim.dataset} under {claim.text_protocol}", claim.remark, f"run: {command}")
        return Judgement(claim, Finding.NEEDS_WEIGHTS, note, command=command)
    ratio = _ratio(claim, claims)
    note = _published_ratio(ratio)
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
        command = f"pytest tests/cases -m published --models {claim.report.model} --datasets {claim.dataset}:FILE"
        said = _joined("the text is named, so every reading of it can be tried", said, f"run: {command}")
        return Judgement(claim, Finding.NEEDS_WEIGHTS, said, command=command)
    if claim.tried:  # the protocol is said, the articles are not
        command = f"pytest tests/cases -m published --models {claim.report.model}"
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


def _published_ratio(ratio: Decimal | None) -> str:
    return f"published ratio to its reference {ratio:.3f}" if ratio is not None else ""


def _in_unit(base: int, claim: Claim) -> Decimal:
    return Decimal(base) / UNITS[claim.unit]


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _control(claim: Claim) -> str:
    return f"what yields this: control {claim.fault} of docs/studies/pitfalls.md" if claim.fault else ""


def _ratio(claim: Claim, claims: Sequence[Claim]) -> Decimal | None:
    """The claim over the same report's figure for the reference, as a plain factor."""
    base: Mapping[str, str] = claim.beside
    before = base.get({"latency_ms": "latency_before_ms", "perplexity": "perplexity_before"}.get(claim.metric, ""), "")
    if claim.reference == "before" and before:
        return claim.value / Decimal(before)
    metric = claim.metric.replace("latency_table_s", "latency_s")
    references = [
        other
        for other in claims
        if (other.report.name, other.method, other.metric) == (claim.report.name, claim.reference, metric)
    ]
    references.sort(key=lambda other: other.part != claim.part)  # its own part's, else the other part's
    return claim.value / references[0].value if references else None


def counted(claim: Claim, convention: Convention) -> tuple[int, str]:
    """Bytes under a convention, and in words how they differ from storage and what else would give them."""
    about = anatomy(claim.report.model)
    total = count(about, convention)
    if convention.only:
        return total.by_dtype[convention.only], ""
    notes = [_difference(claim, about, total)] if claim.specification else []
    notes += [_also(convention, about, names) for names in convention.same_bytes]
    notes += [_rotary(claim, convention, about)] if about.rotary_elements and convention.rotary == "none" else []
    return total.total, _joined(*notes)


def weights_of_a_pass(claim: Claim) -> int:
    """Bytes of weights that a forward pass of the claim's model reads, as its method stores them."""
    about = anatomy(claim.report.model)
    if claim.metric.startswith("latency_before"):
        return read_by_a_pass(about, Convention())
    if not claim.specification:
        raise ValueError(f"{claim.id} has no method of ours: give it a specification")
    held = truth(claim.report.model, claim.specification)
    return held.codes or read_by_a_pass(about, Convention())


def _also(convention: Convention, about: Anatomy, names: tuple[str, ...]) -> str:
    """Whether other tensors at the same width give the same bytes: then the figure cannot tell them apart."""
    other = replace(convention, quantized=(replace(convention.quantized[0], tensors=names),))
    same = count(about, other).total == count(about, convention).total
    return f"{' and '.join(names)} instead would give {'the same bytes' if same else 'other bytes'}"


def _rotary(claim: Claim, convention: Convention, about: Anatomy) -> str:
    with_them = count(about, replace(convention, rotary=ROTARY[1]))
    if claim.printed(with_them.total) == claim.printed(count(about, convention).total):
        return f"{with_them.rotary:,} bytes of rotary buffers would not show at this precision"
    return f"with {with_them.rotary:,} bytes of rotary buffers it would print {claim.printed(with_them.total)}"


def _difference(claim: Claim, about: Anatomy, found: Count) -> str:
    """Every term between storage and the published count, in bytes that add up exactly."""
    held = truth(claim.report.model, claim.specification)
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
