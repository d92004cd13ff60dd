"""Float to float, the same function."""
