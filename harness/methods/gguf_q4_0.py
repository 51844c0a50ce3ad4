"""A GGUF file of format Q4_0: 4-bit codes in blocks of 32, fp16 step."""

from harness.gguf_method import gguf_method

METHOD = gguf_method("Q4_0", "GGUF Q4_0: 4-bit codes in blocks of 32, fp16 step", bits=4)
