"""Symmetric int8, one scale an output channel.

s = max|w| / 127, q = round(w / s) in -127..127, w' = q s (LLM.int8's weights, arXiv 2208.07339, section 2.1). Ties
round to even. |w - w'| <= s / 2.

Weights only (w8a16): fp32 activations are never rounded, unless `compute=bf16` asks for it. On a CPU up to eight rows
of fp32 (a token's decode) are multiplied with the codes as they lie: fp32 throughout, the scale after the sum. For more
rows, and in fp16, the weight is dequantized at every call and the product is that of the activations' dtype. In bf16
(`dtype=bf16`), on a processor with bf16 products in tiles (AMX), the product reads the codes as they lie: sums are
rounded to bf16 once. `compute=bf16` rounds activations to bf16 on every processor, and sums too, but for up to eight
rows of fp32 where there is Numba and no AMX; the scale comes after, in fp32. `compute=fused` reads the codes for few
rows of half precision too.
"""

from harness.methods.quantizing.int8 import Rows8
from harness.methods.quantizing.weight_method import weight_method

CODES = Rows8()
METHOD = weight_method(name="absmax-int8", summary="symmetric int8, one scale an output channel", bits=8, codes=CODES)
