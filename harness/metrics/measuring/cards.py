"""Before a card computes anything: whether this torch can use it, and at which precision it does.

Both are properties of torch and the driver alone, asked in the process that will compute.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

from harness.core import gpus

CUDA_BUILD = "install a CUDA build of torch (pytorch.org/get-started), or run with --device cpu"


def refusal(cuda: Any = torch.cuda, built_for: str | None = torch.version.cuda) -> str:
    """Why the first visible card cannot be used and what to do, in one line; '' where it can.

    Args:
        cuda: stands in for torch.cuda (tests).
        built_for: CUDA version of this torch, '12.6'; None for a build without CUDA.

    Raises:
        HarnessError: a driver that starts and then answers with an error.
    """
    if cuda.is_available():
        return _kernels(tuple(cuda.get_device_capability()), cuda.get_arch_list())
    cards = gpus.cuda_devices()
    if not cards:
        why = gpus.trouble() or "the driver shows none, see CUDA_VISIBLE_DEVICES"
        return f"no CUDA device: {why}; run with --device cpu, or mend that"
    card = f"{cards[0].name} is there, but this torch ({torch.__version__})"
    if built_for is None:
        return f"{card} is a build for the processor alone: {CUDA_BUILD}"
    try:
        cuda.init()
    except (RuntimeError, AssertionError) as error:
        said = " ".join(str(error).split())
        if "driver" in said and "too old" in said:
            fix = "update it, or install a torch built for an older CUDA"
            return f"{card} needs a newer driver for CUDA {built_for}: {fix}"
        return f"{card} cannot start CUDA ({said[:300]}): see nvidia-smi, or run with --device cpu"
    return f"{card} finds no device: see nvidia-smi, or run with --device cpu"


def _kernels(capability: tuple[int, ...], built: Sequence[str]) -> str:
    """What to do where torch holds no kernels for a card: neither its own code, nor PTX that the driver can compile.

    Code of sm_XY runs on cards of the same X and of Y or more, that of sm_XYa on that card alone; PTX of compute_XY
    on every card from there on.
    """
    for name in built:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", name)
        if not found:
            return ""  # a list that is not understood refuses nobody
        kind, there = found[1], (int(found[2]), int(found[3]))
        later = there <= capability and (kind == "compute" or there[0] == capability[0])
        if there == capability or (later and not found[4]):
            return ""
    if not built:
        return ""
    card = "sm_" + "".join(map(str, capability))
    return (
        f"this torch ({torch.__version__}) has no kernels for the card ({card}; it has {' '.join(built)}): install one "
        "that has (pytorch.org/get-started), or run with --device cpu"
    )


def full_precision() -> dict[str, Any]:
    """Have fp32 products computed as such and sums of half products kept in fp32, and return what torch says of both.

    TF32 rounds the factors of an fp32 product to 11 bits, and containers turn it on through the environment, which
    torch reads when it is imported; what is set here wins. Half products would be summed in half precision where cuBLAS
    splits them, which depends on shape and card.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    product = torch.backends.cuda.matmul
    product.allow_fp16_reduced_precision_reduction = False
    product.allow_bf16_reduced_precision_reduction = False
    return {
        "fp32_products": torch.get_float32_matmul_precision(),
        "tf32": bool(product.allow_tf32 or torch.backends.cudnn.allow_tf32),
        "half_sums_in_half": bool(
            product.allow_fp16_reduced_precision_reduction or product.allow_bf16_reduced_precision_reduction
        ),
    }
