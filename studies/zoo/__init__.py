"""Every causal architecture of the installed transformers, small, against a plain loop."""
