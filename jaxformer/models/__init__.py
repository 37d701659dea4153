"""One family, one file."""
