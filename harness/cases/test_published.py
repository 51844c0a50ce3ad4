"""One test a figure of a published report: its verdict, computed again, is the reviewed one.

They run where they are asked for (`-m published`, `-k published`, or this file named), so that a session that
measures does not load torch beside its timed cases. A figure that needs weights is measured where `--models` names
its model, or a local copy of it: `pytest -m published --models gpt2`, `--models gpt2=path:DIR`.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from harness import published
from harness.core.errors import HarnessError
from harness.plugin import state_of
from harness.published import Claim, Finding, Judgement
from harness.published.settling import settle, weights_for


@functools.cache
def judgements(folders: tuple[Path, ...]) -> dict[str, Judgement]:
    """Every verdict by the claim's id, computed once a process."""
    return {judgement.claim.id: judgement for judgement in published.judge(published.read(*folders))}


def folders_of(config: pytest.Config) -> tuple[Path, ...]:
    """Where the session's claims lie."""
    options = state_of(config).options
    return published.places(options.declared, options.baselines)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a claim; a single skipped one where nobody asked."""
    if "published_claim" not in metafunc.fixturenames:
        return
    config = metafunc.config
    asked = any("published" in str(said) for said in (config.option.markexpr, config.option.keyword, *config.args))
    if not asked:
        skipped = pytest.param(None, id="all", marks=pytest.mark.skip(reason="run with -m published"))
        metafunc.parametrize("published_claim", [skipped])
        return
    try:
        claims = published.read(*folders_of(config))
    except HarnessError as error:
        raise pytest.UsageError(str(error)) from error
    metafunc.parametrize("published_claim", [pytest.param(claim, id=claim.id) for claim in claims])


@pytest.mark.published
def test_published(published_claim: Claim, request: pytest.FixtureRequest) -> None:
    """The computed verdict is the reviewed one; a figure whose weights are at hand is reproduced by them."""
    judgement = judgements(folders_of(request.config))[published_claim.id]
    reviewed, absent = published_claim.verdict, ""
    options = state_of(request.config).options
    try:
        needed = judgement.finding is Finding.NEEDS_WEIGHTS and published_claim.metric.startswith("perplexity")
        weights = weights_for(published_claim, options) if needed else None
        if weights is not None:
            judgement, reviewed = settle(judgement, options, weights), Finding.REPRODUCED
    except HarnessError as error:
        absent = f"{published_claim.id}: missing: {error}"
    request.node.user_properties.append(("published_entry", json.dumps(published.entry(judgement))))
    if absent:
        pytest.skip(absent) if options.allow_missing else pytest.fail(absent, pytrace=False)
    if judgement.finding != reviewed:
        where = f"{published_claim.published} {published_claim.unit}"
        pytest.fail(
            f"{published_claim.id}: {where} is {judgement.finding}, not {reviewed}: {judgement.note}", pytrace=False
        )
