"""A GGUF file of format Q8_0: int8 codes in blocks of 32, fp16 step."""

from harness.gguf_method import gguf_method

METHOD = gguf_method("Q8_0", "GGUF Q8_0: int8 codes in blocks of 32, fp16 step", bits=8)
