"""Scoring: AP^r and mean IoU in pure NumPy, over Ray actors, into a report."""
