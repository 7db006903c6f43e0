"""Runs of a study: made, read back, compared and reported."""
