"""Asymmetric int8 with an integer zero point, one step an output channel.

s = (max - min) / (2^8 - 1), z = -128 - round(min / s), q = round(w / s) + z in -128..127, w' = (q - z) s. Both
roundings are to even. |w - w'| <= s / 2: where min and max both lie half a step off the grid, q of max is clipped, and
half a step off on its other side.

z keeps whole numbers in fp32: a row that lies far from 0 (a norm's weight) has a zero point beyond int8. A constant
row c has no spread; its step is |c|, which makes it exact.
"""

from harness.methods.quantizing.int8 import ZeroPoints8
from harness.methods.quantizing.weight_method import weight_method

CODES = ZeroPoints8()
METHOD = weight_method(
    name="zeropoint-int8",
    summary="asymmetric int8 with a zero point, one step an output channel",
    bits=8,
    codes=CODES,
)
