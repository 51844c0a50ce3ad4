"""What the verdicts see, and when they keep quiet."""
