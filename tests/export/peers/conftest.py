"""The scripts here import libraries that are not installed for tests."""

collect_ignore_glob = ["*.py"]
