"""Reference: the unquantized model in bf16. Weights stored otherwise are cast once, when they are read."""

from harness.weightmethod import reference_method

METHOD = reference_method(name="bf16", summary="bfloat16: 8 bits of exponent, 7 of mantissa", bits=16)
