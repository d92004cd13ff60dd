"""What recoup promises, held against it."""
