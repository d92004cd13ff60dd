"""From data to ranges."""
