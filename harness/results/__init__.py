"""A report directory on disk: its rows, plan and per-token losses, read back. No torch."""
