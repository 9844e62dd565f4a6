"""The lattice on a CPU: loops compiled by numba, run on as many threads as torch uses.

Every loop writes each of its rows once, from a sum in a fixed order, so results are the same, bit for bit, at any
number of threads. The first call on a machine compiles; later processes read numba's cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from instseg.crf import lattice_loops as loops
from instseg.crf.lattice import deviations

if TYPE_CHECKING:
    from instseg.crf.lattice import Blur, Lattice

_SMALL = 1 << 16  # elements below which another thread costs more than it saves


def splat(lattice: Lattice, values: Tensor) -> Tensor:
    """As `lattice_torch.splat`."""
    on_vertices = values.new_empty(lattice.num_vertices + 1, values.shape[1])
    on_vertices[-1] = 0
    offsets = lattice.splat_offsets.numpy()
    # Vertices in parts that have equally many points.
    bounds = np.searchsorted(offsets, even_bounds(int(offsets[-1]), values.shape[1]))
    arrays = (offsets, *map(_numpy, (lattice.splat_points, lattice.splat_weights, values, on_vertices)))
    parallel_rows(loops.splat, np.concatenate([bounds[:-1], [lattice.num_vertices]]), *arrays)
    return on_vertices


def blur(blurs: Sequence[Blur], on_vertices: Tensor) -> Tensor:
    """As `lattice_torch.blur`; overwrites its argument."""
    other = torch.empty_like(on_vertices)
    other[-1] = 0
    for start, stop, neighbors in blurs:
        source, target = on_vertices, other
        bounds = start + even_bounds(stop - start, on_vertices.shape[1])
        for before, after in neighbors.numpy():
            parallel_rows(loops.blur, bounds, start, before, after, _numpy(source), _numpy(target))
            source, target = target, source
        if source is other:
            on_vertices[start:stop] = other[start:stop]
    return on_vertices


def slice_rows(lattice: Lattice, on_vertices: Tensor, energy: Tensor | None) -> Tensor:
    """As `lattice_torch.slice_rows`."""
    if energy is None:
        energy = on_vertices.new_zeros(1, on_vertices.shape[1]).expand(len(lattice.vertices), -1)
    return _pixel_rows(loops.slice_rows, lattice.vertices, lattice.slice_weights, on_vertices, energy)


def update(lattice: Lattice, on_vertices: Tensor, energy: Tensor) -> Tensor:
    """As `lattice_torch.update`."""
    if energy.dtype != torch.float32:  # the compiled exponential is a float32 one
        return (-slice_rows(lattice, on_vertices, energy)).softmax(1)
    return _pixel_rows(loops.slice_softmax, lattice.vertices, lattice.slice_weights, on_vertices, energy)


def softmax(energy: Tensor) -> Tensor:
    """As `lattice_torch.softmax`."""
    if energy.dtype != torch.float32:
        return (-energy).softmax(1)
    no_corners = torch.empty(len(energy), 0, dtype=torch.int32)
    return _pixel_rows(loops.slice_softmax, no_corners, energy.new_empty(len(energy), 0), energy, energy)


def softmax_backward(q: Tensor, grad: Tensor) -> Tensor:
    """As `lattice_torch.softmax_backward`."""
    grad_energy = torch.empty_like(q)
    parallel_rows(loops.softmax_backward, even_bounds(*q.shape), *map(_numpy, (q, grad, grad_energy)))
    return grad_energy


def sort_by_vertex(vertices: Tensor, weights: Tensor, num_vertices: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `lattice_torch.sort_by_vertex`: a counting sort, each thread on its own part of the points."""
    bounds = even_bounds(*vertices.shape)
    counts = np.zeros((len(bounds) - 1, num_vertices), np.int32)
    parts = np.arange(len(bounds))
    parallel_rows(loops.count_vertices, parts, bounds, _numpy(vertices), counts)
    offsets = loops.offsets_of_counts(counts)
    points = torch.empty(vertices.numel(), dtype=torch.int32)
    sorted_weights = weights.new_empty(vertices.numel())
    arrays = map(_numpy, (vertices, weights, points, sorted_weights))
    parallel_rows(loops.place_by_vertex, parts, bounds, counts, *arrays)
    return points, sorted_weights, torch.from_numpy(offsets)


def embed(
    features: Tensor, low: Tensor, strides: Tensor, first_vertex: int, ring: bool, vertices: Tensor, weights: Tensor
) -> Tensor:
    """As `lattice_torch.embed`, with vertices numbered in the order in which points touch them."""
    num_points, num_features = features.shape
    scales = torch.tensor(deviations(num_features, features.dtype), dtype=features.dtype)
    keys = torch.empty(num_points, num_features + 1, dtype=torch.int64)
    bounds = even_bounds(*keys.shape)
    parallel_rows(loops.embed, bounds, *map(_numpy, (features.contiguous(), scales, low, strides, weights, keys)))
    steps = (strides.sum() - (num_features + 1) * torch.cat([strides, strides.new_zeros(1)])).numpy()
    table, unique, count = _number_vertices(bounds, _numpy(keys), _numpy(vertices), first_vertex)
    if ring:
        table, unique, count = loops.add_ring(steps, table, unique, count)
    neighbors = torch.empty(num_features + 1, 2, count, dtype=torch.int32)
    bounds = even_bounds(count, 2 * num_features)
    parallel_rows(loops.find_neighbors, bounds, steps, table, unique, first_vertex, _numpy(neighbors))
    return neighbors


def _number_vertices(bounds: np.ndarray, keys: np.ndarray, vertices: np.ndarray, first_vertex: int) -> Any:
    """Number the keys in the order of their first touch: each part by itself, then the parts' vertices in order.

    That order, and so every later sum, does not depend on where the parts begin.
    """
    parts: list[Any] = [None] * (len(bounds) - 1)

    def number(part: int, _: int) -> None:
        parts[part] = loops.number_vertices(bounds[part], bounds[part + 1], keys, vertices)

    parallel_rows(number, np.arange(len(bounds)))
    (table, unique, count), *others = parts
    mappings = [np.arange(count, dtype=np.int32)]
    for _, keys_of_part, count_of_part in others:
        table, unique, count, mapping = loops.merge_vertices(keys_of_part[:count_of_part], table, unique, count)
        mappings.append(mapping)
    renumbering = list(zip(bounds[:-1], bounds[1:], mappings, strict=True))

    def renumber(part: int, _: int) -> None:
        loops.renumber(*renumbering[part], first_vertex, vertices)

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


def _pixel_rows(loop: Callable[..., None], vertices: Tensor, weights: Tensor, table: Tensor, energy: Tensor) -> Tensor:
    out = torch.empty(energy.shape, dtype=energy.dtype)
    parallel_rows(loop, even_bounds(*out.shape), *map(_numpy, (vertices, weights, table, energy, out)))
    return out


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()
