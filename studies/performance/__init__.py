"""How fast the harness is, beside its peers and the machine's limits."""
