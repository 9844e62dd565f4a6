"""The lattice in plain torch: on any device, and the reference for the other backends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from instseg.lattice.embedding import deviations, key_layout, slices
from instseg.lattice.operator import Lattice, zeros
from instseg.shapes import Float, Int


def softmax(energy: Float[Tensor, "N L"]) -> Float[Tensor, "N L"]:
    """Marginals (N, L), exp(-energy) normalised over the labels."""
    return (-energy).softmax(1)


def softmax_backward(q: Float[Tensor, "N L"], grad: Float[Tensor, "N L"]) -> Float[Tensor, "N L"]:
    """The gradient with respect to the energy, from that of q = softmax(-energy)."""
    return -q * (grad - (q * grad).sum(1, keepdim=True))


def as_rows(values: Float[Tensor, "N L"]) -> Float[Tensor, "N L"]:
    """`values` (N, L), or a copy if the backend could not read them as they are."""
    return values


def copy_rows(values: Float[Tensor, "N L"]) -> Float[Tensor, "N L"]:
    """A copy of `values` (N, L), laid out as the backend reads it fastest."""
    return values.clone(memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class TorchLattice(Lattice):
    """Splatting gathers too, from lists of points sorted by vertex, so that sums have one order on any device.

    Values on the vertices are (M+1, L): the last row is 0 and stands for absent neighbours.

    Attributes:
        neighbors: For each kernel (C_m+1, 2, M_m), both neighbours of each vertex in each direction; -1 for none.
        vertices: (N, C) int32, the corners of the simplices that enclose each point, kernel by kernel.
        order: (N*C,) int64, positions in the flat `vertices`, by vertex, then by point.
        offsets: (M,) int64, where each vertex's run in `order` starts.
    """

    neighbors: tuple[Int[Tensor, "_ 2 _"], ...]
    vertices: Int[Tensor, "N C"]
    order: Int[Tensor, " N*C"]
    offsets: Int[Tensor, " M"]

    softmax_backward = staticmethod(softmax_backward)
    as_rows = staticmethod(as_rows)
    copy_rows = staticmethod(copy_rows)

    def splat(self, values: Float[Tensor, "N L"]) -> Float[Tensor, "V L"]:  # noqa: D102 (the base class says it)
        weights = self.splat_weights.flatten()[self.order]
        points = self.order // self.vertices.shape[1]
        on_vertices = values.new_zeros(len(self.offsets) + 1, values.shape[1])
        on_vertices[:-1] = embedding_bag(points, values, self.offsets, mode="sum", per_sample_weights=weights)
        return on_vertices

    def blur(self, on_vertices: Float[Tensor, "V L"]) -> Float[Tensor, "V L"]:  # noqa: D102
        on_vertices = on_vertices.clone()
        for kernel, neighbors in zip(self.kernels, self.neighbors, strict=True):
            for before, after in neighbors.long():  # -1 is the last row
                on_vertices[kernel] += 0.5 * (on_vertices[before] + on_vertices[after])
        return on_vertices

    def apply_compatibility(  # noqa: D102
        self, on_vertices: Float[Tensor, "V L"], matrices: Float[Tensor, "kernels L L"], overwrite: bool = False
    ) -> Float[Tensor, "V L"]:
        del overwrite
        messages = torch.zeros_like(on_vertices)
        for kernel, matrix in zip(self.kernels, matrices, strict=True):
            torch.mm(on_vertices[kernel], matrix, out=messages[kernel])
        return messages

    def slice(self, on_vertices: Float[Tensor, "V L"], energy: Float[Tensor, "#N L"]) -> Float[Tensor, "N L"]:  # noqa: D102
        on_vertices = on_vertices.expand(len(self.offsets) + 1, -1).contiguous()
        return energy + embedding_bag(self.vertices, on_vertices, mode="sum", per_sample_weights=self.slice_weights)

    def slice_softmax(  # noqa: D102
        self, on_vertices: Float[Tensor, "V L"], energy: Float[Tensor, "#N L"], overwrite: bool = False
    ) -> Float[Tensor, "N L"]:
        del overwrite
        return softmax(self.slice(on_vertices, energy))

    def adjoint(self) -> TorchLattice:  # noqa: D102
        neighbors = tuple(neighbors.flip(0) for neighbors in self.neighbors)
        return replace(self, neighbors=neighbors, splat_weights=self.slice_weights, slice_weights=self.splat_weights)

    def normalized(self, symmetric: bool) -> TorchLattice:  # noqa: D102
        blurred = self.blur(self.splat(self.splat_weights.new_ones(len(self.splat_weights), 1)))
        apart = blurred.new_zeros(len(blurred), len(self.kernels))  # a column for each: slicing keeps them apart
        for column, kernel in enumerate(self.kernels):
            apart[kernel, column] = blurred[kernel, 0]
        norm = self.slice(apart, zeros(apart))
        factors = norm.rsqrt() if symmetric else norm.reciprocal()
        num_corners = torch.tensor([len(neighbors) for neighbors in self.neighbors], device=norm.device)
        slice_weights = self.slice_weights * factors.repeat_interleave(num_corners, 1)
        splat_weights = slice_weights if symmetric else self.splat_weights
        return replace(self, splat_weights=splat_weights, slice_weights=slice_weights)


def build(features: Sequence[Tensor], ring: bool, lengths: Sequence[int]) -> TorchLattice:
    """The lattice without normalisation."""
    corners, kernels, all_neighbors = [], [], []
    stop = 0
    for kernel in features:
        start, built = stop, []
        for image in slices(lengths):
            built.append(_build_one(kernel[image], ring, stop))
            stop += built[-1][2].shape[2]
        vertices, weights, neighbors = zip(*built, strict=True)
        corners.append((torch.cat(vertices), torch.cat(weights)))
        kernels.append(slice(start, stop))
        all_neighbors.append(torch.cat(neighbors, 2))
    vertices, weights = (torch.cat(columns, 1) for columns in zip(*corners, strict=True))
    counts = torch.bincount(vertices.flatten(), minlength=stop)
    return TorchLattice(
        kernels=tuple(kernels),
        splat_weights=weights,
        slice_weights=weights,
        neighbors=tuple(all_neighbors),
        vertices=vertices,
        order=vertices.flatten().sort(stable=True)[1],
        offsets=counts.cumsum(0) - counts,
    )


def _build_one(
    features: Float[Tensor, "N C"], ring: bool, first_vertex: int
) -> tuple[Int[Tensor, "N C+1"], Float[Tensor, "N C+1"], Int[Tensor, "C+1 2 M"]]:
    """One kernel of one image: vertices (N, C+1) from `first_vertex`, barycentric coordinates, neighbours."""
    low, strides = (layout.to(features.device) for layout in key_layout(features))
    base, rank, weights = _enclosing_simplex(_elevate(features))
    keys = _corner_keys(base, rank, low, strides)
    steps = strides.sum() - (features.shape[1] + 1) * torch.cat([strides, strides.new_zeros(1)])
    unique = keys.unique()
    if ring:
        unique = torch.cat([unique, *(unique + step for step in steps), *(unique - step for step in steps)]).unique()
    sought = unique + torch.stack([-steps, steps], 1)[..., None]
    found = torch.searchsorted(unique, sought).clamp_(max=len(unique) - 1)
    neighbors = torch.where(unique[found] == sought, found + first_vertex, -1)
    return (torch.searchsorted(unique, keys) + first_vertex), weights, neighbors


def _elevate(features: Float[Tensor, "N C"]) -> Float[Tensor, "N C+1"]:
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


def _enclosing_simplex(
    elevated: Float[Tensor, "N corners"],
) -> tuple[Int[Tensor, "N corners"], Int[Tensor, "N corners"], Float[Tensor, "N corners"]]:
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


def _corner_keys(
    base: Int[Tensor, "N corners"],
    rank: Int[Tensor, "N corners"],
    low: Int[Tensor, " corners-1"],
    strides: Int[Tensor, " corners-1"],
) -> Int[Tensor, "N corners"]:
    """Pack the first C coordinates of each corner of each simplex into one int64: (N, C+1)."""
    num_corners = base.shape[1]
    origin = ((base[:, :-1] - low) * strides).sum(1, keepdim=True)
    # Corner k adds k to every coordinate, and subtracts C+1 from those whose rank is among the last k.
    padded = torch.cat([strides, strides.new_zeros(1)])
    dropped = torch.zeros_like(rank).scatter_(1, rank, padded.expand_as(rank)).flip(1).cumsum(1).roll(1, dims=1)
    dropped[:, 0] = 0
    return origin + torch.arange(num_corners, device=base.device) * strides.sum() - num_corners * dropped
