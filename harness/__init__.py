"""A reproducibility harness for LLM quantization: methods x metrics x models, as pytest cases."""

__version__ = "0.1.0"
