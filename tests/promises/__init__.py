"""The promises that belong to no single room."""
