"""The permutohedral lattice (Adams, Baek, Davis 2010): Gaussian filtering in time linear in pixels and labels.

A lattice is built once per image and set of features. It is three fixed linear maps, splat (pixels to vertices), blur
(along each of the C+1 lattice directions) and slice (vertices to pixels), so that it serves every mean-field iteration,
the backward pass, and both CRFs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


@dataclass(frozen=True)
class Lattice:
    """The linear operator K ~ exp(-|f_i - f_j|^2 / 2) over the feature vectors f of N points, C features each.

    Attributes:
        vertices: (N, C+1) int32 in 0..M-1, the simplex that encloses each point.
        slice_weights: (N, C+1) float, barycentric coordinates of the point in it, times the operator's scale.
        splat_points: (N*(C+1),) int32, the points that touch vertex 0, then those of vertex 1, ...
        splat_weights: (N*(C+1),) float, their barycentric coordinates.
        splat_offsets: (M+1,) int32, where each vertex's run starts.
        neighbors: (C+1, 2, M+1) int32, both neighbours of each vertex in each direction; M stands for an absent one.
    """

    vertices: Tensor
    slice_weights: Tensor
    splat_points: Tensor
    splat_weights: Tensor
    splat_offsets: Tensor
    neighbors: Tensor

    @property
    def num_vertices(self) -> int:
        """M, the number of lattice vertices that some point touches."""
        return self.splat_offsets.shape[0] - 1

    def filter(self, values: Tensor) -> Tensor:
        """Apply the operator to `values` (N, L); differentiable, with the exact adjoint as its backward."""
        return _Filter.apply(values, self)  # pyright: ignore[reportReturnType]

    def apply_operator(self, values: Tensor, transpose: bool = False) -> Tensor:
        """K values, or K^T values: slice and splat are each other's transpose, each blur is symmetric."""
        on_vertices = self._blur(self._splat(values), transpose)
        return embedding_bag(self.vertices, on_vertices, mode="sum", per_sample_weights=self.slice_weights)

    def _splat(self, values: Tensor) -> Tensor:
        offsets = self.splat_offsets[:-1]
        return embedding_bag(self.splat_points, values, offsets, mode="sum", per_sample_weights=self.splat_weights)

    def _blur(self, values: Tensor, reverse: bool) -> Tensor:
        # Row M is a vertex that is always 0, read in place of an absent neighbour.
        values = torch.cat([values, values.new_zeros(1, values.shape[1])])
        for before, after in self.neighbors.flip(0) if reverse else self.neighbors:
            blurred = values.index_select(0, before)
            blurred += values.index_select(0, after)
            blurred *= 0.5
            blurred += values
            blurred[-1] = 0
            values = blurred
        return values[:-1]


class _Filter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, lattice: Lattice) -> Tensor:
        ctx.lattice = lattice
        return lattice.apply_operator(values)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return ctx.lattice.apply_operator(grad_outputs[0].contiguous(), transpose=True), None


@torch.no_grad()
def build_lattice(features: Tensor) -> Lattice:
    """Build the lattice of `features` (N, C), each already divided by its standard deviation theta.

    Raises:
        ValueError: If features are not finite, there are no points, or they spread so far that a lattice coordinate
            overflows its 64-bit key.
    """
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features: expected shape (N, C) with N, C >= 1, got {tuple(features.shape)}")
    if not torch.isfinite(features).all():
        raise ValueError("features: expected finite values, got NaN or infinity; check the image and the thetas")
    base, rank, weights = _enclosing_simplex(_elevate(features))
    keys, strides = _corner_keys(base, rank)
    # One stable sort serves three ends: the distinct vertices, the vertex of each corner, and the splat lists.
    sorted_keys, order = keys.flatten().sort(stable=True)
    unique_keys, runs, counts = torch.unique_consecutive(sorted_keys, return_inverse=True, return_counts=True)
    vertices = torch.empty_like(runs).scatter_(0, order, runs).view_as(keys)
    # The operator's last factor makes one isolated vertex reproduce the volume of the continuous Gaussian.
    scale = 1.0 / (1.0 + 2.0 ** -features.shape[1])
    return Lattice(
        vertices=vertices.int(),
        slice_weights=weights * scale,
        splat_points=(order // keys.shape[1]).int(),
        splat_weights=weights.flatten()[order],
        splat_offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int(),
        neighbors=_find_neighbors(unique_keys, strides),
    )


def _elevate(features: Tensor) -> Tensor:
    """Embed (N, C) in the hyperplane sum(x) = 0 of R^(C+1), scaled so that one blur step is unit variance."""
    num_features = features.shape[1]
    elevated = features.new_empty(len(features), num_features + 1)
    total = torch.zeros_like(features[:, 0])
    # Rounded and summed exactly as the reference library does: at theta_beta = 3 ten iterations amplify one float32
    # rounding of a coordinate to 6e-4 in the marginals.
    deviation = torch.tensor((2.0 / 3.0) ** 0.5 * (num_features + 1), dtype=features.dtype).item()
    for index in range(num_features, 0, -1):
        scale = deviation / (index * (index + 1)) ** 0.5
        scaled = features[:, index - 1] * scale
        elevated[:, index] = total - index * scaled
        total = total + scaled
    elevated[:, 0] = total
    return elevated


def _enclosing_simplex(elevated: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest remainder-0 vertex (N, C+1) int64, rank of each coordinate (N, C+1) int64, barycentric coordinates."""
    num_corners = elevated.shape[1]
    steps = torch.round(elevated / num_corners)
    base = (steps * num_corners).long()
    residual = elevated - base
    surplus = steps.sum(1, keepdim=True).long()
    # rank_i = how many coordinates have a larger residual (ties: the earlier coordinate counts as larger).
    columns = residual.T.contiguous()
    ranks = torch.zeros_like(columns, dtype=torch.int64)
    for i in range(num_corners):
        for j in range(i + 1, num_corners):
            larger = columns[i] < columns[j]
            ranks[i] += larger
            ranks[j] += ~larger
    rank = ranks.T
    # Rounding may leave the hyperplane: walk back along the coordinates whose rank falls out of 0..C.
    rank = rank + surplus
    wrap = (rank < 0).long() - (rank >= num_corners).long()
    rank = rank + wrap * num_corners
    base = base + wrap * num_corners
    residual = (elevated - base) / num_corners
    # With residuals sorted decreasingly r_0 >= ... >= r_C, corner k's coordinate is r_(C-k) - r_(C+1-k).
    by_rank = torch.empty_like(residual).scatter_(1, rank, residual).flip(1)
    weights = by_rank - by_rank.roll(1, dims=1)
    weights[:, 0] += 1.0
    return base, rank, weights


def _corner_keys(base: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Pack the first C coordinates of each corner of each simplex into one int64: (N, C+1) keys and (C,) strides."""
    num_corners = base.shape[1]
    # Two cells of margin, so that the neighbour of a vertex never wraps into another vertex's key.
    low = base.amin(0) - 2 * num_corners
    extent = base.amax(0) + 2 * num_corners - low + 1
    sizes = extent[:-1].tolist()
    strides, total = [], 1
    for size in sizes:
        strides.append(total)
        total *= size
    if total >= 2**62:
        raise ValueError(
            f"features: lattice coordinates span {sizes} cells, more than a 64-bit key holds; use larger thetas"
        )
    stride = torch.tensor(strides, dtype=torch.int64, device=base.device)
    origin_key = ((base - low)[:, :-1] * stride).sum(1, keepdim=True)
    # Corner k adds k to every coordinate, and subtracts C+1 from those whose rank is among the last k.
    stride_by_rank = torch.zeros_like(rank).scatter_(1, rank, torch.nn.functional.pad(stride, (0, 1)).expand_as(rank))
    dropped = stride_by_rank.flip(1).cumsum(1).roll(1, dims=1)
    dropped[:, 0] = 0
    corner = torch.arange(num_corners, device=base.device)
    return origin_key + corner * stride.sum() - num_corners * dropped, stride


def _find_neighbors(unique_keys: Tensor, stride: Tensor) -> Tensor:
    """(C+1, 2, M+1) int32: the vertices at -1 and +1 step in each direction; M where no point touches one."""
    num_vertices, num_corners = len(unique_keys), len(stride) + 1
    neighbors = unique_keys.new_full((num_corners, 2, num_vertices + 1), num_vertices, dtype=torch.int32)
    for direction in range(num_corners):
        step = stride.sum() - (num_corners * stride[direction] if direction < num_corners - 1 else 0)
        found = torch.searchsorted(unique_keys, unique_keys + step).clamp_(max=num_vertices - 1)
        vertex = torch.nonzero(unique_keys[found] == unique_keys + step)[:, 0]
        neighbors[direction, 1, vertex] = found[vertex].int()
        neighbors[direction, 0, found[vertex]] = vertex.int()
    return neighbors
