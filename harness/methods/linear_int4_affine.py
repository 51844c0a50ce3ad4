"""Asymmetric int4 in blocks: s = (max - min) / 15, q = round((w - min) / s) in 0..15, w' = q s + min.

The zero point is kept as the block's minimum in fp32: a whole-number zero point would move the grid, this one hits
min and max exactly and reproduces any affine 4-bit grid of the same blocks (GGUF's Q4_1: w = q d + m) that uses its
end codes. Ties round to even. |w - w'| <= s / 2.
"""

from harness.methods.quantizing.int4 import AffineSteps4
from harness.methods.quantizing.weight_method import weight_method

CODES = AffineSteps4()
METHOD = weight_method(
    name="linear-int4-affine",
    summary="asymmetric int4 in blocks, minimum and step",
    bits=4,
    codes=CODES,
    grid="affine4:32",  # with block=32: lossless where the weights were stored so; other blocks straddle that grid
)
