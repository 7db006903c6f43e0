"""What a run measures, handed to files, W&B and the person at the terminal."""
