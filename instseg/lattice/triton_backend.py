"""The lattice on a GPU: kernels in triton, every one a gather, so that results are the same bit for bit in every run.

A program holds one tile: some rows (points or vertices) by all labels, padded to a power of two. `torch_backend` builds
the lattice. With TRITON_INTERPRET=1 in the environment the kernels run on a CPU too, slowly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from instseg.lattice import torch_backend
from instseg.lattice.torch_backend import TorchLattice, as_rows, copy_rows

__all__ = ["as_rows", "build", "copy_rows", "softmax", "softmax_backward"]

_TILE = 1024  # elements of a program's tile; a power of two
_CHUNK = 64  # entries of a vertex that are added up one after the other: runs may be as long as an image is large
_OPTIONS = {"enable_fp_fusion": True}  # said, as triton's default changes from version to version, and the bits with it


class Level(NamedTuple):
    """One pass of splatting, which adds up chunks of entries that lie one after the other.

    Attributes:
        bounds: (chunks + 1,) int64, where each chunk starts; the last one's end.
        targets: (chunks,) int64, the vertex whose whole run this is; -1 - i where it is the i-th of the partial sums.
        num_partials: How many partial sums there are: the entries of the next level.
    """

    bounds: Tensor
    targets: Tensor
    num_partials: int


def softmax(energy: Tensor) -> Tensor:
    """As `torch_backend.softmax`, whose it is where a row is longer than a tile."""
    if energy.shape[1] > _TILE:
        return torch_backend.softmax(energy)
    out = torch.empty_like(energy, memory_format=torch.contiguous_format)
    _launch(_softmax, *out.shape, energy.contiguous(), out)
    return out


def softmax_backward(q: Tensor, grad: Tensor) -> Tensor:
    """As `torch_backend.softmax_backward`, whose it is where a row is longer than a tile."""
    if q.shape[1] > _TILE:
        return torch_backend.softmax_backward(q, grad)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    _launch(_softmax_backward, *out.shape, q.contiguous(), grad.contiguous(), out)
    return out


@dataclass(frozen=True)
class TritonLattice(TorchLattice):
    """A torch lattice with `vertices` and `neighbors` in int32, applied by kernels.

    What depends on the weights is computed when first needed, since `replace` changes these.

    Attributes:
        directions: (D, 2, M+1) int32, both neighbours of every kernel's vertices at once; -1 also where a kernel has
            fewer directions.
        points: (N*C,) int32, the point of each entry of `order`.
        levels: The passes of splatting, the first over `points`.
    """

    directions: Tensor
    points: Tensor
    levels: tuple[Level, ...]

    softmax_backward = staticmethod(softmax_backward)

    def splat(self, values: Tensor) -> Tensor:
        on_vertices = values.new_empty(len(self.offsets) + 1, values.shape[1])
        source = values.contiguous()
        for index, level in enumerate(self.levels):
            partial = values.new_empty(level.num_partials, values.shape[1])
            arrays = level.bounds, level.targets, self.points, self._sorted_weights, source, on_vertices, partial
            _launch(_add_chunks, len(level.targets), values.shape[1], *arrays, WEIGHTED=index == 0)
            source = partial
        return on_vertices

    def blur(self, on_vertices: Tensor) -> Tensor:
        source = on_vertices.contiguous()
        target = torch.empty_like(source)
        for pair in self.directions:
            _launch(_blur, len(source), source.shape[1], pair, source, target)
            source, target = target, source
        return source

    def slice(self, on_vertices: Tensor, energy: Tensor) -> Tensor:
        return self._slice(on_vertices, energy, normalize=False)

    def slice_softmax(self, on_vertices: Tensor, energy: Tensor, overwrite: bool = False) -> Tensor:
        del overwrite
        if energy.shape[1] > _TILE:
            return softmax(self.slice(on_vertices, energy))
        return self._slice(on_vertices, energy, normalize=True)

    def adjoint(self) -> TritonLattice:
        """As the base class says, and always the same one, which keeps its weights."""
        return self._adjoint

    def _slice(self, on_vertices: Tensor, energy: Tensor, normalize: bool) -> Tensor:
        out = energy.new_empty(len(self.vertices), energy.shape[1])
        arrays = self.vertices, self.slice_weights, on_vertices.contiguous(), energy.contiguous(), out
        strides = [rows.shape[1] if len(rows) > 1 else 0 for rows in (on_vertices, energy)]  # one row stands for all
        constants = {"NUM_CORNERS": self.vertices.shape[1], "NORMALIZE": normalize}
        _launch(_slice, *out.shape, *arrays, *strides, **constants)
        return out

    @cached_property
    def _sorted_weights(self) -> Tensor:
        return self.splat_weights.flatten()[self.order]

    @cached_property
    def _adjoint(self) -> TritonLattice:
        adjoint = super().adjoint()
        assert isinstance(adjoint, TritonLattice)  # for type checkers: it is a copy of this one
        return replace(adjoint, directions=self.directions.flip(0))


def build(features: Sequence[Tensor], ring: bool, lengths: Sequence[int]) -> TritonLattice:
    """The lattice without normalisation."""
    built = torch_backend.build(features, ring, lengths)
    ends = built.offsets.new_full((2,), len(built.order))  # the last row's run is empty, which makes it 0
    neighbors = [neighbors.int() for neighbors in built.neighbors]
    directions = built.order.new_full((max(map(len, neighbors)), 2, len(built.offsets) + 1), -1, dtype=torch.int32)
    for kernel, of_kernel in zip(built.kernels, neighbors, strict=True):
        directions[: len(of_kernel), :, kernel] = of_kernel
    fields = vars(built) | {
        "neighbors": tuple(neighbors),
        "directions": directions,
        "vertices": built.vertices.int().contiguous(),
        "points": (built.order // built.vertices.shape[1]).int(),
        "levels": tuple(_levels(torch.diff(built.offsets, append=ends))),
    }
    return TritonLattice(**fields)


def _levels(counts: Tensor) -> Iterator[Level]:
    """The passes that add up runs of `counts` (M+1,) entries: each cuts what is left into chunks, until each is one."""
    vertices = torch.arange(len(counts), device=counts.device)
    num_partials = 1
    while num_partials:
        num_chunks = ((counts + _CHUNK - 1) // _CHUNK).clamp(min=1)  # an empty run's chunk writes its 0
        run = torch.arange(len(counts), device=counts.device).repeat_interleave(num_chunks)
        place = torch.arange(len(run), device=counts.device) - (num_chunks.cumsum(0) - num_chunks)[run]
        starts = (counts.cumsum(0) - counts)[run] + _CHUNK * place
        cut = num_chunks > 1
        partial = cut[run].cumsum(0) - 1
        num_partials = int(cut[run].sum())
        targets = torch.where(cut[run], -1 - partial, vertices[run])
        yield Level(torch.cat([starts, counts.sum()[None]]), targets, num_partials)
        counts, vertices = num_chunks[cut], vertices[cut]


def _launch(kernel: Any, num_rows: int, num_labels: int, *arguments: Any, **constants: Any) -> None:
    """Run a kernel on all tiles of (num_rows, num_labels)."""
    block = min(triton.next_power_of_2(num_labels), _TILE)
    rows = _TILE // block
    grid = triton.cdiv(num_rows, rows), triton.cdiv(num_labels, block)
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, num_rows, num_labels, ROWS=rows, BLOCK=block, **constants, **_OPTIONS)


@triton.jit
def _tile(num_rows, num_labels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's rows (ROWS,), in 64 bits as offsets are; its labels (1, BLOCK); which of either exist."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    labels = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    return rows, labels, rows < num_rows, labels < num_labels


@triton.jit
def _add_chunks(
    bounds, targets, points, weights, values, out, partial,
    num_rows, num_labels, ROWS: tl.constexpr, BLOCK: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    rows, labels, exist, valid = _tile(num_rows, num_labels, ROWS, BLOCK)
    start = tl.load(bounds + rows, exist, 0)
    length = tl.load(bounds + rows + 1, exist, 0) - start
    total = tl.zeros((ROWS, BLOCK), out.dtype.element_ty)
    for i in range(tl.max(length, 0)):  # pyright: ignore[reportArgumentType]
        inside = i < length
        row = tl.load(points + start + i, inside, 0).to(tl.int64) if WEIGHTED else start + i
        value = tl.load(values + row[:, None] * num_labels + labels, inside[:, None] & valid, 0.0)
        total += value * tl.load(weights + start + i, inside, 0.0)[:, None] if WEIGHTED else value
    target = tl.load(targets + rows, exist, 0)[:, None]
    mask = exist[:, None] & valid
    tl.store(out + target * num_labels + labels, total, mask & (target >= 0))
    tl.store(partial + (-1 - target) * num_labels + labels, total, mask & (target < 0))


@triton.jit
def _blur(neighbors, source, target, num_rows, num_labels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, labels, exist, valid = _tile(num_rows, num_labels, ROWS, BLOCK)
    before = tl.load(neighbors + rows, exist, -1).to(tl.int64)[:, None]
    after = tl.load(neighbors + num_rows + rows, exist, -1).to(tl.int64)[:, None]
    both = tl.load(source + before * num_labels + labels, (before >= 0) & valid, 0.0)
    both += tl.load(source + after * num_labels + labels, (after >= 0) & valid, 0.0)
    offsets, mask = rows[:, None] * num_labels + labels, exist[:, None] & valid
    tl.store(target + offsets, tl.load(source + offsets, mask, 0.0) + 0.5 * both, mask)


@triton.jit
def _slice(
    vertices, weights, on_vertices, energy, out, vertex_stride, energy_stride,
    num_rows, num_labels, ROWS: tl.constexpr, BLOCK: tl.constexpr, NUM_CORNERS: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    rows, labels, exist, valid = _tile(num_rows, num_labels, ROWS, BLOCK)
    mask = exist[:, None] & valid
    total = tl.load(energy + rows[:, None] * energy_stride + labels, mask, 0.0)
    for corner in tl.static_range(NUM_CORNERS):  # pyright: ignore
        vertex = tl.load(vertices + rows * NUM_CORNERS + corner, exist, 0).to(tl.int64)[:, None]
        weight = tl.load(weights + rows * NUM_CORNERS + corner, exist, 0.0)[:, None]
        total += weight * tl.load(on_vertices + vertex * vertex_stride + labels, mask, 0.0)
    if NORMALIZE:
        total = _marginals(total, valid)
    tl.store(out + rows[:, None] * num_labels + labels, total, mask)


@triton.jit
def _softmax(energy, out, num_rows, num_labels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, labels, exist, valid = _tile(num_rows, num_labels, ROWS, BLOCK)
    offsets, mask = rows[:, None] * num_labels + labels, exist[:, None] & valid
    tl.store(out + offsets, _marginals(tl.load(energy + offsets, mask, 0.0), valid), mask)


@triton.jit
def _softmax_backward(q, grad, out, num_rows, num_labels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, labels, exist, valid = _tile(num_rows, num_labels, ROWS, BLOCK)
    offsets, mask = rows[:, None] * num_labels + labels, exist[:, None] & valid
    marginals, gradient = tl.load(q + offsets, mask, 0.0), tl.load(grad + offsets, mask, 0.0)
    tl.store(out + offsets, marginals * (tl.sum(marginals * gradient, 1, keep_dims=True) - gradient), mask)


@triton.jit
def _marginals(energy, valid):
    """softmax(-energy) of a whole tile; rows that do not exist hold zeros."""
    logits = tl.where(valid, -energy, -float("inf"))
    exponentials = tl.exp(logits - tl.max(logits, 1, keep_dims=True))
    return exponentials / tl.sum(exponentials, 1, keep_dims=True)
