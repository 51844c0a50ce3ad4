"""AWQ (Lin et al. 2023, arXiv:2306.00978) by llm-compressor: weights are scaled by activation size before rounding."""

from harness.llmcompressor_layers import llmcompressor_method

METHOD = llmcompressor_method("llmc-awq-int4", "AWQ by llm-compressor, symmetric int4 in blocks", "awq")
