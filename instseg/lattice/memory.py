"""Memory on a CPU that is kept for the next image, up to a limit, and given out again.

New memory is cleared page by page when it is first written to, which takes as long as a mean-field step on it; on a
virtual machine often several times as long. Torch does the same for GPUs.
"""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections import deque
from collections.abc import Sequence
from math import prod
from threading import Lock

import numpy as np
import torch
from torch import Tensor

_SMALL = 1 << 20  # bytes below which the C library does well
_KEPT = 1 << 30  # bytes kept at most, if that is not more than a sixteenth of the memory
_HUGE_PAGE = 1 << 21
_LOCK = Lock()
_free: list[np.ndarray] = []  # in the order of their return; changed under the lock only
_returned: deque[np.ndarray] = deque()  # given back, and to be moved to `_free` by whoever holds the lock next


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """As `torch.empty`; the memory comes back when neither the tensor nor any view of it is left."""
    size = prod(shape) * dtype.itemsize
    if size < _SMALL or torch.device(device).type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    memory = _take(size)
    # What all views hold. (Type stubs do not know that arrays, of NumPy and of ctypes, are buffers.)
    owner = (ctypes.c_char * memory.nbytes).from_buffer(memory)  # pyright: ignore[reportArgumentType]
    weakref.finalize(owner, _give_back, memory).atexit = False
    flat = np.frombuffer(owner, np.uint8, size)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return torch.from_numpy(flat).view(dtype).view(tuple(shape))


def total_memory(device: torch.device) -> int:
    """Bytes that a machine, or a GPU, has; on Windows, which says it elsewhere, more than there can be."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if not hasattr(os, "sysconf"):
        return sys.maxsize
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _take(size: int) -> np.ndarray:
    """Bytes, from `size` to twice as many: the fewest that there are, or new ones."""
    with _LOCK:
        _collect()
        fitting = [index for index, memory in enumerate(_free) if size <= memory.nbytes <= 2 * size]
        if fitting:
            return _free.pop(min(fitting, key=lambda index: _free[index].nbytes))
    # NumPy asks for huge pages, which only whole ones of them can be: hence the bounds.
    size = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    memory = np.empty(size + _HUGE_PAGE, np.uint8)
    start = -memory.ctypes.data % _HUGE_PAGE
    return memory[start : start + size]


def _give_back(memory: np.ndarray) -> None:
    """May be called at any time, by garbage collection in the midst of the other functions too: so never waits."""
    _returned.append(memory)
    if _LOCK.acquire(blocking=False):
        try:
            _collect()
        finally:
            _LOCK.release()


def _collect() -> None:
    while _returned:
        _free.append(_returned.popleft())
    total = sum(memory.nbytes for memory in _free)
    limit = min(_KEPT, total_memory(torch.device("cpu")) // 16)
    while total > limit:
        total -= _free.pop(0).nbytes
