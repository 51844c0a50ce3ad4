"""How many tokens a model reads at once, from its configuration alone. No torch."""

from __future__ import annotations

from typing import Any

# What configurations call the length of their table of positions, or the length that a model was made for.
NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
# Their positions start behind the id of padding, so that the table's first rows are never read (fairseq's numbering).
BEHIND_PADDING = frozenset(
    "camembert data2vec-text prophetnet roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod".split()
)


def text_config(config: Any) -> Any:
    """The part of a configuration that describes the model of text; itself where it has no parts."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def context_of(config: Any) -> int | None:
    """Tokens that one window can hold; None where the configuration sets no limit (recurrent and relative models).

    Args:
        config: of transformers, of the model whole; None of a module without one.
    """
    text = text_config(config)
    declared = (getattr(text, name, None) for name in NAMES)
    rows = next((value for value in declared if isinstance(value, int) and value > 0), None)  # XLNet declares -1
    if rows is None or getattr(text, "model_type", "") not in BEHIND_PADDING:
        return rows
    return rows - (text.pad_token_id or 0) - 1
