"""Compiled loops on as many threads as torch uses."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from threading import Lock
from typing import Any

import numpy as np
import torch
from numba import config as numba_config
from numba import get_num_threads, set_num_threads

_SMALL = 1 << 14  # elements below which another thread costs more than it saves
_LOCK = Lock()


def parts(count: int) -> np.ndarray:
    """Where equal parts of a few large things start and stop, one for each thread of torch."""
    return _bounds(count, min(count, torch.get_num_threads()))


def even_bounds(num_rows: int, row_length: int) -> np.ndarray:
    """Where equal parts of some rows start and stop: one for each thread of torch, or a single one of little work."""
    return _bounds(num_rows, torch.get_num_threads() if num_rows * row_length > _SMALL else 1)


@lru_cache(64)  # asked for in every step
def _bounds(count: int, num_parts: int) -> np.ndarray:
    return np.linspace(0, count, num_parts + 1).round().astype(np.int64)


def run(serial: Callable[..., None], parallel: Callable[..., None], bounds: np.ndarray, *arguments: Any) -> None:
    """Call a loop on the rows between consecutive `bounds`, in parallel where there are several parts."""
    if len(bounds) == 2:  # no thread: a forked process may have none
        serial(bounds[0], bounds[1], *arguments)
        return
    with _LOCK:  # not every threading layer of numba allows two calls at once
        most: int = numba_config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue]
        before = get_num_threads()
        set_num_threads(min(len(bounds) - 1, most))
        try:
            parallel(bounds, *arguments)
        finally:
            set_num_threads(before)  # the caller may use numba too
