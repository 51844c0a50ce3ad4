"""Figures of LLM quantization: reports, comparisons and predictions, without pytest."""
