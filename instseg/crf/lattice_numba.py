"""The lattice on a CPU: loops compiled by numba, run on as many threads as torch uses.

Every loop writes each of its rows once, from a sum in a fixed order, so results are the same, bit for bit, at any
number of threads. The first call on a machine compiles; later processes read numba's cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import config as numba_config
from numba import set_num_threads
from torch import Tensor

from instseg.crf import build_loops, filter_loops as loops
from instseg.crf.lattice import deviations
from instseg.crf.simd import LANES

if TYPE_CHECKING:
    from instseg.crf.lattice import Blur, Lattice

_LOCK = Lock()
_CACHE_LINE = 64  # bytes
_SMALL = 1 << 14  # elements below which another thread costs more than it saves


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """As `lattice_torch.empty`, by NumPy: it asks for huge pages, without which new memory costs as much as the work."""
    return torch.from_numpy(np.empty(shape, _numpy(torch.empty(0, dtype=dtype or like.dtype)).dtype))


def empty_rows(num_rows: int, num_labels: int, like: Tensor) -> Tensor:
    """As `lattice_torch.empty_rows`: rows lie a whole number of vectors apart, from the start of a cache line."""
    stride = _stride(num_labels)
    flat = empty((num_rows * stride + _CACHE_LINE,), like)
    start = -flat.data_ptr() % _CACHE_LINE // flat.element_size()
    return flat.as_strided((num_rows, num_labels), (stride, 1), start)


def copy_rows(values: Tensor) -> Tensor:
    """As `lattice_torch.copy_rows`. The padding becomes 0: what lay there could be denormal, and hundreds of times slower."""
    rows = empty_rows(*values.shape, values)
    padded = rows.as_strided((len(rows), _stride(rows.shape[1])), rows.stride(), rows.storage_offset())
    padded[:, rows.shape[1] :] = 0
    return rows.copy_(values)


def splat(lattice: Lattice, values: Tensor) -> Tensor:
    """As `lattice_torch.splat`."""
    on_vertices = empty_rows(lattice.num_vertices + 1, values.shape[1], values)
    _rows(on_vertices)[-1] = 0
    offsets = lattice.splat_offsets.numpy()
    # Vertices in parts that have equally many points.
    bounds = np.searchsorted(offsets, even_bounds(int(offsets[-1]), values.shape[1]))
    bounds[-1] = lattice.num_vertices
    arrays = (offsets, *map(_numpy, (lattice.splat_points, lattice.splat_weights)), *map(_rows, (values, on_vertices)))
    _run(loops.splat, loops.parallel_splat, bounds, *arrays)
    return on_vertices


def blur(blurs: Sequence[Blur], on_vertices: Tensor) -> Tensor:
    """As `lattice_torch.blur`; overwrites its argument."""
    other = empty_rows(*on_vertices.shape, on_vertices)
    first, second = _rows(on_vertices), _rows(other)
    second[-1] = 0
    for start, stop, neighbors in blurs:
        source, target = first, second
        bounds = start + even_bounds(stop - start, on_vertices.shape[1])
        for before, after in neighbors.numpy():
            _run(loops.blur, loops.parallel_blur, bounds, start, before, after, source, target)
            source, target = target, source
        if source is second:
            first[start:stop] = second[start:stop]
    return on_vertices


def mix(blurs: Sequence[Blur], on_vertices: Tensor, matrices: Tensor) -> Tensor:
    """As `lattice_torch.mix`. Not torch's product: its threads spin for milliseconds after it, where ours should run."""
    mixed = empty_rows(*on_vertices.shape, on_vertices)
    _rows(mixed)[-1] = 0
    for (start, stop, _), matrix in zip(blurs, matrices, strict=True):
        bounds = start + even_bounds(stop - start, on_vertices.shape[1])
        _run(loops.mix, loops.parallel_mix, bounds, *map(_rows, (on_vertices, matrix, mixed)))
    return mixed


def slice_rows(lattice: Lattice, on_vertices: Tensor, energy: Tensor) -> Tensor:
    """As `lattice_torch.slice_rows`."""
    out = empty_rows(*energy.shape, energy)
    corners = map(_numpy, (lattice.vertices, lattice.slice_weights))
    arrays = (*corners, *map(_rows, (on_vertices, energy, out)))
    _run(loops.slice_rows, loops.parallel_slice_rows, even_bounds(*out.shape), *arrays)
    return out


def update(lattice: Lattice, on_vertices: Tensor, energy: Tensor) -> Tensor:
    """As `lattice_torch.update`."""
    if energy.dtype != torch.float32:  # the compiled exponential is a float32 one
        return (-slice_rows(lattice, on_vertices, energy)).softmax(1)
    return _softmax(lattice.vertices, lattice.slice_weights, on_vertices, energy)


def softmax(energy: Tensor) -> Tensor:
    """As `lattice_torch.softmax`."""
    if energy.dtype != torch.float32:
        return (-energy).softmax(1)
    no_corners = torch.empty(len(energy), 0)
    return _softmax(no_corners.int(), no_corners, energy, energy)


def softmax_backward(q: Tensor, grad: Tensor) -> Tensor:
    """As `lattice_torch.softmax_backward`."""
    out = empty_rows(*q.shape, q)
    arrays = map(_rows, (q, grad, out))
    _run(loops.softmax_backward, loops.parallel_softmax_backward, even_bounds(*q.shape), q.shape[1], *arrays)
    return out


def sort_by_vertex(vertices: Tensor, weights: Tensor, num_vertices: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `lattice_torch.sort_by_vertex`: a counting sort, each thread on its own part of the points."""
    bounds = even_bounds(*vertices.shape)
    counts = np.zeros((len(bounds) - 1, num_vertices), np.int32)
    parts = np.arange(len(bounds))
    parallel_rows(build_loops.count_vertices, parts, bounds, _numpy(vertices), counts)
    offsets = build_loops.offsets_of_counts(counts)
    points, sorted_weights = (empty([vertices.numel()], like) for like in (vertices, weights))
    arrays = map(_numpy, (vertices, weights, points, sorted_weights))
    parallel_rows(build_loops.place_by_vertex, parts, bounds, counts, *arrays)
    return points, sorted_weights, torch.from_numpy(offsets)


def embed(
    features: Tensor, low: Tensor, strides: Tensor, first_vertex: int, ring: bool, vertices: Tensor, weights: Tensor
) -> Tensor:
    """As `lattice_torch.embed`, with vertices numbered in the order in which points touch them."""
    num_points, num_features = features.shape
    scales = torch.tensor(deviations(num_features, features.dtype), dtype=features.dtype)
    keys = empty((num_points, num_features + 1), low)
    bounds = even_bounds(*keys.shape)
    parallel_rows(build_loops.embed, bounds, *map(_numpy, (features.contiguous(), scales, low, strides, weights, keys)))
    steps = (strides.sum() - (num_features + 1) * torch.cat([strides, strides.new_zeros(1)])).numpy()
    table, unique, count = _number_vertices(bounds, _numpy(keys), _numpy(vertices), first_vertex)
    if ring:
        table, unique, count = build_loops.add_ring(steps, table, unique, count)
    neighbors = empty((num_features + 1, 2, count), vertices)
    bounds = even_bounds(count, 2 * num_features)
    parallel_rows(build_loops.find_neighbors, bounds, steps, table, unique, first_vertex, _numpy(neighbors))
    return neighbors


def _number_vertices(bounds: np.ndarray, keys: np.ndarray, vertices: np.ndarray, first_vertex: int) -> Any:
    """Number the keys in the order of their first touch: each part by itself, then the parts' vertices in order.

    That order, and so every later sum, does not depend on where the parts begin.
    """
    parts: list[Any] = [None] * (len(bounds) - 1)

    def number(part: int, _: int) -> None:
        parts[part] = build_loops.number_vertices(bounds[part], bounds[part + 1], keys, vertices)

    parallel_rows(number, np.arange(len(bounds)))
    (table, unique, count), *others = parts
    mappings = [np.arange(count, dtype=np.int32)]
    for _, keys_of_part, count_of_part in others:
        table, unique, count, mapping = build_loops.merge_vertices(keys_of_part[:count_of_part], table, unique, count)
        mappings.append(mapping)
    renumbering = list(zip(bounds[:-1], bounds[1:], mappings, strict=True))

    def renumber(part: int, _: int) -> None:
        build_loops.renumber(*renumbering[part], first_vertex, vertices)

    parallel_rows(renumber, np.arange(len(bounds)))
    return table, unique, count


def parallel_rows(loop: Callable[..., None], bounds: np.ndarray, *arguments: Any) -> None:
    """Run loop(start, stop, *arguments) between consecutive `bounds`, each in a thread: the loops release the GIL."""
    pairs = list(zip(bounds[:-1], bounds[1:], strict=True))
    others = [_pool(len(pairs) - 1, os.getpid()).submit(loop, *pair, *arguments) for pair in pairs[1:]]
    loop(*pairs[0], *arguments)
    for other in others:
        other.result()


def even_bounds(num_rows: int, row_length: int) -> np.ndarray:
    """Where equal parts of some rows start and stop: a part for each thread of torch, or one where the work is small."""
    num_parts = torch.get_num_threads() if num_rows * row_length > _SMALL else 1
    return np.linspace(0, num_rows, num_parts + 1).astype(np.int64)


@cache
def _pool(num_threads: int, process: int) -> ThreadPoolExecutor:  # a forked process has none of its parent's threads
    del process
    return ThreadPoolExecutor(num_threads, "instseg-crf")


def _softmax(vertices: Tensor, weights: Tensor, table: Tensor, energy: Tensor) -> Tensor:
    out = empty_rows(*energy.shape, energy)
    arrays = (*map(_numpy, (vertices, weights)), *map(_rows, (table, energy, out)))
    bounds = even_bounds(*out.shape)
    _run(loops.slice_softmax, loops.parallel_slice_softmax, bounds, out.shape[1], *arrays)
    return out


def _run(serial: Callable[..., None], parallel: Callable[..., None], bounds: np.ndarray, *arguments: Any) -> None:
    """Call a loop on the rows between consecutive `bounds`, in parallel where there are several parts."""
    if len(bounds) == 2:  # no thread: a forked process may have none
        serial(bounds[0], bounds[1], *arguments)
        return
    with _LOCK:  # not every threading layer of numba allows two calls at once
        set_num_threads(min(len(bounds) - 1, numba_config.NUMBA_NUM_THREADS))
        parallel(bounds, *arguments)


def _rows(tensor: Tensor) -> np.ndarray:
    """The padded rows of a tensor that `empty` made, or of a copy of it."""
    num_rows, length = tensor.shape
    stride = _stride(length)
    tensor = tensor.detach()
    end = tensor.storage_offset() + num_rows * stride
    if tensor.stride() != (stride, 1) or end * tensor.element_size() > tensor.untyped_storage().nbytes():
        tensor = copy_rows(tensor)
    return tensor.as_strided((num_rows, stride), (stride, 1)).numpy()


def _stride(num_labels: int) -> int:
    return -(-num_labels // LANES) * LANES


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()
