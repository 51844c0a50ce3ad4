"""optimum-quanto's int8 weights: symmetric, one scale an output channel."""

from harness.quanto_layers import quanto_method

METHOD = quanto_method("quanto-int8", "optimum-quanto int8 weights, a scale per output channel", 8, "qint8")
