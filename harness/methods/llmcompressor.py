"""GPTQ and AWQ of llm-compressor: the library finds codes and steps, the harness keeps and runs them.

The library's model holds fp32 numbers on the grid that it found; codes and steps are read off them into layers of our
own in a fresh model, so that bytes are those of 4-bit codes and nothing of the library's stays in the forward. What
AWQ folds into other weights (norms, projections before) is taken over too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from harness.core.contracts import Arguments, Checkpoint, Method
from harness.methods.quantizing.weight_method import as_linear, calibrated_method

if TYPE_CHECKING:  # annotations only
    from torch import Tensor

DAMP = 0.01  # of the mean diagonal of the inputs' second moments: the paper's


def llmcompressor_method(name: str, summary: str, modifier: str) -> Method:
    """The method of one of the library's modifiers: 'gptq' or 'awq'."""

    def calibrate(
        model: Any, names: list[str], windows: list[Tensor], checkpoint: Checkpoint, arguments: Arguments, device: str
    ) -> None:
        """The library works on a model of its own; its codes come into layers of ours."""
        import torch

        from harness.inputs.models import checkpoints
        from harness.methods.quantizing import gptq, stored

        block = int(arguments.values["block"])
        other: Any = checkpoints.open_model(checkpoint, arguments.dtype, device)
        for target in names:
            other.set_submodule(target, as_linear(other.get_submodule(target)))
        run(other, names, windows, modifier, block)
        theirs = dict(other.named_parameters())
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.rpartition(".")[0] not in names or not key.endswith(".weight"):
                    parameter.copy_(theirs[key])
        for target in names:
            layer: Any = other.get_submodule(target)
            weight, scale = layer.weight.detach().float(), layer.weight_scale.detach().float()  # (out, in / block)
            codes = (weight.unflatten(1, (-1, block)) / scale[..., None]).round().clamp(-8, 7).flatten(1)  # (out, in)
            kept = gptq.packed(codes, scale)
            stored.apply(model, gptq.recipe(name, block, kept), [target])

    return calibrated_method(name=name, summary=summary, calibrate=calibrate, requires=("llmcompressor",))


def run(model: Any, names: Sequence[str], windows: Sequence[Tensor], modifier: str, block: int) -> None:
    """The library's one-shot calibration of a model in place."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    arguments = QuantizationArgs(num_bits=4, strategy="group", group_size=block, symmetric=True)
    groups = {"all": QuantizationScheme(targets=list(names), weights=arguments)}
    recipes = {
        "gptq": lambda: [GPTQModifier(config_groups=groups, block_size=128, dampening_frac=DAMP)],
        "awq": lambda: [AWQModifier(), QuantizationModifier(config_groups=groups)],
    }
    ids = [window[0].tolist() for window in windows]
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    with without_pinning():
        oneshot(
            model=model,
            dataset=data,
            recipe=recipes[modifier](),
            max_seq_length=len(ids[0]),
            num_calibration_samples=len(ids),
            shuffle_calibration_samples=False,
            pipeline="sequential",
        )


@contextlib.contextmanager
def without_pinning() -> Iterator[None]:
    """Within, the library leaves host memory as it is: it would pin it on machines that have no accelerator too."""
    import torch
    from llmcompressor.pipelines.cache import IntermediatesCache

    if torch.cuda.is_available():
        yield
        return
    library = IntermediatesCache.pin_memory
    IntermediatesCache.pin_memory = lambda self, index: None
    try:
        yield
    finally:
        IntermediatesCache.pin_memory = library


METHODS = (
    # symmetric int4 codes in groups of a row, calibrated; beside it stands our own `gptq-int4`
    llmcompressor_method("llmc-gptq-int4", "GPTQ by llm-compressor, symmetric int4 in blocks", "gptq"),
    # AWQ (Lin et al. 2023, arXiv:2306.00978): weights are scaled by activation size before rounding
    llmcompressor_method("llmc-awq-int4", "AWQ by llm-compressor, symmetric int4 in blocks", "awq"),
)
