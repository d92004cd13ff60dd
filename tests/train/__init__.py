"""The loop, its losses and its parameter groups."""
