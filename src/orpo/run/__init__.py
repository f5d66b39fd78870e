"""The run directory: every file in it, by name, written and read."""
