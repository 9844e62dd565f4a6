"""Benchmarks are scripts, not timed tests."""
