"""Symmetric int4 in blocks: s = max|w| / 7, q = round(w / s) in -7..7, w' = q s; stored as q + 8, two to a byte.

The code -8 stays unused, so that the grid is symmetric. Ties round to even. |w - w'| <= s / 2.
"""

from harness.methods.quantizing.int4 import Steps4
from harness.methods.quantizing.weight_method import weight_method

CODES = Steps4()
METHOD = weight_method(name="linear-int4", summary="symmetric int4 in blocks, absmax scale", bits=4, codes=CODES)
