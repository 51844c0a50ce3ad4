"""Texts, from a name to windows of tokens under a protocol."""
