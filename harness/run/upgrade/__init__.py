"""What an upgrade changes: one environment a side, the same cases on each in turn, and one report."""
