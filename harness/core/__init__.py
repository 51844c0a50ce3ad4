"""Nouns and plain tools that everybody knows: cases, rows, options, the catalogue, errors, files. No torch."""
