"""The lattice on a CPU: loops compiled by numba, run on as many threads as torch uses.

Results are the same, bit for bit, at any number of threads. The first call on a machine compiles; later processes read
numba's cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Lock, local
from typing import Any

import numpy as np
import torch
from numba import config as numba_config
from numba import set_num_threads
from torch import Tensor

from instseg.crf import build_loops
from instseg.crf import filter_loops as loops
from instseg.crf.filter_loops import Corners
from instseg.crf.lattice import Blur, Lattice, deviations, key_layout, slices
from instseg.crf.simd import LANES

_BAND = 1 << 15  # pixels of a band at most: fewer share less with their neighbours, more leave threads idle
_SMALL = 1 << 14  # elements below which another thread costs more than it saves
_CACHE_LINE = 64  # bytes
_LOCK = Lock()


@dataclass(frozen=True)
class NumbaLattice(Lattice):
    """A lattice whose pixels come in bands, each with rows of its own to splat to.

    Attributes:
        corners: Where pixels read and write.
        row_offsets: (M+1,) int32, where each vertex's run of bands' rows starts.
        rows: (R,) int32, the bands' rows of vertex 0, then those of vertex 1, ...
    """

    corners: Corners
    row_offsets: np.ndarray
    rows: np.ndarray
    _memory: local = field(init=False, default_factory=local, compare=False, repr=False)

    def splat(self, values: Tensor) -> Tensor:  # noqa: D102 (the base class says it)
        sums = _rows(self._scratch("sums", len(self.rows), values.shape[1], values))
        arrays = *self.corners, self.before.numpy(), _rows(values), sums
        _run(loops.scatter, loops.parallel_scatter, self._bands(), *arrays)
        return self._combine(sums, empty_rows(len(self.row_offsets), values.shape[1], values))

    def blur(self, on_vertices: Tensor) -> Tensor:  # noqa: D102
        first, second = (
            _rows(on_vertices),
            _rows(self._scratch("blur", len(on_vertices), on_vertices.shape[1], on_vertices)),
        )
        second[-1] = 0
        for start, stop, neighbors in self.blurs:
            source, target = first, second
            bounds = start + _even_bounds(stop - start, first.shape[1])
            for before, after in neighbors.numpy():
                _run(loops.blur, loops.parallel_blur, bounds, start, before, after, source, target)
                source, target = target, source
            if source is second:
                first[start:stop] = second[start:stop]
        return on_vertices

    def mix(self, on_vertices: Tensor, matrices: Tensor) -> Tensor:  # noqa: D102
        # Not torch's product: its threads spin for milliseconds after it, where ours should run.
        mixed = self._scratch("mix", len(on_vertices), on_vertices.shape[1], on_vertices)
        _rows(mixed)[-1] = 0
        for (start, stop, _), matrix in zip(self.blurs, matrices, strict=True):
            bounds = start + _even_bounds(stop - start, on_vertices.shape[1])
            factors = _rank_one_and_diagonal(matrix)
            if factors is None:
                _run(loops.mix, loops.parallel_mix, bounds, *map(_rows, (on_vertices, matrix, mixed)))
            else:
                arrays = map(_rows, (on_vertices, *factors, mixed))
                _run(loops.mix_rank_one, loops.parallel_mix_rank_one, bounds, *arrays)
        return mixed

    def slice(self, on_vertices: Tensor, energy: Tensor) -> Tensor:  # noqa: D102
        out = empty_rows(len(self.before), energy.shape[1], energy)
        arrays = *self.corners, self.after.numpy(), *map(_rows, (on_vertices, energy, out))
        _run(loops.slice_rows, loops.parallel_slice_rows, self._bands(), *arrays)
        return out

    def slice_softmax(self, on_vertices: Tensor, energy: Tensor) -> Tensor:  # noqa: D102
        if energy.dtype != torch.float32:  # the compiled exponential is a float32 one
            return (-self.slice(on_vertices, energy)).softmax(1)
        out = _rows_like(energy)
        arrays = *self.corners, self.after.numpy(), *map(_rows, (on_vertices, energy, out))
        _run(loops.slice_softmax, loops.parallel_slice_softmax, self._bands(), energy.shape[1], *arrays)
        return out

    def step(self, on_vertices: Tensor, energy: Tensor, out: Tensor | None = None) -> Tensor:
        """As the base class says, in one pass over the pixels."""
        if energy.dtype != torch.float32:
            return super().step(on_vertices, energy)
        sums = _rows(self._scratch("sums", len(self.rows), energy.shape[1], energy))
        arrays = *self.corners, self.after.numpy(), *map(_rows, (on_vertices, energy)), self.before.numpy(), sums
        bounds = self._bands()
        _run(loops.slice_softmax_scatter, loops.parallel_slice_softmax_scatter, bounds, energy.shape[1], *arrays)
        return self._combine(sums, empty_rows(len(self.row_offsets), energy.shape[1], energy) if out is None else out)

    def step_backward(
        self, on_vertices: Tensor, grad_on_vertices: Tensor, energy: Tensor, grad_energy: Tensor
    ) -> Tensor:
        """As the base class says, in one pass over the pixels."""
        if energy.dtype != torch.float32:
            return super().step_backward(on_vertices, grad_on_vertices, energy, grad_energy)
        sums = _rows(self._scratch("sums", len(self.rows), energy.shape[1], energy))
        forward = self.after.numpy(), *map(_rows, (on_vertices, energy))
        backward = self.before.numpy(), *map(_rows, (grad_on_vertices, grad_energy)), sums
        arrays = energy.shape[1], *self.corners, *forward, *backward
        _run(loops.step_backward, loops.parallel_step_backward, self._bands(), *arrays)
        return self._combine(
            sums, self._scratch("splat", len(grad_on_vertices), grad_on_vertices.shape[1], grad_on_vertices)
        )

    def _combine(self, sums: np.ndarray, on_vertices: Tensor) -> Tensor:
        out = _rows(on_vertices)
        out[-1] = 0
        bounds = _even_bounds(len(out) - 1, out.shape[1])
        _run(loops.combine, loops.parallel_combine, bounds, self.row_offsets, self.rows, sums, out)
        return on_vertices

    def _scratch(self, name: str, num_rows: int, num_labels: int, like: Tensor) -> Tensor:
        """`empty_rows` that this thread's next call with the name overwrites: large memory is slow to get."""
        memory = self._memory.__dict__
        key = name, num_rows, num_labels, like.dtype
        if memory.get(name, (None,))[0] != key:
            memory[name] = key, empty_rows(num_rows, num_labels, like)
        return memory[name][1]

    def _bands(self) -> np.ndarray:
        return _band_parts(len(self.corners.bands) - 1)


def build(features: Sequence[Tensor], ring: bool, lengths: Sequence[int]) -> NumbaLattice:
    """The lattice without normalisation, vertices numbered in the order in which pixels touch them."""
    num_corners = [kernel.shape[1] + 1 for kernel in features]
    num_points, num_columns = len(features[0]), sum(num_corners)
    weights = empty((num_points, num_columns), features[0])
    vertices = empty((num_points, num_columns), features[0], torch.int32).numpy()
    bands = _band_bounds(lengths)
    num_rows = np.zeros(len(bands) - 1, np.int64)  # of each band, so far
    vertex_of_row: list[list[np.ndarray]] = [[] for _ in num_rows]
    blurs: list[Blur] = []
    for kernel, columns in zip(features, slices(num_corners), strict=True):
        start = stop = blurs[-1].stop if blurs else 0
        neighbors = []
        for image in slices(lengths):
            parts = range(*np.searchsorted(bands, (image.start, image.stop)))
            keys, steps = _embed(kernel[image], weights.numpy()[image, columns])
            views = keys, bands[parts.start : parts.stop + 1] - image.start, vertices[image, columns]
            of_bands, counts = _number_vertices(*views, num_rows[parts.start : parts.stop])
            capacity = len(of_bands) * (1 + 2 * len(steps) * ring)
            table, unique, count, numbers = build_loops.merge_vertices(of_bands, capacity)
            for band, run in zip(parts, slices(counts.tolist()), strict=True):
                vertex_of_row[band].append(numbers[run] + np.int32(stop))
            if ring:
                table, count = build_loops.add_ring(steps, table, unique, count)
            neighbors.append(_find_neighbors(steps, table, unique, count, stop))
            stop += count
        blurs.append(Blur(start, stop, torch.cat(neighbors, 2) if len(neighbors) > 1 else neighbors[0]))
    of_row = np.concatenate([numbers for band in vertex_of_row for numbers in band])
    first_rows = np.concatenate([[0], np.cumsum(num_rows)])
    kernel_of_column = np.repeat(np.arange(len(features)), num_corners)
    ones = features[0].new_ones(num_points, len(features))
    return NumbaLattice(
        blurs=tuple(blurs),
        before=ones,
        after=ones,
        corners=Corners(bands, first_rows, of_row, kernel_of_column, vertices, weights.numpy()),
        row_offsets=np.concatenate([[0], np.bincount(of_row, minlength=blurs[-1].stop).cumsum()]).astype(np.int32),
        rows=np.argsort(of_row, kind="stable").astype(np.int32),
    )


def softmax(energy: Tensor) -> Tensor:
    """As `lattice_torch.softmax`."""
    if energy.dtype != torch.float32:
        return (-energy).softmax(1)
    out = _rows_like(energy)
    _run(
        loops.softmax,
        loops.parallel_softmax,
        _even_bounds(len(energy), energy.shape[1]),
        out.shape[1],
        *map(_rows, (energy, out)),
    )
    return out


def softmax_backward(q: Tensor, grad: Tensor) -> Tensor:
    """As `lattice_torch.softmax_backward`."""
    out = _rows_like(q)
    arrays = map(_rows, (q, grad, out))
    _run(loops.softmax_backward, loops.parallel_softmax_backward, _even_bounds(len(q), q.shape[1]), q.shape[1], *arrays)
    return out


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory, from NumPy: it asks for huge pages, without which new memory costs as much as the work on it."""
    return torch.from_numpy(np.empty(shape, torch.empty(0, dtype=dtype or like.dtype).numpy().dtype))


def empty_rows(num_rows: int, num_labels: int, like: Tensor) -> Tensor:
    """(num_rows, num_labels) memory whose rows lie a whole number of vectors apart, from the start of a cache line."""
    stride = _stride(num_labels)
    flat = empty((num_rows * stride + _CACHE_LINE,), like)
    start = -flat.data_ptr() % _CACHE_LINE // flat.element_size()
    return flat.as_strided((num_rows, num_labels), (stride, 1), start)


def copy_rows(values: Tensor) -> Tensor:
    """As `lattice_torch.copy_rows`, into `empty_rows`."""
    rows = _rows_like(values)
    arrays = values.detach().numpy(), _padded(rows)
    _run(loops.copy_rows, loops.parallel_copy_rows, _even_bounds(len(values), values.shape[1]), *arrays)
    return rows


def _embed(features: Tensor, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fill in the barycentric coordinates; each corner's key (N, C+1) and the step in keys of each direction."""
    num_points, num_features = features.shape
    low, strides = key_layout(features)
    scales = torch.tensor(deviations(num_features, features.dtype), dtype=features.dtype)
    keys = empty((num_points, num_features + 1), strides).numpy()
    arrays = (tensor.numpy() for tensor in (features.contiguous(), scales, low, strides))
    _run(build_loops.embed, build_loops.parallel_embed, _even_bounds(len(keys), keys.shape[1]), *arrays, weights, keys)
    steps = strides.sum() - (num_features + 1) * torch.cat([strides, strides.new_zeros(1)])
    return keys, steps.numpy()


def _rank_one_and_diagonal(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """u, v, d (1, L) with matrix = u^T v + diag(d), where Potts compatibility, or its transpose, left it that form."""
    others = torch.ones_like(matrix).fill_diagonal_(0)
    ones = torch.ones_like(matrix[:1])
    # One row, or column, from off the diagonal.
    row = torch.cat([matrix[-1:, :-1], matrix[:1, -1:]], 1)
    column = torch.cat([matrix[:-1, -1:], matrix[-1:, :1]], 0).T
    for left, right in ((column, ones), (ones, row)):
        if torch.equal(matrix * others, left.T * right * others):
            return left, right, matrix.diagonal()[None] - left * right
    return None


def _number_vertices(keys: np.ndarray, bands: np.ndarray, vertices: np.ndarray, num_rows: np.ndarray) -> Any:
    """Number each band's keys by themselves, after the `num_rows` (B,) that it has, which move on; then all bands'.

    Returns:
        The distinct keys of all bands, one band after the other, and how many each band has.
    """
    num_bands = len(num_rows)
    unique = np.empty((num_bands, int(np.diff(bands).max()) * keys.shape[1]), np.int64)  # room, mostly never touched
    counts = np.empty(num_bands, np.int64)
    arrays = bands, num_rows.copy(), keys, vertices, unique, counts
    _run(build_loops.number_vertices, build_loops.parallel_number_vertices, _band_parts(num_bands), *arrays)
    num_rows += counts
    return np.concatenate([of_band[:count] for of_band, count in zip(unique, counts, strict=True)]), counts


def _find_neighbors(steps: np.ndarray, table: Any, unique: np.ndarray, count: int, first_vertex: int) -> Tensor:
    neighbors = empty((len(steps), 2, count), torch.empty(0, dtype=torch.int32))
    arrays = steps, *table, unique, first_vertex, neighbors.numpy()
    bounds = _even_bounds(count, 2 * len(steps))
    _run(build_loops.find_neighbors, build_loops.parallel_find_neighbors, bounds, *arrays)
    return neighbors


def _band_bounds(lengths: Sequence[int]) -> np.ndarray:
    """Where bands of pixels start and stop: equal parts of each image, however many threads there are."""
    bounds = []
    for image in slices(lengths):
        length = image.stop - image.start
        num_bands = min(length, -(-length // (4 * _BAND)) * 4)  # for 2 and 4 threads equally many
        bounds.append(image.start + np.linspace(0, length, num_bands + 1)[:-1].round())
    return np.concatenate([*bounds, [sum(lengths)]]).astype(np.int64)


def _band_parts(num_bands: int) -> np.ndarray:
    """Bands in equal parts, one for each thread of torch."""
    return np.linspace(0, num_bands, min(num_bands, torch.get_num_threads()) + 1).round().astype(np.int64)


def _even_bounds(num_rows: int, row_length: int) -> np.ndarray:
    """Where equal parts of some rows start and stop: one for each thread of torch, or a single one of little work."""
    num_parts = torch.get_num_threads() if num_rows * row_length > _SMALL else 1
    return np.linspace(0, num_rows, num_parts + 1).astype(np.int64)


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
