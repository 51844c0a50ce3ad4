"""Studies beside the package, which never imports them; run from the repository root: `python -m studies.gate.run`."""
