"""The lattice on a CPU: loops compiled by numba, run on as many threads as torch uses.

Results are the same, bit for bit, at any number of threads. The first call on a machine compiles; later processes read
numba's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Lock
from typing import Any, Self

import numpy as np
import torch
from numba import config as numba_config
from numba import set_num_threads
from torch import Tensor

from instseg.crf import build_loops, softmax_loops
from instseg.crf import filter_loops as loops
from instseg.crf.lattice import Lattice, deviations, key_layout, slices
from instseg.crf.memory import empty
from instseg.crf.simd import LANES

_BAND = 1 << 15  # pixels of a band at most: fewer share less with their neighbours, more leave threads idle
_SMALL = 1 << 14  # elements below which another thread costs more than it saves
_CACHE_LINE = 64  # bytes
_LOCK = Lock()


@dataclass(frozen=True)
class NumbaLattice(Lattice):
    """A lattice whose pixels come in bands, which splat to rows of their own; see `filter_loops`.

    Values on the vertices are (R, L), a row for each vertex and the spilled rows behind them.

    Attributes:
        first_columns: (K+1,) int64, where the corners of each kernel start.
        bands: (B+1,) int64, where each band of pixels starts.
        runs: (B, 2K, 2) int64, from where to where each band's own rows go: vertices and spilled rows of each kernel.
        rows: (N, C) int32, to which row each point adds for each corner of its simplices.
        vertex_of_row: (R,) int32.
        spilled: (2, R - M) int32, vertices in order, and the spilled row that is to be added to each.
        directions: (D, 2) int64, from where to where `chains` is about each direction, of all kernels.
        chains: int32, see `filter_loops.blur`.
    """

    first_columns: np.ndarray
    bands: np.ndarray
    runs: np.ndarray
    rows: np.ndarray
    vertex_of_row: np.ndarray
    spilled: np.ndarray
    directions: np.ndarray
    chains: np.ndarray

    def splat(self, values: Tensor) -> Tensor:  # noqa: D102 (the base class says it)
        sums = self._new_vertices(values)
        arrays = self.bands, self.runs, self.rows, self.splat_weights.numpy(), _rows(values), _rows(sums)
        _run(loops.scatter, loops.parallel_scatter, self._band_parts(), *arrays)
        return self._combine(sums)

    def blur(self, on_vertices: Tensor) -> Tensor:  # noqa: D102
        parts = _even_bounds(len(self.chains), on_vertices.shape[1])
        fractions = parts / max(1, len(self.chains))
        _run(loops.blur, loops.parallel_blur, fractions, self.directions, self.chains, _rows(on_vertices))
        return on_vertices

    def mix(self, on_vertices: Tensor, matrices: Tensor, overwrite: bool = False) -> Tensor:  # noqa: D102
        # Not torch's product: its threads spin for milliseconds after it, where ours should run.
        mixed = on_vertices if overwrite else self._new_vertices(on_vertices)
        for kernel, matrix in zip(self.kernels, matrices, strict=True):
            bounds = kernel.start + _even_bounds(kernel.stop - kernel.start, on_vertices.shape[1])
            source, target = _rows(on_vertices), _rows(mixed)
            factors = np.zeros((3, 1, source.shape[1]), source.dtype)
            if loops.rank_one_and_diagonal(matrix.detach().numpy(), *factors):
                _run(loops.mix_rank_one, loops.parallel_mix_rank_one, bounds, source, *factors, target)
            else:
                _run(loops.mix, loops.parallel_mix, bounds, source, _rows(matrix), target)
        return mixed

    def inner(self, on_vertices: Tensor, other: Tensor) -> Tensor:
        """As the base class says, in an order that does not depend on the number of threads."""
        left, right = _rows(on_vertices), _rows(other)
        num_labels = other.shape[1]
        products = other.new_empty(len(self.kernels), num_labels, num_labels)
        for kernel, product in zip(self.kernels, products, strict=True):
            num_chunks = -(-(kernel.stop - kernel.start) // loops.CHUNK)
            sums = np.empty((num_chunks, left.shape[1], left.shape[1]), left.dtype)
            arrays = kernel.start, kernel.stop, left, right, sums
            _run(loops.inner, loops.parallel_inner, _parts(num_chunks), *arrays)
            product.numpy()[:] = sums.sum(0)[:num_labels, :num_labels]
        return products

    def slice(self, on_vertices: Tensor, energy: Tensor) -> Tensor:  # noqa: D102
        out = empty_rows(len(self.rows), energy.shape[1], energy)
        bounds = _even_bounds(len(self.rows), energy.shape[1])
        _run(loops.slice_rows, loops.parallel_slice_rows, bounds, *self._to_slice(on_vertices, energy), _rows(out))
        return out

    def slice_softmax(self, on_vertices: Tensor, energy: Tensor, overwrite: bool = False) -> Tensor:  # noqa: D102
        if energy.dtype != torch.float32:  # the compiled exponential is a float32 one
            return (-self.slice(on_vertices, energy)).softmax(1)
        out = energy if overwrite else empty_rows(len(self.rows), energy.shape[1], energy)
        arrays = energy.shape[1], *self._to_slice(on_vertices, energy), _rows(out)
        _run(loops.slice_softmax, loops.parallel_slice_softmax, _even_bounds(len(self.rows), energy.shape[1]), *arrays)
        return out

    def step(self, on_vertices: Tensor, energy: Tensor) -> Tensor:
        """As the base class says, in one pass over the pixels."""
        if energy.dtype != torch.float32:
            return super().step(on_vertices, energy)
        sums = self._new_vertices(energy)
        arrays = *self._to_slice(on_vertices, energy), self.splat_weights.numpy(), _rows(sums)
        _run(loops.step, loops.parallel_step, self._band_parts(), energy.shape[1], self.bands, self.runs, *arrays)
        return self._combine(sums)

    def step_backward(
        self, on_vertices: Tensor, grad_on_vertices: Tensor, energy: Tensor, grad_energy: Tensor
    ) -> Tensor:
        """As the base class says, in one pass over the pixels."""
        if energy.dtype != torch.float32:
            return super().step_backward(on_vertices, grad_on_vertices, energy, grad_energy)
        sums = self._new_vertices(energy)
        backward = self.splat_weights.numpy(), *map(_rows, (grad_on_vertices, grad_energy, sums))
        arrays = energy.shape[1], self.bands, self.runs, *self._to_slice(on_vertices, energy), *backward
        _run(loops.step_backward, loops.parallel_step_backward, self._band_parts(), *arrays)
        return self._combine(sums)

    def adjoint(self) -> Self:  # noqa: D102
        directions = self.directions[::-1].copy()
        return replace(self, splat_weights=self.slice_weights, slice_weights=self.splat_weights, directions=directions)

    def normalized(self, symmetric: bool) -> Self:  # noqa: D102
        norms = self.blur(self.splat(self.splat_weights.new_ones(1, 1)))
        weights = self.slice_weights if symmetric else empty(self.rows.shape, self.slice_weights.dtype)
        arrays = self.rows, self.vertex_of_row, self.first_columns, _rows(norms), symmetric
        views = self.slice_weights.numpy(), weights.numpy()
        bounds = _even_bounds(len(self.rows), self.rows.shape[1])
        _run(build_loops.normalize, build_loops.parallel_normalize, bounds, *arrays, *views)
        return replace(self, splat_weights=weights if symmetric else self.splat_weights, slice_weights=weights)

    def _to_slice(self, on_vertices: Tensor, energy: Tensor) -> tuple[np.ndarray, ...]:
        return self.rows, self.vertex_of_row, self.slice_weights.numpy(), _rows(on_vertices), _rows(energy)

    def _combine(self, sums: Tensor) -> Tensor:
        bounds = _even_bounds(self.spilled.shape[1], sums.shape[1])
        _run(loops.combine, loops.parallel_combine, bounds, *self.spilled, _rows(sums))
        return sums

    def _new_vertices(self, like: Tensor) -> Tensor:
        return empty_rows(len(self.vertex_of_row), like.shape[1], like)

    def _band_parts(self) -> np.ndarray:
        return _parts(len(self.bands) - 1)


def build(features: Sequence[Tensor], ring: bool, lengths: Sequence[int]) -> NumbaLattice:
    """The lattice without normalisation, vertices numbered in the order in which pixels touch them."""
    num_corners = [kernel.shape[1] + 1 for kernel in features]
    weights = empty((len(features[0]), sum(num_corners)), features[0].dtype)
    rows = empty(weights.shape, torch.int32).numpy()
    bands = _band_bounds(lengths)
    runs = np.empty((len(bands) - 1, 2 * len(features), 2), np.int64)
    kernels, numbered = [], []
    chains: list[list[np.ndarray]] = [[] for _ in range(max(num_corners))]
    spilled: list[np.ndarray] = []  # the vertices of spilled rows
    stop = num_spilled = 0
    for index, (kernel, columns) in enumerate(zip(features, slices(num_corners), strict=True)):
        start = stop
        for image in slices(lengths):
            own = slice(*np.searchsorted(bands, (image.start, image.stop)))
            image_bands = bands[own.start : own.stop + 1] - image.start
            views = weights.numpy()[image, columns], rows[image, columns]
            keys, of_bands, steps = _number_corners(kernel[image], image_bands, *views)
            counts = of_bands[:, 1] - of_bands[:, 0]
            capacity = int(counts.sum()) * (1 + 2 * len(steps) * ring)
            table = empty((build_loops.table_size(counts.sum()), 2), torch.int64).numpy()
            unique = empty((capacity,), torch.int64).numpy()
            firsts, numbers = build_loops.merge_bands(keys, of_bands, table, unique)
            spilled.append(np.empty(len(numbers), np.int32))
            bounds = build_loops.place_rows(numbers, counts, firsts, stop, num_spilled, spilled[-1])
            spilled[-1] = spilled[-1][: bounds[-1] - num_spilled]
            if ring:
                table, firsts[-1] = build_loops.add_ring(steps, table, unique, firsts[-1])
            for run, ends in enumerate((stop + firsts, bounds), 2 * index):
                runs[own, run] = np.stack([ends[:-1], ends[1:]], 1)
            for chain, found in zip(chains, _find_chains(steps, table, unique[: firsts[-1]], stop), strict=False):
                chain.append(found)
            numbered.append((image_bands, np.cumsum(counts) - counts, numbers, views[1]))
            stop, num_spilled = stop + int(firsts[-1]), bounds[-1]
        kernels.append(slice(start, stop))
    for image_bands, *arrays, corners in numbered:
        parts = _parts(len(image_bands) - 1)
        _run(build_loops.renumber, build_loops.parallel_renumber, parts, image_bands, *arrays, stop, corners)
    runs[:, 1::2] += stop
    vertex_of_spilled = np.concatenate(spilled)
    starts = np.concatenate([[0], np.bincount(vertex_of_spilled, minlength=stop).cumsum()])
    order = build_loops.sort_by_vertex(vertex_of_spilled, starts)
    all_chains = empty((sum(len(part) for parts in chains for part in parts),), torch.int32).numpy()
    np.concatenate([part for parts in chains for part in parts], out=all_chains)
    ends = np.cumsum([0, *(sum(map(len, parts)) for parts in chains)])
    return NumbaLattice(
        kernels=tuple(kernels),
        splat_weights=weights,
        slice_weights=weights,
        first_columns=np.cumsum([0, *num_corners]),
        bands=bands,
        runs=runs,
        rows=rows,
        vertex_of_row=np.concatenate([np.arange(stop, dtype=np.int32), vertex_of_spilled]),
        spilled=np.stack([vertex_of_spilled[order], stop + order]),
        directions=np.stack([ends[:-1], ends[1:]], 1),
        chains=all_chains,
    )


def softmax(energy: Tensor) -> Tensor:
    """As `lattice_torch.softmax`."""
    if energy.dtype != torch.float32:
        return (-energy).softmax(1)
    out = _rows_like(energy)
    bounds = _even_bounds(len(energy), energy.shape[1])
    arrays = energy.shape[1], *map(_rows, (energy, out))
    _run(softmax_loops.softmax, softmax_loops.parallel_softmax, bounds, *arrays)
    return out


def softmax_backward(q: Tensor, grad: Tensor) -> Tensor:
    """As `lattice_torch.softmax_backward`."""
    out = _rows_like(q)
    bounds = _even_bounds(len(q), q.shape[1])
    arrays = q.shape[1], *map(_rows, (q, grad, out))
    _run(softmax_loops.softmax_backward, softmax_loops.parallel_softmax_backward, bounds, *arrays)
    return out


def empty_rows(num_rows: int, num_labels: int, like: Tensor) -> Tensor:
    """(num_rows, num_labels) memory whose rows lie a whole number of vectors apart, from the start of a cache line."""
    stride = _stride(num_labels)
    flat = empty((num_rows * stride + _CACHE_LINE,), like.dtype)
    start = -flat.data_ptr() % _CACHE_LINE // flat.element_size()
    return flat.as_strided((num_rows, num_labels), (stride, 1), start)


def copy_rows(values: Tensor) -> Tensor:
    """As `lattice_torch.copy_rows`, into `empty_rows`."""
    rows = _rows_like(values)
    arrays = values.detach().numpy(), _padded(rows)
    _run(loops.copy_rows, loops.parallel_copy_rows, _even_bounds(len(values), values.shape[1]), *arrays)
    return rows


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
    # Most of these two is never touched.
    keys = empty((len(features) * (num_features + 1),), torch.int64).numpy()
    size = build_loops.table_size(len(features) // num_bands // 2 + 1024)
    tables = empty((num_bands, size, 2), torch.int64).numpy()
    runs = np.empty((num_bands, 2), np.int64)
    arrays = (tensor.numpy() for tensor in (features.contiguous(), scales, low, strides))
    outputs = tables, weights, numbers, keys, runs
    _run(build_loops.number_corners, build_loops.parallel_number_corners, _parts(num_bands), bands, *arrays, *outputs)
    steps = strides.sum() - (num_features + 1) * torch.cat([strides, strides.new_zeros(1)])
    return keys, runs, steps.numpy()


def _find_chains(steps: np.ndarray, table: np.ndarray, unique: np.ndarray, first_vertex: int) -> list[np.ndarray]:
    """The chains of each direction, see `filter_loops.blur`."""
    links, firsts, chains = empty((3, len(steps), len(unique)), torch.int32).numpy()
    flags = empty((len(steps), len(unique) + 1), torch.bool).numpy()
    lengths = np.empty(len(steps), np.int64)
    arrays = steps, table, unique, first_vertex, links, flags, firsts, chains, lengths
    _run(build_loops.find_chains, build_loops.parallel_find_chains, _parts(len(steps)), *arrays)
    return [chain[:length] for chain, length in zip(chains, lengths, strict=True)]


def _band_bounds(lengths: Sequence[int]) -> np.ndarray:
    """Where bands of pixels start and stop: equal parts of each image, however many threads there are."""
    bounds = []
    for image in slices(lengths):
        length = image.stop - image.start
        num_bands = min(length, -(-length // (4 * _BAND)) * 4)  # for 2 and 4 threads equally many
        bounds.append(image.start + np.linspace(0, length, num_bands + 1)[:-1].round())
    return np.concatenate([*bounds, [sum(lengths)]]).astype(np.int64)


def _parts(count: int) -> np.ndarray:
    """Where equal parts of a few large things start and stop, one for each thread of torch."""
    return _bounds(count, min(count, torch.get_num_threads()))


def _even_bounds(num_rows: int, row_length: int) -> np.ndarray:
    """Where equal parts of some rows start and stop: one for each thread of torch, or a single one of little work."""
    return _bounds(num_rows, torch.get_num_threads() if num_rows * row_length > _SMALL else 1)


@lru_cache(64)  # asked for in every step
def _bounds(count: int, num_parts: int) -> np.ndarray:
    return np.linspace(0, count, num_parts + 1).round().astype(np.int64)


def _run(serial: Callable[..., None], parallel: Callable[..., None], bounds: np.ndarray, *arguments: Any) -> None:
    """Call a loop on the rows between consecutive `bounds`, in parallel where there are several parts."""
    if len(bounds) == 2:  # no thread: a forked process may have none
        serial(bounds[0], bounds[1], *arguments)
        return
    with _LOCK:  # not every threading layer of numba allows two calls at once
        most: int = numba_config.NUMBA_NUM_THREADS  # pyright: ignore[reportAttributeAccessIssue]
        set_num_threads(min(len(bounds) - 1, most))
        parallel(bounds, *arguments)


def _rows_like(tensor: Tensor) -> Tensor:
    return empty_rows(len(tensor), tensor.shape[1], tensor)


def _stride(num_labels: int) -> int:
    return -(-num_labels // LANES) * LANES


def _rows(tensor: Tensor) -> np.ndarray:
    """The padded rows of a tensor of `empty_rows`, or of a copy of any other."""
    stride = _stride(tensor.shape[1])
    end = tensor.storage_offset() + len(tensor) * stride
    fits = end * tensor.element_size() <= tensor.untyped_storage().nbytes()
    return _padded(tensor if fits and tensor.stride() == (stride, 1) else copy_rows(tensor))


def _padded(rows: Tensor) -> np.ndarray:
    """(num_rows, whole vectors), the padding included."""
    stride = _stride(rows.shape[1])
    return rows.detach().as_strided((len(rows), stride), (stride, 1)).numpy()
