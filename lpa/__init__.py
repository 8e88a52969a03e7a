"""What the model and the training loop use and a reader may skip at first: one job per file."""
