"""GGUF files: their blocks, metadata and tokenizers, read and written."""
