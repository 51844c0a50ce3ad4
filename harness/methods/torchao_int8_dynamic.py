"""torchao's int8 dynamic: weights as in torchao-int8, activations int8 too, a scale a token found at each forward."""

from harness.torchao_layers import torchao_method

METHOD = torchao_method(
    "torchao-int8-dynamic",
    "torchao int8 weights and activations, scales per channel and token",
    8,
    "Int8DynamicActivationInt8WeightConfig",
)
