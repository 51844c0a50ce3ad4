"""NF4 (QLoRA, arXiv 2305.14314, section 3 and appendix E): absmax blocks onto 16 quantiles of N(0, 1).

w' = level[q] max|block|. The levels are quantiles at equal steps of probability, 8 above 0 and 7 below, beside an exact
0, divided by the largest: equally likely codes for normal weights. The sixteen fp32 figures are the paper's, which
bitsandbytes uses too; a test derives them again.
"""

from harness.methods.quantizing.int4 import Blocks4
from harness.methods.quantizing.weight_method import weight_method

LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

CODES = Blocks4(LEVELS)
METHOD = weight_method(name="nf4", summary="4-bit NormalFloat in blocks, absmax scale", bits=4, codes=CODES)
