"""A GGUF file of format Q5_1: affine 5-bit codes in blocks of 32, fp16 step and minimum."""

from harness.gguf_method import gguf_method

METHOD = gguf_method("Q5_1", "GGUF Q5_1: affine 5-bit codes in blocks of 32, fp16 step and minimum", bits=5)
