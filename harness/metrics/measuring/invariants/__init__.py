"""What must hold of a method whatever the version of its library."""
