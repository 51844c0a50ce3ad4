"""FP4 as bitsandbytes defines it: absmax blocks onto a 4-bit float of sign, two bits of exponent, one of mantissa.

w' = level[q] max|block|. Magnitudes over 12: 0, 1/16 (the one subnormal, 0.0052083), 2, 3, 4, 6, 8, 12; the sign is bit
8. Its two zeros (codes 0 and 8) stand for the same value: bitsandbytes spells small values differently by version and
device, ours as its CPU code of 0.50 does.
"""

from harness.methods.quantizing.int4 import Blocks4
from harness.methods.quantizing.weight_method import weight_method

MAGNITUDES = tuple(twelfths / 12 for twelfths in (0, 0.0625, 8, 12, 4, 6, 2, 3))  # in the order of the codes
LEVELS = (*MAGNITUDES, *(-magnitude for magnitude in MAGNITUDES))

CODES = Blocks4(LEVELS)
METHOD = weight_method(name="fp4", summary="4-bit float in blocks, absmax scale", bits=4, codes=CODES)
