"""From options to rows: the plan, processes and machines that measure it, and the commands."""
