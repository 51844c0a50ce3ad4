"""Memory figures: our count under a report's convention, and what separates it from every byte the model needs."""

from __future__ import annotations

from dataclasses import replace

from harness.core.text import mib
from harness.published.anatomy import Anatomy, anatomy, truth
from harness.published.claims import ROTARY, UNITS, Claim, Convention
from harness.published.conventions import Count, count
from harness.published.conventions import read_by_a_pass as _read
from harness.published.search import explain, search


def counted(claim: Claim) -> tuple[int, str]:
    """Bytes under the claim's convention, and in words how they differ from storage and what else would give them."""
    assert claim.convention is not None
    about = anatomy(claim.report.model)
    found = count(about, claim.convention)
    if claim.convention.only:
        return found.by_dtype[claim.convention.only], ""
    notes = [_difference(claim, about, found)] if claim.specification else []
    notes += [_also(claim, about, names) for names in claim.convention.same_bytes]
    notes += [_rotary(claim, about)] if about.rotary_elements and claim.convention.rotary == "none" else []
    return found.total, "; ".join(note for note in notes if note)


def searched(claim: Claim) -> tuple[int | None, str]:
    """The first count in the whole space that prints as the claim does, or None; and the search in words."""
    found = search(claim.report.model, claim.value, int(UNITS[claim.unit]), claim.digits)
    note = explain(found, claim)
    return (found.hits[0].bytes if found.hits else None), note


def read_by_a_pass(claim: Claim) -> int:
    """Bytes of weights that a pass of the claim's model reads, under the convention of its own memory figure."""
    about = anatomy(claim.report.model)
    if claim.metric.startswith("latency_before"):
        return _read(about, Convention())
    if not claim.specification:
        raise ValueError(f"{claim.id} has no method of ours: give it a specification")
    held = truth(claim.report.model, claim.specification)
    return held.codes or _read(about, Convention())


def _also(claim: Claim, about: Anatomy, names: tuple[str, ...]) -> str:
    """Whether other tensors at the same width give the same bytes: then the figure cannot tell them apart."""
    convention = claim.convention
    assert convention is not None
    other = replace(convention, quantized=(replace(convention.quantized[0], tensors=names),))
    same = count(about, other).total == count(about, convention).total
    return f"{' and '.join(names)} instead would give {'the same bytes' if same else 'other bytes'}"


def _rotary(claim: Claim, about: Anatomy) -> str:
    convention = claim.convention
    assert convention is not None
    with_them = count(about, replace(convention, rotary=ROTARY[1]))
    if claim.printed(with_them.total) == claim.printed(count(about, convention).total):
        return f"{with_them.rotary:,} bytes of rotary buffers would not show at this precision"
    return f"with {with_them.rotary:,} bytes of rotary buffers it would print {claim.printed(with_them.total)}"


def _difference(claim: Claim, about: Anatomy, found: Count) -> str:
    """Every term between storage and the published count, in bytes that add up exactly."""
    held = truth(claim.report.model, claim.specification)
    assert claim.convention is not None
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
