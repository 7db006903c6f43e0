"""Distances of generated images to real ones, and bits per dimension."""
