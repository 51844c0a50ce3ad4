"""What quantizers do to numbers, bytes and models."""
