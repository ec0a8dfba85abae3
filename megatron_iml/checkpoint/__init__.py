"""Native distributed checkpoints, and weights that come in from other formats."""
