"""4-bit floats by bitsandbytes (one sign, two exponent bits, one mantissa bit) in blocks of 64, absmax in fp32.

The reports call this one "4-bit linear". A product is x code[W]^T absmax in the compute dtype; processors with
AVX512-BF16 compute in bf16 whatever `compute` says (bitsandbytes 0.49 and later, from the first forward on), and there
each weight needs out % 32 == 0 and in % 64 == 0.
"""

from __future__ import annotations

from harness import bnb

METHOD = bnb.method("bnb-fp4", "bitsandbytes FP4 in blocks of 64", bnb.Format("fp4"))
