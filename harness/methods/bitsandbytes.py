"""bitsandbytes' methods: LLM.int8, FP4, NF4 and NF4 with double quantization.

# bnb-int8

LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339) by bitsandbytes: weights and activations in 8 bits, outliers not.

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

# bnb-fp4

4-bit floats (one sign, two exponent bits, one mantissa bit) in blocks of 64, absmax in fp32. Some reports call this one
"4-bit linear". A product is x code[W]^T absmax in the compute dtype; processors with AVX512-BF16 compute in bf16
whatever `compute` says (bitsandbytes 0.49 and later, from the first forward on), and there each weight needs
out % 32 == 0 and in % 64 == 0.

# bnb-nf4

NormalFloat4 (Dettmers et al. 2023, arXiv:2305.14314, section 3) in blocks of 64, absmax in fp32. The 16 levels are
quantiles of N(0, 1) scaled to [-1, 1], zero among them. Compute dtypes as of `bnb-fp4`.

# bnb-nf4-dq

NF4 with double quantization (arXiv:2305.14314, section 3, "Double Quantization"): the absmax values, less their mean,
are themselves quantized, to 8 bits in blocks of 256 with an fp32 scale. Against `bnb-nf4` it saves 3 bytes of 36 a
block and costs a code table (1,024 bytes) a weight; processors with AVX512-BF16 undo it at the first forward, which
`memory.storage_after` shows.
"""

from harness.methods.quantizing.bnb import Format, method

METHODS = (
    method(
        "bnb-int8", "bitsandbytes LLM.int8: 8-bit weights and activations, outlier columns apart", Format("llm_int8")
    ),
    method("bnb-fp4", "bitsandbytes FP4 in blocks of 64", Format("fp4")),
    method("bnb-nf4", "bitsandbytes NF4 in blocks of 64", Format("nf4")),
    method("bnb-nf4-dq", "bitsandbytes NF4, its absmax quantized again", Format("nf4", double=True)),
)
