"""What a number is, held against oracles that nobody here wrote."""
