"""A GGUF file of format F16: fp16 numbers."""

from harness.gguf_method import gguf_method

METHOD = gguf_method("F16", "GGUF F16: fp16 numbers", bits=16)
