"""The lattice on a CPU: loops compiled by numba, run on as many threads as torch uses.

The first call on a machine compiles; later processes read numba's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from instseg.lattice.cpu import build_loops
from instseg.lattice.cpu.lattice import NumbaLattice
from instseg.lattice.cpu.rows import as_rows, copy_rows, softmax, softmax_backward
from instseg.lattice.cpu.threads import parts, run
from instseg.lattice.embedding import deviations, key_layout, slices
from instseg.lattice.memory import empty

__all__ = ["as_rows", "build", "copy_rows", "softmax", "softmax_backward"]

# Pixels of a band at most. With smaller bands more vertices lie in several of them, whose sums are then combined; with
# larger ones an image has too few bands for all threads to work.
_BAND = 1 << 15


class _Part(NamedTuple):
    """One kernel's vertices in one image, and what remains to be done with them.

    Attributes:
        num_vertices: How many they are.
        own: (B, 2), from where to where each band's own vertices go.
        spilled: (B, 2), from where to where its spilled rows go.
        vertex_of_spilled: (S,) int32.
        chains: For each direction, see `filter_loops.blur`.
        corners: (N, C+1) int32 view of the rows, which holds numbers in bands for now.
        renumbering: What `build_loops.renumber` makes rows of them with.
    """

    num_vertices: int
    own: np.ndarray
    spilled: np.ndarray
    vertex_of_spilled: np.ndarray
    chains: list[np.ndarray]
    corners: np.ndarray
    renumbering: tuple[np.ndarray, ...]


def build(features: Sequence[Tensor], ring: bool, lengths: Sequence[int]) -> NumbaLattice:
    """The lattice without normalisation, vertices numbered in the order in which pixels touch them."""
    num_corners = [kernel.shape[1] + 1 for kernel in features]
    weights = empty((len(features[0]), sum(num_corners)), features[0].dtype)
    rows = empty(weights.shape, torch.int32).numpy()
    bands = _band_bounds(lengths)
    runs = np.empty((len(bands) - 1, 2 * len(features), 2), np.int64)
    built: list[_Part] = []
    ends = [0]  # of the kernels' vertices
    stop = num_spilled = 0
    for index, (kernel, columns) in enumerate(zip(features, slices(num_corners), strict=True)):
        for image in slices(lengths):
            own = slice(*np.searchsorted(bands, (image.start, image.stop)))
            views = weights.numpy()[image, columns], rows[image, columns]
            part = _build_part(kernel[image], bands[own.start : own.stop + 1], *views, ring, stop, num_spilled)
            runs[own, 2 * index], runs[own, 2 * index + 1] = part.own, part.spilled
            stop, num_spilled = stop + part.num_vertices, num_spilled + len(part.vertex_of_spilled)
            built.append(part)
        ends.append(stop)
    runs[:, 1::2] += stop
    for part in built:
        image_bands, *arrays = part.renumbering
        bounds = parts(len(image_bands) - 1)
        run(build_loops.renumber, build_loops.parallel_renumber, bounds, image_bands, *arrays, stop, part.corners)
    vertex_of_spilled = np.concatenate([part.vertex_of_spilled for part in built])
    starts = np.concatenate([[0], np.bincount(vertex_of_spilled, minlength=stop).cumsum()])
    order = build_loops.sort_by_vertex(vertex_of_spilled, starts)
    directions, chains = _join_chains([part.chains for part in built])
    return NumbaLattice(
        kernels=tuple(slice(*pair) for pair in pairwise(ends)),
        splat_weights=weights,
        slice_weights=weights,
        first_columns=np.cumsum([0, *num_corners]),
        bands=bands,
        runs=runs,
        rows=rows,
        vertex_of_row=np.concatenate([np.arange(stop, dtype=np.int32), vertex_of_spilled]),
        spilled=np.stack([vertex_of_spilled[order], stop + order]),
        directions=directions,
        chains=chains,
    )


def _build_part(
    features: Tensor,
    bands: np.ndarray,
    weights: np.ndarray,
    corners: np.ndarray,
    ring: bool,
    first_vertex: int,
    num_spilled: int,
) -> _Part:
    """One kernel's vertices in the image of `bands`; fills in its `weights` and, for now, its `corners`."""
    bands = bands - bands[0]
    keys, of_bands, steps = _number_corners(features, bands, weights, corners)
    counts = of_bands[:, 1] - of_bands[:, 0]
    table = empty((build_loops.table_size(counts.sum()), 2), torch.int64).numpy()
    unique = empty((int(counts.sum()) * (1 + 2 * len(steps) * ring),), torch.int64).numpy()
    firsts, numbers = build_loops.merge_bands(keys, of_bands, table, unique)
    vertex_of_spilled = np.empty(len(numbers), np.int32)
    spilled = build_loops.place_rows(numbers, counts, firsts, first_vertex, num_spilled, vertex_of_spilled)
    if ring:  # they become the last band's
        table, firsts[-1] = build_loops.add_ring(steps, table, unique, firsts[-1])
    return _Part(
        num_vertices=int(firsts[-1]),
        own=first_vertex + np.stack([firsts[:-1], firsts[1:]], 1),
        spilled=np.stack([spilled[:-1], spilled[1:]], 1),
        vertex_of_spilled=vertex_of_spilled[: spilled[-1] - num_spilled],
        chains=_find_chains(steps, table, unique[: firsts[-1]], first_vertex),
        corners=corners,
        renumbering=(bands, np.cumsum(counts) - counts, numbers),
    )


def _number_corners(
    features: Tensor, bands: np.ndarray, weights: np.ndarray, numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fill in the barycentric coordinates, and the corners' numbers in their band.

    Returns:
        Keys, the runs (B, 2) in them of the distinct ones of each band, and the step in keys of each direction.
    """
    num_features, num_bands = features.shape[1], len(bands) - 1
    low, strides = key_layout(features)
    scales = torch.tensor(deviations(num_features, features.dtype), dtype=features.dtype)
    bounds = parts(num_bands)
    # Most of this is never touched.
    keys = empty((len(features) * (num_features + 1),), torch.int64).numpy()
    size = build_loops.table_size(len(features) // num_bands // 2 + 1024)
    tables = empty((len(bounds) - 1, size, 2), torch.int64).numpy()
    runs = np.empty((num_bands, 2), np.int64)
    arrays = (tensor.numpy() for tensor in (features.contiguous(), scales, low, strides))
    arrays = bands, *arrays, bounds, tables, weights, numbers, keys, runs
    run(build_loops.number_corners, build_loops.parallel_number_corners, bounds, *arrays)
    steps = strides.sum() - (num_features + 1) * torch.cat([strides, strides.new_zeros(1)])
    return keys, runs, steps.numpy()


def _find_chains(steps: np.ndarray, table: np.ndarray, unique: np.ndarray, first_vertex: int) -> list[np.ndarray]:
    """The chains of each direction, see `filter_loops.blur`."""
    links, firsts, chains = empty((3, len(steps), len(unique)), torch.int32).numpy()
    flags = empty((len(steps), len(unique) + 1), torch.bool).numpy()
    lengths = np.empty(len(steps), np.int64)
    arrays = steps, table, unique, first_vertex, links, flags, firsts, chains, lengths
    run(build_loops.find_chains, build_loops.parallel_find_chains, parts(len(steps)), *arrays)
    return [chain[:length] for chain, length in zip(chains, lengths, strict=True)]


def _band_bounds(lengths: Sequence[int]) -> np.ndarray:
    """Where bands of pixels start and stop: equal parts of each image, however many threads there are."""
    bounds = []
    for image in slices(lengths):
        length = image.stop - image.start
        num_bands = min(length, -(-length // (4 * _BAND)) * 4)  # for 2 and 4 threads equally many
        bounds.append(image.start + np.linspace(0, length, num_bands + 1)[:-1].round())
    return np.concatenate([*bounds, [sum(lengths)]]).astype(np.int64)


def _join_chains(found: Sequence[list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """All chains of the first direction, of the second, ...; from where to where each direction's go, (D, 2)."""
    ordered = [[chains[d] for chains in found if d < len(chains)] for d in range(max(map(len, found)))]
    ends = np.cumsum([0, *(sum(map(len, direction)) for direction in ordered)])
    joined = empty((int(ends[-1]),), torch.int32).numpy()
    np.concatenate([chain for direction in ordered for chain in direction], out=joined)
    return np.stack([ends[:-1], ends[1:]], 1), joined
