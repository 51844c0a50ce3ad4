"""Reference: the unquantized model in fp32. Weights stored otherwise are cast once, when they are read."""

from harness.weightmethod import reference_method

METHOD = reference_method(name="fp32", summary="IEEE single precision, the default reference", bits=32)
