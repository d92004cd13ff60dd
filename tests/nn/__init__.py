"""The modules that carry numbers."""
