"""Semantic networks, the whole network of Figure 2, and its checkpoints."""
