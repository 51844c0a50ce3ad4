"""torchao's int8 weight-only: symmetric int8, one scale an output channel; activations as they are."""

from harness.torchao_layers import torchao_method

METHOD = torchao_method(
    "torchao-int8", "torchao int8 weight-only, a scale per output channel", 8, "Int8WeightOnlyConfig"
)
