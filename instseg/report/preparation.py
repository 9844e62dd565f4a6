"""What preparing a data set took."""

from __future__ import annotations

from collections.abc import Mapping


def stage_table(seconds: Mapping[str, float], num_images: int) -> str:
    """A line for each stage, aligned.

    Args:
        seconds: Of all workers together, by stage, in the stages' order.
        num_images: That went through the stages; fewer than there are where shards were there already.
    """
    lines = [f"{'stage':<12}{'seconds':>10}{'images/s of a worker':>24}"]
    for stage, taken in seconds.items():
        lines.append(f"{stage:<12}{taken:>10.1f}{num_images / max(taken, 1e-9):>24.2f}")
    return "\n".join(lines)
