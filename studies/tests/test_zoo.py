"""The zoo's rules, its processes and its page; `python -m studies.zoo.run --tenth` examines families themselves."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from studies.zoo import examine, run, small
from studies.zoo.examine import METHODS, Found

FINE = Found("llama", "LlamaForCausalLM", attention="sdpa", plain=8.25, perplexity=dict.fromkeys(METHODS, 8.25))


def rows(*found: Found) -> list[dict[str, Any]]:
    return [vars(one) for one in found]


def test_the_list_is_transformers_own() -> None:
    assert list(small.families()) == list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize("family", ["llama", "mpt", "mamba", "gemma3_text", "qwen3_next"])
def test_a_configuration_is_small_and_has_a_layer_of_every_type(family: str) -> None:
    config = small.configuration(family).get_text_config()
    assert (config.vocab_size, config.hidden_size) == (small.VOCABULARY, small.WIDTH)
    types = getattr(config, "layer_types", None) or ["one"]
    assert config.num_hidden_layers == max(small.LAYERS, len(set(types)))


@pytest.mark.parametrize(
    ("end", "why", "seconds"),
    [
        (lambda: None, "", 60.0),
        (lambda: os._exit(11), "its process ended with exit status 11", 60.0),
        (lambda: time.sleep(60), "it took more than 0.5 seconds", 0.5),
    ],
)
def test_a_crash_and_a_hang_are_a_row(
    end: Callable[[], None], why: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def examined(family: str, tell: Callable[[dict[str, Any]], None]) -> None:
        tell(vars(replace(FINE, plain=None)))
        end()

    monkeypatch.setattr(examine, "examine", examined)
    monkeypatch.setattr(run, "LIMIT", seconds)
    assert run.examined("llama")["why"] == why


def test_refusals_are_counted_at_the_head_and_nothing_differs_in_silence() -> None:
    page = run.render(
        {
            "rows": rows(
                FINE,
                replace(FINE, family="gemma2", faults={"batch 3": "1e-3 nat | in the mean"}),
                replace(FINE, family="bert", causal=False, perplexity={}, refused={"fp32": "no causal model"}),
                replace(
                    FINE, family="odd", perplexity={"fp32": 8.25}, refused={"absmax-int8": "packed", "nf4": "packed"}
                ),
                replace(FINE, family="gone", plain=None, why="cannot be built: ValueError: <none>"),
            )
        }
    )
    assert "**5 families: 4 run small in a plain loop, of which 1 look ahead" in page
    assert "of 3 causal ones the harness refuses 1 (33.3%)" in page
    assert "and 1 are as they should be in every check.**" in page
    assert "Refused: `odd`." in page
    assert "batch 3: 1e-3 nat / in the mean" in page
    assert "absmax-int8, nf4: packed" in page
    assert "cannot be built: ValueError: (none)" in page.partition("## Not built small")[2]
