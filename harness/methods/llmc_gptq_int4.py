"""GPTQ by llm-compressor: symmetric int4 codes in groups of a row, calibrated; beside it stands our own `gptq-int4`."""

from harness.llmcompressor_layers import llmcompressor_method

METHOD = llmcompressor_method("llmc-gptq-int4", "GPTQ by llm-compressor, symmetric int4 in blocks", "gptq")
