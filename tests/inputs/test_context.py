"""The context that a model really reads."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from harness.inputs.models.context import context_of


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (transformers.LlamaConfig(max_position_embeddings=256), 256),
        (transformers.GPT2Config(n_positions=128), 128),
        (transformers.MptConfig(max_seq_len=256), 256),  # its biases are a table of so many positions
        (transformers.RwkvConfig(context_length=512), 512),
        (transformers.WhisperConfig(max_target_positions=448), 448),
        (transformers.RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),  # positions start at 2
        (transformers.OPTConfig(max_position_embeddings=128), 128),  # its table has two rows more of itself
        (transformers.BloomConfig(), None),
        (transformers.MambaConfig(), None),
        (transformers.XLNetConfig(), None),  # -1
        (None, None),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else str(value),
)
def test_the_context_is_what_the_table_of_positions_holds(config: Any, tokens: int | None) -> None:
    assert context_of(config) == tokens


def test_a_roberta_reads_its_whole_context_and_no_more() -> None:
    sizes: Any = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.RobertaConfig(
        vocab_size=9, max_position_embeddings=20, pad_token_id=1, is_decoder=True, **sizes
    )
    model = transformers.RobertaForCausalLM(config).eval()
    context = context_of(config)
    assert context == 18
    ids = model.dummy_inputs["input_ids"].new_full((1, context), 5)
    assert model(input_ids=ids).logits.shape[1] == context
    with pytest.raises((IndexError, RuntimeError)):  # whichever table ends first
        model(input_ids=ids.new_full((1, context + 1), 5))
