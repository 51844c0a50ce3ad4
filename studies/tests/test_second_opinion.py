"""What the second opinion calls near, alike and noticed; made-up sessions, and one real method that is frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from studies.performance import second_opinion
from studies.performance.second_opinion import METHODS, PEAKS, SEEDED, TIMES


def results(**changed: float) -> dict[str, Any]:
    """Rounds in which both sides agree, but for bf16's prefill by the harness and fp32's times under a cause."""
    figures = {**dict.fromkeys((*TIMES, "load"), 0.1), **dict.fromkeys(PEAKS, 2.0**30), "crowded": False}
    runs = {method: {side: [figures, figures] for side in ("plain", "harness")} for method in METHODS}
    runs["bf16"] = {
        "plain": [{**figures, "prefill": 0.05}] * 2,
        "harness": [{**figures, "prefill": changed.get("ours", 0.05)}] * 2,
    }
    causes = {
        cause: {"harness": [{what: changed.get(cause, 0.1), "crowded": False}] * 2}
        for cause, (_, _, what, _) in SEEDED.items()
    }
    return {"second": {**runs, **causes}}


def lines(page: str, *words: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith("|") and all(word in line for word in words)
    ]


@pytest.mark.parametrize(
    ("ours", "near", "alike"), [(0.051, "yes", "yes"), (0.07, "**no**", "yes"), (0.12, "**no**", "**no**")]
)
def test_what_lies_far_from_the_script_is_said(ours: float, near: str, alike: str) -> None:
    page = second_opinion.render(results(ours=ours))
    first, second = lines(page, "`bf16`", "prefill")
    assert first[-1] == near
    assert second[-2] == alike
    assert second[-1] == ("yes" if ours == 0.05 else "**no**")


def test_a_cause_that_is_not_noticed_is_said() -> None:
    page = second_opinion.render(results(asleep=0.16, frozen=0.104))
    assert lines(page, "sleep")[0][-1] == "yes"
    assert lines(page, "gradients")[0][-1] == "**no**"


def test_the_frozen_model_is_a_method_of_a_users_file(tmp_path: Path) -> None:
    space: dict[str, Any] = {}
    exec(second_opinion.FROZEN, space)
    method = space["METHOD"]
    assert method.name == "frozen-fp32"
    from transformers import LlamaConfig, LlamaForCausalLM

    from harness.core.contracts import Arguments, Checkpoint

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).save_pretrained(tmp_path)
    model = method.load(Checkpoint("m", tmp_path, ""), Arguments("fp32"), "cpu")
    assert not any(one.requires_grad for one in model.parameters())
