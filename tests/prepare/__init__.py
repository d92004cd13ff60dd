"""The door in."""
