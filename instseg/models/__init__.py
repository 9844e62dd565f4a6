"""Semantic networks, and the whole network of Figure 2."""
