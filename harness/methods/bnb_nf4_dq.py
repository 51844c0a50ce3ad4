"""NormalFloat4 with double quantization by bitsandbytes (arXiv:2305.14314, section 3, "Double Quantization").

The absmax values, less their mean, are themselves quantized: to 8 bits in blocks of 256 with an fp32 scale. Against
`bnb-nf4` it saves 3 bytes of 36 a block and costs a code table (1,024 bytes) a weight; processors with AVX512-BF16
undo it at the first forward, which `memory.storage_after` shows.
"""

from __future__ import annotations

from harness import bnb

METHOD = bnb.method("bnb-nf4-dq", "bitsandbytes NF4, its absmax quantized again", bnb.Format("nf4", double=True))
