"""References: the unquantized model in one dtype. Weights stored otherwise are cast once, when they are read."""

from harness.methods.quantizing.weight_method import reference_method

METHODS = (
    reference_method(name="fp32", summary="IEEE single precision, the default reference", bits=32),
    reference_method(name="bf16", summary="bfloat16: 8 bits of exponent, 7 of mantissa", bits=16),
    reference_method(name="fp16", summary="IEEE half precision: 5 bits of exponent, 10 of mantissa", bits=16),
)
