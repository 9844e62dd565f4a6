"""Memory on a CPU that is kept for the next image, up to a limit, and given out again.

New memory is cleared page by page when it is first written to, which takes as long as a mean-field step on it; on a
virtual machine often several times as long. Torch does the same for GPUs.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from math import prod
from threading import Lock

import numpy as np
import torch
from torch import Tensor

_SMALL = 1 << 20  # bytes below which the C library does well
_KEPT = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 16  # bytes kept at most
_HUGE_PAGE = 1 << 21
_LOCK = Lock()
_free: list[np.ndarray] = []  # the one returned last is last


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


def _take(size: int) -> np.ndarray:
    """Bytes, from `size` to twice as many: the fewest that there are, or new ones."""
    with _LOCK:
        fitting = [index for index, memory in enumerate(_free) if size <= memory.nbytes <= 2 * size]
        if fitting:
            return _free.pop(min(fitting, key=lambda index: _free[index].nbytes))
    # NumPy asks for huge pages, which only whole ones of them can be: hence the bounds.
    size = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    memory = np.empty(size + _HUGE_PAGE, np.uint8)
    start = -memory.ctypes.data % _HUGE_PAGE
    return memory[start : start + size]


def _give_back(memory: np.ndarray) -> None:
    with _LOCK:
        _free.append(memory)
        total = sum(memory.nbytes for memory in _free)
        while total > _KEPT:
            total -= _free.pop(0).nbytes
