"""Runs an artefact where it ships. Knows files, not our modules."""
