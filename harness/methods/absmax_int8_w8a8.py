"""absmax-int8's weights with activations quantized too (w8a8): the quickest int8 product, and a lossier one.

Weights: s_w = max|w| / 127 an output channel, q = round(w / s_w). Activations, at every call: s_x = max|x| / 127 a
token, a = round(x / s_x). y = s_x s_w sum(a q), the sum in whole numbers (int32) and so exact. No token's figures
depend on another's. A token with one large channel loses its small ones, which is what LLM.int8's outlier columns are
for. Packed experts multiply in their own way, and are refused. Not in the core list: it is planned when named.
"""

from harness.methods.quantizing.int8 import Rows8By8
from harness.methods.quantizing.weight_method import weight_method

CODES = Rows8By8()
METHOD = weight_method(
    name="absmax-int8-w8a8",
    summary="symmetric int8, one scale an output channel; activations int8 too, one scale a token",
    bits=8,
    codes=CODES,
    core=False,
)
