"""What runs an artefact."""
