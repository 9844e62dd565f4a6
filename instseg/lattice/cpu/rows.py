"""Rows of labels that are padded to whole vectors, as the compiled loops want them, and their softmax."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from instseg.lattice.cpu import filter_loops, softmax_loops
from instseg.lattice.cpu.simd import LANES
from instseg.lattice.cpu.threads import even_bounds, run
from instseg.lattice.memory import empty

_CACHE_LINE = 64  # bytes


def empty_rows(num_rows: int, like: Tensor) -> Tensor:
    """(num_rows, L of `like`) memory whose rows lie whole vectors apart, from the start of a cache line."""
    num_labels = like.shape[1]
    stride = _stride(num_labels)
    flat = empty((num_rows * stride + _CACHE_LINE,), like.dtype)
    start = -flat.data_ptr() % _CACHE_LINE // flat.element_size()
    return flat.as_strided((num_rows, num_labels), (stride, 1), start)


def copy_rows(values: Tensor) -> Tensor:
    """As `torch_backend.copy_rows`, into `empty_rows`."""
    rows = empty_rows(len(values), values)
    arrays = values.detach().numpy(), _padded(rows)
    run(filter_loops.copy_rows, filter_loops.parallel_copy_rows, even_bounds(len(values), values.shape[1]), *arrays)
    return rows


def as_rows(values: Tensor) -> Tensor:
    """`values` where they lie as in `empty_rows`, else a copy that does."""
    stride = _stride(values.shape[1])
    end = values.storage_offset() + len(values) * stride
    fits = end * values.element_size() <= values.untyped_storage().nbytes()
    return values if fits and values.stride() == (stride, 1) else copy_rows(values)


def padded_rows(tensor: Tensor) -> np.ndarray:
    """(num_rows, whole vectors): the rows of a tensor, or of its copy, the padding included."""
    return _padded(as_rows(tensor))


def softmax(energy: Tensor) -> Tensor:
    """As `torch_backend.softmax`."""
    if energy.dtype != torch.float32:
        return (-energy).softmax(1)
    out = empty_rows(len(energy), energy)
    bounds = even_bounds(len(energy), energy.shape[1])
    arrays = energy.shape[1], *map(padded_rows, (energy, out))
    run(softmax_loops.softmax, softmax_loops.parallel_softmax, bounds, *arrays)
    return out


def softmax_backward(q: Tensor, grad: Tensor) -> Tensor:
    """As `torch_backend.softmax_backward`."""
    out = empty_rows(len(q), q)
    bounds = even_bounds(len(q), q.shape[1])
    arrays = q.shape[1], *map(padded_rows, (q, grad, out))
    run(softmax_loops.softmax_backward, softmax_loops.parallel_softmax_backward, bounds, *arrays)
    return out


def _padded(rows: Tensor) -> np.ndarray:
    stride = _stride(rows.shape[1])
    return rows.detach().as_strided((len(rows), stride), (stride, 1)).numpy()


def _stride(num_labels: int) -> int:
    return -(-num_labels // LANES) * LANES
