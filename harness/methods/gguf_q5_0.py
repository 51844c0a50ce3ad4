"""A GGUF file of format Q5_0: 5-bit codes in blocks of 32, fp16 step."""

from harness.gguf_method import gguf_method

METHOD = gguf_method("Q5_0", "GGUF Q5_0: 5-bit codes in blocks of 32, fp16 step", bits=5)
