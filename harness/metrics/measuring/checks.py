"""Behaviour that must hold whatever the version: which checks there are, and on what each is run. No torch.

A check is run on one layer of a library (`model` is then `layer`, built here from seeded weights) or on a tiny model,
or both; each is a case of its own with a figure and whether it holds. `metrics.invariant` says what each is.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.core.contracts import Method

LAYER = "layer"  # stands where a case has its model
MODELS = ("tiny-gpt2", "tiny-olmo")
SHAPES = ("63x64", "50x64", "96x64", "64x63", "64x50", "64x96")  # inputs x outputs: 64 fits every block, the other none
DOUBLE = "-dq"  # ends the names of methods that quantize their scales once more


@dataclass(frozen=True)
class Check:
    """One check: where it runs."""

    name: str
    layer: bool = True
    model: bool = True
    library: bool = False  # on a model: only of methods of a library, which has a format to save in
    double: bool = False  # only of methods with double quantization

    def runs(self, model: str, method: Method) -> bool:
        """Whether the check is planned for a method on `layer` or on a model."""
        foreign = "bitsandbytes" in method.requires
        if method.dtype or (self.double and not method.name.endswith(DOUBLE)):  # a reference, or no double quantization
            return False
        if model == LAYER:
            return self.layer and foreign
        return self.model and (foreign or not self.library)


CHECKS = (
    Check("product.fp32"),
    Check("product.bf16", model=False),
    Check("product.fp16", model=False),
    Check("scale", model=False),
    Check("saved_before", library=True),
    Check("state_dict"),
    Check("saved_after", library=True),
    Check("rows"),
    Check("eval_again"),
    Check("run_twice"),
    Check("moved"),
    Check("double_before", library=True, double=True),
    Check("double_after", library=True, double=True),
    *(Check(f"shape.{shape}", model=False) for shape in SHAPES),
    Check("misspelt", model=False),
    Check("skip_list", layer=False, library=True),
)


def metric(check: Check) -> str:
    """The metric's full name: 'invariant.state_dict'."""
    return f"invariant.{check.name}"
