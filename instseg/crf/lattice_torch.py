"""The lattice in plain torch: on any device, and the reference for the other backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from instseg.crf.lattice import deviations

if TYPE_CHECKING:
    from instseg.crf.lattice import Blur, Lattice


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory of any shape."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def empty_rows(num_rows: int, num_labels: int, like: Tensor) -> Tensor:
    """(num_rows, num_labels) memory, laid out as the backend reads it fastest."""
    return like.new_empty(num_rows, num_labels)


def copy_rows(values: Tensor) -> Tensor:
    """A copy of `values` (N, L) in `empty_rows`; differentiable."""
    return values.contiguous()


def splat(lattice: Lattice, values: Tensor) -> Tensor:
    """(M+1, L): on each vertex the weighted sum of `values` (N, L) over the points that touch it; the last row is 0."""
    on_vertices = values.new_zeros(lattice.num_vertices + 1, values.shape[1])
    offsets = lattice.splat_offsets[:-1]
    on_vertices[:-1] = embedding_bag(
        lattice.splat_points, values, offsets, mode="sum", per_sample_weights=lattice.splat_weights
    )
    return on_vertices


def blur(blurs: Sequence[Blur], on_vertices: Tensor) -> Tensor:
    """(M+1, L): each vertex plus half of both neighbours, in one direction after the other."""
    on_vertices = on_vertices.clone()
    for start, stop, neighbors in blurs:
        for before, after in neighbors.long():  # -1 is the last row
            on_vertices[start:stop] += 0.5 * (on_vertices[before] + on_vertices[after])
    return on_vertices


def mix(blurs: Sequence[Blur], on_vertices: Tensor, matrices: Tensor) -> Tensor:
    """(M+1, L): each kernel's vertices times its matrix, of `matrices` (number of kernels, L, L)."""
    mixed = torch.zeros_like(on_vertices)
    for (start, stop, _), matrix in zip(blurs, matrices, strict=True):
        torch.mm(on_vertices[start:stop], matrix, out=mixed[start:stop])
    return mixed


def slice_rows(lattice: Lattice, on_vertices: Tensor, energy: Tensor) -> Tensor:
    """(N, L): `energy` (N, L) plus the weighted sum of each point's vertices."""
    return energy + embedding_bag(lattice.vertices, on_vertices, mode="sum", per_sample_weights=lattice.slice_weights)


def update(lattice: Lattice, on_vertices: Tensor, energy: Tensor) -> Tensor:
    """softmax(-slice_rows(...)) over the labels."""
    return (-slice_rows(lattice, on_vertices, energy)).softmax(1)


def softmax(energy: Tensor) -> Tensor:
    """softmax(-energy) (N, L) over the labels."""
    return (-energy).softmax(1)


def softmax_backward(q: Tensor, grad: Tensor) -> Tensor:
    """The gradient with respect to the energy, from that of q = softmax(-energy)."""
    return -q * (grad - (q * grad).sum(1, keepdim=True))


def sort_by_vertex(vertices: Tensor, weights: Tensor, num_vertices: int) -> tuple[Tensor, Tensor, Tensor]:
    """The splat lists: points and weights by vertex, in the order of the points, and where each vertex's run starts."""
    _, order = vertices.flatten().sort(stable=True)
    counts = torch.bincount(vertices.flatten(), minlength=num_vertices)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    return (order // vertices.shape[1]).int(), weights.flatten()[order], offsets


def embed(
    features: Tensor, low: Tensor, strides: Tensor, first_vertex: int, ring: bool, vertices: Tensor, weights: Tensor
) -> Tensor:
    """Build one kernel of one image.

    Args:
        features: (N, C).
        low: (C,) int64, strides: (C,) int64, how vertices pack into keys.
        first_vertex: The number of the first new vertex.
        ring: Add the neighbours of the vertices that a point touches.
        vertices: (N, C+1) int32, filled with the corners of the simplex that encloses each point.
        weights: (N, C+1), filled with its barycentric coordinates in it.

    Returns:
        (C+1, 2, M) int32, the neighbours of each of the M new vertices in each direction; -1 where there is none.
    """
    low, strides = low.to(features.device), strides.to(features.device)
    base, rank, barycentric = _enclosing_simplex(_elevate(features))
    keys = _corner_keys(base, rank, low, strides)
    steps = strides.sum() - (features.shape[1] + 1) * torch.cat([strides, strides.new_zeros(1)])
    unique = keys.unique()
    if ring:
        unique = torch.cat([unique, *(unique + step for step in steps), *(unique - step for step in steps)]).unique()
    vertices.copy_(torch.searchsorted(unique, keys) + first_vertex)
    weights.copy_(barycentric)
    sought = unique + torch.stack([-steps, steps], 1)[..., None]
    found = torch.searchsorted(unique, sought).clamp_(max=len(unique) - 1)
    return torch.where(unique[found] == sought, found + first_vertex, -1).int()


def _elevate(features: Tensor) -> Tensor:
    """Embed (N, C) in the hyperplane sum(x) = 0 of R^(C+1), scaled so that one blur step is unit variance."""
    num_features = features.shape[1]
    elevated = features.new_empty(len(features), num_features + 1)
    total = torch.zeros_like(features[:, 0])
    scales = deviations(num_features, features.dtype)
    for index in range(num_features, 0, -1):
        scaled = features[:, index - 1] * scales[index - 1]
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


def _corner_keys(base: Tensor, rank: Tensor, low: Tensor, strides: Tensor) -> Tensor:
    """Pack the first C coordinates of each corner of each simplex into one int64: (N, C+1)."""
    num_corners = base.shape[1]
    origin = ((base[:, :-1] - low) * strides).sum(1, keepdim=True)
    # Corner k adds k to every coordinate, and subtracts C+1 from those whose rank is among the last k.
    padded = torch.cat([strides, strides.new_zeros(1)])
    dropped = torch.zeros_like(rank).scatter_(1, rank, padded.expand_as(rank)).flip(1).cumsum(1).roll(1, dims=1)
    dropped[:, 0] = 0
    return origin + torch.arange(num_corners, device=base.device) * strides.sum() - num_corners * dropped
