"""Weights of other codebases."""
