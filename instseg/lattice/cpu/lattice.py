"""The lattice on a CPU as compiled loops apply it: the same results, bit for bit, at any number of threads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from instseg.lattice.cpu import build_loops
from instseg.lattice.cpu import filter_loops as loops
from instseg.lattice.cpu.rows import as_rows, copy_rows, empty_rows, padded_rows, softmax_backward
from instseg.lattice.cpu.threads import even_bounds, parts, run
from instseg.lattice.memory import empty
from instseg.lattice.operator import Lattice


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

    softmax_backward = staticmethod(softmax_backward)
    as_rows = staticmethod(as_rows)
    copy_rows = staticmethod(copy_rows)

    def splat(self, values: Tensor) -> Tensor:  # noqa: D102 (the base class says it)
        sums = empty_rows(len(self.vertex_of_row), values)
        arrays = self.bands, self.runs, self.rows, self.splat_weights.numpy(), padded_rows(values), padded_rows(sums)
        run(loops.scatter, loops.parallel_scatter, parts(len(self.bands) - 1), *arrays)
        return self._combine(sums)

    def blur(self, on_vertices: Tensor) -> Tensor:  # noqa: D102
        fractions = even_bounds(len(self.chains), on_vertices.shape[1]) / max(1, len(self.chains))
        arrays = self.directions, self.chains, padded_rows(on_vertices)
        run(lambda _start, _stop, *whole: loops.blur(*whole), loops.parallel_blur, fractions, *arrays)
        return on_vertices

    def apply_compatibility(self, on_vertices: Tensor, matrices: Tensor, overwrite: bool = False) -> Tensor:  # noqa: D102
        # Not torch's product: its threads spin for milliseconds after it, where ours should run.
        messages = on_vertices if overwrite else empty_rows(len(self.vertex_of_row), on_vertices)
        for kernel, matrix in zip(self.kernels, matrices, strict=True):
            bounds = kernel.start + even_bounds(kernel.stop - kernel.start, on_vertices.shape[1])
            source, target = padded_rows(on_vertices), padded_rows(messages)
            factors = np.zeros((3, 1, source.shape[1]), source.dtype)
            if loops.rank_one_and_diagonal(matrix.detach().numpy(), *factors):
                run(loops.apply_rank_one, loops.parallel_apply_rank_one, bounds, len(matrix), source, *factors, target)
            else:
                run(loops.apply_matrix, loops.parallel_apply_matrix, bounds, source, padded_rows(matrix), target)
        return messages

    def inner(self, on_vertices: Tensor, other: Tensor) -> Tensor:
        """As the base class says, in an order that does not depend on the number of threads."""
        left, right = padded_rows(on_vertices), padded_rows(other)
        num_labels = other.shape[1]
        products = other.new_empty(len(self.kernels), num_labels, num_labels)
        for kernel, product in zip(self.kernels, products, strict=True):
            num_chunks = -(-(kernel.stop - kernel.start) // loops.CHUNK)
            sums = np.empty((num_chunks, left.shape[1], left.shape[1]), left.dtype)
            arrays = kernel.start, kernel.stop, left, right, sums
            run(loops.inner, loops.parallel_inner, parts(num_chunks), *arrays)
            product.numpy()[:] = sums.sum(0)[:num_labels, :num_labels]
        return products

    def slice(self, on_vertices: Tensor, energy: Tensor) -> Tensor:  # noqa: D102
        out = empty_rows(len(self.rows), energy)
        bounds = even_bounds(len(self.rows), energy.shape[1])
        run(loops.slice_rows, loops.parallel_slice_rows, bounds, *self._to_slice(on_vertices, energy), padded_rows(out))
        return out

    def slice_softmax(self, on_vertices: Tensor, energy: Tensor, overwrite: bool = False) -> Tensor:  # noqa: D102
        if energy.dtype != torch.float32:  # the compiled exponential is a float32 one
            return (-self.slice(on_vertices, energy)).softmax(1)
        out = energy if overwrite else empty_rows(len(self.rows), energy)
        arrays = energy.shape[1], *self._to_slice(on_vertices, energy), padded_rows(out)
        run(loops.slice_softmax, loops.parallel_slice_softmax, even_bounds(len(self.rows), energy.shape[1]), *arrays)
        return out

    def step(self, on_vertices: Tensor, energy: Tensor) -> Tensor:
        """As the base class says, in one pass over the pixels."""
        if energy.dtype != torch.float32:
            return super().step(on_vertices, energy)
        sums = empty_rows(len(self.vertex_of_row), energy)
        arrays = *self._to_slice(on_vertices, energy), self.splat_weights.numpy(), padded_rows(sums)
        run(
            loops.step, loops.parallel_step, parts(len(self.bands) - 1), energy.shape[1], self.bands, self.runs, *arrays
        )
        return self._combine(sums)

    def step_backward(
        self, on_vertices: Tensor, grad_on_vertices: Tensor, energy: Tensor, grad_energy: Tensor
    ) -> Tensor:
        """As the base class says, in one pass over the pixels."""
        if energy.dtype != torch.float32:
            return super().step_backward(on_vertices, grad_on_vertices, energy, grad_energy)
        sums = empty_rows(len(self.vertex_of_row), energy)
        backward = self.splat_weights.numpy(), *map(padded_rows, (grad_on_vertices, grad_energy, sums))
        arrays = energy.shape[1], self.bands, self.runs, *self._to_slice(on_vertices, energy), *backward
        run(loops.step_backward, loops.parallel_step_backward, parts(len(self.bands) - 1), *arrays)
        return self._combine(sums)

    def adjoint(self) -> Self:  # noqa: D102
        directions = self.directions[::-1].copy()
        return replace(self, splat_weights=self.slice_weights, slice_weights=self.splat_weights, directions=directions)

    def normalized(self, symmetric: bool) -> Self:  # noqa: D102
        norms = self.blur(self.splat(self.splat_weights.new_ones(1, 1)))
        weights = self.slice_weights if symmetric else empty(self.rows.shape, self.slice_weights.dtype)
        arrays = self.rows, self.vertex_of_row, self.first_columns, padded_rows(norms), symmetric
        views = self.slice_weights.numpy(), weights.numpy()
        bounds = even_bounds(len(self.rows), self.rows.shape[1])
        run(build_loops.normalize, build_loops.parallel_normalize, bounds, *arrays, *views)
        return replace(self, splat_weights=weights if symmetric else self.splat_weights, slice_weights=weights)

    def _to_slice(self, on_vertices: Tensor, energy: Tensor) -> tuple[np.ndarray, ...]:
        return self.rows, self.vertex_of_row, self.slice_weights.numpy(), padded_rows(on_vertices), padded_rows(energy)

    def _combine(self, sums: Tensor) -> Tensor:
        bounds = even_bounds(self.spilled.shape[1], sums.shape[1])
        run(loops.combine, loops.parallel_combine, bounds, *self.spilled, padded_rows(sums))
        return sums
