"""Symmetric int8, one scale a tensor: s = max|w| / 127, q = round(w / s) in -127..127, w' = q s.

One outlier coarsens the whole tensor, which is what the per-channel scale of absmax-int8 is for. Ties round to even.
Weights only: the product is that of absmax-int8, `compute=bf16` included.
"""

from harness.methods.quantizing.int8 import Tensor8
from harness.methods.quantizing.weight_method import weight_method

CODES = Tensor8()
METHOD = weight_method(name="absmax-int8-tensor", summary="symmetric int8, one scale a tensor", bits=8, codes=CODES)
