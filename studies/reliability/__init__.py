"""Sessions that are disturbed, and files and names from strangers."""
