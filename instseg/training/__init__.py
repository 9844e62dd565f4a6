"""Losses, the training loop of a worker, the driver, and checkpoints."""
