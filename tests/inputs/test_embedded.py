"""The embedded model, converted at first use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.core.options import Declared
from harness.core.specification import parse
from harness.inputs.models import checkpoints
from harness.inputs.models.names import EMBEDDED_SHA256

PARAMETERS = 134_515_008


def test_the_embedded_model_is_what_it_should_be(tmp_path: Path) -> None:
    checkpoint = checkpoints.materialise(parse("smollm2-135m"), Declared(tmp_path))
    assert checkpoint.grid == "affine4:32"
    assert "stored as Q4_1, affine 4-bit in blocks of 32, before they became" in checkpoint.note
    assert EMBEDDED_SHA256[:16] in checkpoint.directory.name
    model: Any = checkpoints.open_model(checkpoint, "fp32", "cpu")
    parameters = list(model.parameters())
    assert sum(parameter.numel() for parameter in parameters) == PARAMETERS
    assert round(4 * PARAMETERS / 2**20, 2) == 513.13
    assert sum(parameter.numel() * parameter.element_size() for parameter in parameters) == 4 * PARAMETERS
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    sketch: Any = checkpoints.sketch_model(checkpoints.read_config(checkpoint), "fp32")
    assert sketch.get_memory_footprint() == model.get_memory_footprint()


def test_its_weights_lie_on_the_grid_they_were_stored_on(tmp_path: Path) -> None:
    checkpoint = checkpoints.materialise(parse("smollm2-135m"), Declared(tmp_path))
    model: Any = checkpoints.open_model(checkpoint, "fp32", "cpu")
    weight = model.model.layers[3].mlp.down_proj.weight
    for block in weight.flatten().unflatten(0, (-1, 32))[:200]:
        low, high = block.min(), block.max()
        levels = block.unique()
        assert len(levels) <= 16
        steps = levels.diff() / ((high - low) / 15)  # the stored block spans its 16 codes, or fewer
        assert len(levels) < 2 or steps.min() > 0.99


def test_its_tokenizer_is_bytelevel_and_sets_digits_apart(tmp_path: Path) -> None:
    tokenizer: Any = checkpoints.tokenizer(checkpoints.materialise(parse("smollm2-135m"), Declared(tmp_path)))
    text = "In 1999,\n\n12 men said: naïve café"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert tokens[:6] == ["In", "\u0120", "1", "9", "9", "9"]
    assert "\u010a\u010a" in tokens  # a blank line before a digit stays one token
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 49_152)
