"""optimum-quanto's int4 weights: affine, in groups of 128 of a row, fewer where 128 does not divide it."""

from harness.quanto_layers import quanto_method

METHOD = quanto_method("quanto-int4", "optimum-quanto int4 weights, affine in groups", 4, "qint4")
