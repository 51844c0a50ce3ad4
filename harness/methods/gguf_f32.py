"""A GGUF file of format F32: fp32 numbers: what the other formats are compared with."""

from harness.gguf_method import gguf_method

METHOD = gguf_method("F32", "GGUF F32: fp32 numbers: what the other formats are compared with", bits=32)
