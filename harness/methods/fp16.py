"""Reference: the unquantized model in fp16. Weights stored otherwise are cast once, when they are read."""

from harness.weightmethod import reference_method

METHOD = reference_method(name="fp16", summary="IEEE half precision: 5 bits of exponent, 10 of mantissa", bits=16)
