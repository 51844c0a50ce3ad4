"""The checks on a whole (tiny) model, through the method's own loader. Each loads its own copies: nothing is shared."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from harness.core import catalog
from harness.core.contracts import Subject
from harness.core.errors import HarnessError
from harness.core.records import Figure
from harness.inputs.models import checkpoints, sizes
from harness.inputs.models.checkpoints import TORCH_DTYPES
from harness.methods.quantizing import bnb
from harness.metrics.measuring.checks import equal, relative, smaller, within
from harness.metrics.measuring.layer_checks import PRODUCT, PRODUCT_INT8, ROW, SEED

TOKENS, BATCH = 32, 4
MODULE_ROWS = 8


def load(subject: Subject) -> nn.Module:
    """A fresh copy of the model, quantized, before any forward."""
    return subject.method.load(subject.checkpoint, subject.arguments, subject.case.device)


def ids(subject: Subject, batch: int = BATCH) -> Tensor:
    """(batch, 32) seeded token ids."""
    words = checkpoints.read_config(subject.checkpoint).vocab_size
    return torch.randint(0, words, (batch, TOKENS), generator=torch.Generator().manual_seed(SEED))


def run(model: nn.Module, tokens: Tensor) -> Tensor:
    """(batch, 32, vocabulary) logits in fp32 on the host."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        return model(input_ids=tokens.to(device), use_cache=False).logits.float().cpu()  # type: ignore[no-any-return]


def nll(logits: Tensor, tokens: Tensor) -> float:
    """Mean NLL of the tokens behind the first, nats."""
    predicted = logits[:, :-1].flatten(0, 1)
    return float(nn.functional.cross_entropy(predicted, tokens[:, 1:].flatten()))


def product(subject: Subject) -> Figure:
    """Every quantized module against a plain product with its dequantized weight."""
    model = load(subject)
    int8 = getattr(bnb.format_of(subject.method), "int8", False)
    errors = {}
    for weight in subject.method.quantized(model):
        module: Any = model.get_submodule(weight.name)
        kept = weight.dequantize().float().cpu()
        kept = kept.T if weight.kind == Conv1D.__name__ else kept  # (out, in)
        x = torch.randn(MODULE_ROWS, kept.shape[1], generator=torch.Generator().manual_seed(SEED))
        bias = 0.0 if module.bias is None else module.bias.double().cpu()
        with torch.inference_mode():
            y = module(x.to(subject.device.torch_device, TORCH_DTYPES[subject.arguments.dtype])).cpu()
        errors[weight.name] = relative(y, x.double() @ kept.double().T + bias)
    worst = max(errors, key=lambda name: errors[name])
    return within(errors[worst], PRODUCT_INT8 if int8 else PRODUCT[subject.arguments.dtype], module=worst)


def saved(after: bool, subject: Subject) -> Figure:
    """`save_pretrained` before or after the first forward, and the loaded copy's logits and NLL."""
    model, tokens = load(subject), ids(subject)
    first = run(model, tokens) if after else None
    with tempfile.TemporaryDirectory() as folder, checkpoints.quiet():
        model.save_pretrained(folder)  # type: ignore[operator]  # a PreTrainedModel
        wanted = first if first is not None else run(model, tokens)
        after_loading = run(reopened(subject, Path(folder)), tokens)
    return equal(after_loading, wanted, nll=nll(after_loading, tokens), nll_before=nll(wanted, tokens))


def reopened(subject: Subject, folder: Path) -> nn.Module:
    """The model of a folder that `save_pretrained` wrote, quantized as it lies there."""
    device = {"": subject.case.device}
    options: dict[str, Any] = {
        "dtype": TORCH_DTYPES[subject.arguments.dtype],
        "attn_implementation": checkpoints.ATTENTION,
    }
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, device_map=device, **options)
    return model.eval()  # type: ignore[no-any-return]


def state_dict(subject: Subject) -> Figure:
    """Logits before and after `state_dict()` behind a forward."""
    model, tokens = load(subject), ids(subject)
    before = run(model, tokens)
    model.state_dict()
    after = run(model, tokens)
    return equal(after, before, nll=nll(after, tokens), nll_before=nll(before, tokens))


def rows(subject: Subject) -> Figure:
    """Each text alone against itself in a batch."""
    model, tokens = load(subject), ids(subject)
    together = run(model, tokens)
    return within(max(relative(run(model, tokens[i : i + 1]), together[i : i + 1]) for i in range(BATCH)), ROW)


def eval_again(subject: Subject) -> Figure:
    """The same logits after train() and eval()."""
    model, tokens = load(subject), ids(subject)
    before = run(model, tokens)
    model.train()
    model.eval()
    return equal(run(model, tokens), before)


def run_twice(subject: Subject) -> Figure:
    """The same logits twice."""
    model, tokens = load(subject), ids(subject)
    before = run(model, tokens)
    return equal(run(model, tokens), before)


def moved(subject: Subject) -> Figure:
    """A forward on the CPU, then a move to the case's device: the same logits as without it."""
    tokens = ids(subject)
    wanted = run(load(subject), tokens)
    model = subject.method.load(subject.checkpoint, subject.arguments, "cpu")
    run(model, tokens)
    return equal(run(model.to(subject.device.torch_device), tokens), wanted)


def double(after: bool, subject: Subject) -> Figure:
    """Storage with double quantization over that of the same method without."""
    plain = catalog.methods().get(subject.method.name.removesuffix("-dq"))
    if plain is None:
        raise HarnessError(f"{subject.method.name} has no method without double quantization to stand beside")
    held = []
    for method in (subject.method, plain):
        model = method.load(subject.checkpoint, subject.arguments, subject.case.device)
        if after:
            run(model, ids(subject, 1))
        held.append(sizes.storage_bytes(model))
    return smaller(*held)


def skip_list(subject: Subject) -> Figure:
    """A user's own skip list, which names one module and not the head: is the head left as it is?"""
    format = bnb.format_of(subject.method)
    if format is None:
        raise HarnessError(f"{subject.method.name} takes no skip list")
    plain = checkpoints.sketch_model(checkpoints.read_config(subject.checkpoint), subject.arguments.dtype)
    first = subject.method.targets(plain, subject.arguments)[0]
    config = bnb.configuration(bnb.options(format, replace(subject.arguments), [first]))
    model: Any = checkpoints.open_model(
        subject.checkpoint, subject.arguments.dtype, subject.case.device, quantization_config=config
    )
    head = model.get_output_embeddings()
    quantized = not head.weight.is_floating_point()
    return within(float(quantized), 0, head=type(head).__name__, skipped=first)


CHECKS: dict[str, Callable[[Subject], Figure]] = {
    "product.fp32": product,
    "saved_before": functools.partial(saved, False),
    "state_dict": state_dict,
    "saved_after": functools.partial(saved, True),
    "rows": rows,
    "eval_again": eval_again,
    "run_twice": run_twice,
    "moved": moved,
    "double_before": functools.partial(double, False),
    "double_after": functools.partial(double, True),
    "skip_list": skip_list,
}
