"""Scoring in pure NumPy: AP^r and mean IoU."""
