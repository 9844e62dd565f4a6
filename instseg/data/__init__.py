"""Readers of data sets and of other systems' outputs, and the prepared data directory."""
