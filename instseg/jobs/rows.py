"""The tasks of a job, one for each shard, as the rows that Ray Data sends through the stages."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from instseg.data.shards import ShardTask


def rows_of(tasks: Sequence[ShardTask]) -> Any:
    """A Ray Data set with one row, which is one block, for each task; it prints nothing, as `progress` reports."""
    # Ray Data looks for what has ended every 0.1 s. A thread that fetches metadata of blocks, its default, makes it
    # look twice before a CPU has its next task; here blocks are small, and it gains nothing.
    os.environ.setdefault("RAY_DATA_METADATA_PREFETCH_ON_THREAD", "0")
    import ray.data  # takes seconds, so that --help and a run with nothing to do go without

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray.data.from_items([asdict(task) for task in tasks], override_num_blocks=len(tasks))
