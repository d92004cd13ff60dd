"""Data that a user wrote: names, recipes, plans."""
