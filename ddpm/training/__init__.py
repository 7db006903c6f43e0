"""One optimizer step, the loop around it, averages and checkpoints."""
