"""A GGUF file of format Q4_1: affine 4-bit codes in blocks of 32, fp16 step and minimum.

Weights that lie on such a grid already come back as they were.
"""

from harness.gguf_method import gguf_method

METHOD = gguf_method(
    "Q4_1", "GGUF Q4_1: affine 4-bit codes in blocks of 32, fp16 step and minimum", bits=4, grid="affine4:32"
)
