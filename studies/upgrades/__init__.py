"""What moves between releases of a library."""
