"""What is measured: models and texts, from a name to plain folders, tokens and windows."""
