"""Models, from a name to a plain folder of weights, and what its bytes are."""
