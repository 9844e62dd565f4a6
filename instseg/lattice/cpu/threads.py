"""Loops on as many threads as torch uses: compiled ones release the interpreter's lock, so Python's threads do."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch

_SMALL = 1 << 14  # elements below which another thread costs more than it saves


def parts(count: int) -> np.ndarray:
    """Where equal parts of a few large things start and stop, one for each thread of torch."""
    return _bounds(count, min(count, torch.get_num_threads()))


def even_bounds(num_rows: int, row_length: int) -> np.ndarray:
    """Where equal parts of some rows start and stop: one for each thread of torch, or a single one of little work."""
    return _bounds(num_rows, torch.get_num_threads() if num_rows * row_length > _SMALL else 1)


def run(loop: Callable[..., None], bounds: np.ndarray, *arguments: Any) -> None:
    """Call loop(start, stop, *arguments) for every pair of consecutive `bounds`, at once; the first on this thread.

    Raises:
        Exception: What one of the calls raised, once all have ended.
    """
    others = [_pool().submit(loop, *part, *arguments) for part in pairwise(bounds[1:])]
    try:
        loop(bounds[0], bounds[1], *arguments)
    finally:
        errors = [other.exception() for other in others]
    for error in filter(None, errors):
        raise error


@lru_cache(64)  # asked for in every step
def _bounds(count: int, num_parts: int) -> np.ndarray:
    return np.linspace(0, count, num_parts + 1).round().astype(np.int64)


@lru_cache(1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "lattice")


if hasattr(os, "register_at_fork"):  # a forked process has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
