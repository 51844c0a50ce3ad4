"""LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339) by bitsandbytes: weights and activations in 8 bits, outliers not.

Weights: row-wise absmax, W^ = CB SCB / 127 with CB = round(127 fp16(W) / SCB). Activations x (rows, in), in a forward:
a = fp16(x); the *outlier columns* O are those where some row has |a| >= threshold; s = the row's largest |a| under the
threshold; q = round(127 a / s), and 0 in O. The product is

    y^ = s SCB / 127^2 * (q CB^T)  +  x[:, O] W^[:, O]^T  +  bias.

**Error against y = x W^^T + bias.** Outside O a code stands for s q / 127, off from a by at most half a step, s / 254,
and the cast puts a within 2^-11 |x| + 2^-25 of x (rounding of normal and of subnormal fp16). Products of codes are
exact in int32. The library writes 1 / 127^2 = 6.2000124e-5 as 6.200124e-5, too large by 1.8e-5 of itself; output,
outlier columns of W^ and their sum are rounded in the model's dtype, unit roundoff u, four roundings in a row. With
A = sum over columns outside O of |W^|, and B = sum over all columns of |x| |W^| + s A + |bias|,

    |y^ - y|  <=  (s / 254 + 2^-25) A  +  (2^-11 + 2e-5 + 4 u) B        for each row and output.

**On a card** the library writes the product of codes in fp16 whatever the model's dtype (and adds an fp16 bias there),
and casts it afterwards: fp32 and bf16 gain nothing on it. One rounding more, 2^-11 B + 2^-25, adds to the bound, which
holds while s SCB / 127^2 * (q CB^T) stays below 65,504. The outlier columns are multiplied in the model's dtype.

s and O depend on the other rows, hence on batch size and padding: measured at batch 1. `threshold=0` splits nothing
off. The bound is worst-case; errors of rounding average out to roughly s / 127 / sqrt(12) * ||W^||_2 instead.
"""

from __future__ import annotations

from harness import bnb

METHOD = bnb.method(
    "bnb-int8", "bitsandbytes LLM.int8: 8-bit weights and activations, outlier columns apart", bnb.Format("llm_int8")
)
