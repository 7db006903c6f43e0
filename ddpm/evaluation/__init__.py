"""How far drawn images are from real ones, and bits per dimension."""
