"""The permutohedral lattice (Adams, Baek, Davis 2010): Gaussian filtering in time linear in pixels and labels.

A lattice is built once per image. It is three fixed sparse maps, splat (pixels to vertices), blur (along each of the
C+1 lattice directions) and slice (vertices to pixels), so that it serves every mean-field iteration, the backward pass,
and both CRFs. Several kernels, each with its own features, lie side by side in one lattice: their corners are columns
of the same arrays, so that a pixel is read and written once per iteration. Several images lie one after another.

What the maps compute is said here; how, by one backend a file: `lattice_numba` on a CPU, `lattice_triton` on a GPU and
`lattice_torch` anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from math import prod
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from instseg.config import Normalization


class Blur(NamedTuple):
    """One kernel's part of a lattice.

    Attributes:
        start: Its first vertex.
        stop: One past its last vertex.
        neighbors: (C+1, 2, stop - start) int32, both neighbours of each vertex in each direction; -1 where there is none.
    """

    start: int
    stop: int
    neighbors: Tensor


@dataclass(frozen=True)
class Lattice:
    """The linear operators K_m ~ exp(-|f_i - f_j|^2 / 2) over the feature vectors f of N points, one for each kernel m.

    Attributes:
        vertices: (N, C) int32 in 0..M-1, the corners of the simplices that enclose each point, kernel by kernel.
        slice_weights: (N, C) float, barycentric coordinates of the point in them, normalised.
        splat_points: (N*C,) int32, the points that touch vertex 0, then those of vertex 1, ...
        splat_weights: (N*C,) float, their barycentric coordinates, normalised.
        splat_offsets: (M+1,) int32, where each vertex's run starts.
        blurs: One for each kernel.
        scales: (N, number of kernels) what slicing multiplies by and splatting does not; None where both are alike.
    """

    vertices: Tensor
    slice_weights: Tensor
    splat_points: Tensor
    splat_weights: Tensor
    splat_offsets: Tensor
    blurs: tuple[Blur, ...]
    scales: Tensor | None = None

    @property
    def num_vertices(self) -> int:
        """M, over all kernels."""
        return self.splat_offsets.shape[0] - 1

    @property
    def backend(self) -> ModuleType:
        """The module that applies the maps."""
        return _backend(self.vertices.device)

    def splat_and_blur(self, values: Tensor) -> Tensor:
        """(M+1, L) on the vertices from `values` (N, L); the last row is 0 and stands for absent neighbours."""
        return self.backend.blur(self.blurs, self.backend.splat(self, values))

    def slice(self, on_vertices: Tensor, energy: Tensor | None = None) -> Tensor:
        """(N, L): `energy`, if any, plus what each point reads from its corners."""
        if energy is None:
            energy = self.backend.copy_rows(on_vertices.new_zeros(1, 1).expand(len(self.vertices), on_vertices.shape[1]))
        return self.backend.slice_rows(self, on_vertices, energy)

    def energy(self, q: Tensor, energy: Tensor, matrices: Tensor) -> Tensor:
        """`energy` (N, L) plus the message sum_m K_m q A_m, with `matrices` A (number of kernels, L, L).

        Differentiable in all three, with the exact adjoint as its backward.
        """
        return _Message.apply(q, energy, matrices, self, False)  # pyright: ignore[reportReturnType]

    def update(self, q: Tensor, energy: Tensor, matrices: Tensor) -> Tensor:
        """softmax(-energy(...)) (N, L): the marginals after one mean-field step."""
        return _Message.apply(q, energy, matrices, self, True)  # pyright: ignore[reportReturnType]

    @cached_property
    def adjoint(self) -> Lattice:
        """The operators' transposes: slice and splat change places, and each blur, symmetric in itself, its order."""
        blurs = tuple(Blur(start, stop, neighbors.flip(0)) for start, stop, neighbors in self.blurs)
        if self.scales is None:
            return replace(self, blurs=blurs)
        corners = torch.tensor([len(blur.neighbors) for blur in self.blurs], device=self.scales.device)
        kernel = torch.arange(len(self.blurs), device=self.scales.device)
        runs = torch.stack([self.splat_offsets[blur.stop] - self.splat_offsets[blur.start] for blur in self.blurs])
        scales = self.scales[self.splat_points, kernel.repeat_interleave(runs)]
        return replace(
            self,
            slice_weights=self.slice_weights / self.scales.repeat_interleave(corners, 1),
            splat_weights=self.splat_weights * scales,
            blurs=blurs,
            scales=1.0 / self.scales,
        )

    def mix(self, on_vertices: Tensor, matrices: Tensor) -> Tensor:
        """Multiply each kernel's vertices by its matrix. Filtering acts on pixels and matrices on labels, so the
        compatibility can be applied here, where rows are fewer than pixels."""
        return self.backend.mix(self.blurs, on_vertices, matrices)


class _Message(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, energy: Tensor, matrices: Tensor, lattice: Lattice, normalize: bool) -> Tensor:
        blurred = lattice.splat_and_blur(q)
        mixed = lattice.mix(blurred, matrices)
        result = lattice.backend.update(lattice, mixed, energy) if normalize else lattice.slice(mixed, energy)
        ctx.lattice, ctx.normalize = lattice, normalize
        ctx.save_for_backward(blurred, matrices, result if normalize else None)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        blurred, matrices, result = ctx.saved_tensors
        adjoint = ctx.lattice.adjoint
        (grad,) = grad_outputs
        if ctx.normalize:
            grad = adjoint.backend.softmax_backward(result, grad)
        splatted = adjoint.backend.splat(adjoint, grad)
        grad_matrices = None
        if ctx.needs_input_grad[2]:
            runs = [slice(blur.start, blur.stop) for blur in adjoint.blurs]
            grad_matrices = torch.stack([blurred[run].T @ splatted[run] for run in runs])
        grad_q = None
        if ctx.needs_input_grad[0]:
            mixed = adjoint.mix(adjoint.backend.blur(adjoint.blurs, splatted), matrices.mT)
            grad_q = adjoint.slice(mixed)
        return grad_q, grad, grad_matrices, None, None


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, energy: Tensor) -> Tensor:
        q = _backend(energy.device).softmax(energy)
        ctx.save_for_backward(q)
        return q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (q,) = ctx.saved_tensors
        return _backend(q.device).softmax_backward(q, grad_outputs[0])


def softmax(energy: Tensor) -> Tensor:
    """softmax(-energy) (N, L) over the labels; on CPUs several times as fast as torch's where labels are few."""
    return _Softmax.apply(energy)  # pyright: ignore[reportReturnType]


def pixel_major(values: Tensor) -> Tensor:
    """(N, L) contiguous from (L, ...); differentiable."""
    return _backend(values.device).copy_rows(values.flatten(1).T)


def build_lattice(
    features: Sequence[Tensor],
    normalization: Normalization = "none",
    *,
    ring: bool = False,
    lengths: Sequence[int] | None = None,
) -> Lattice:
    """Build the lattice of one or several kernels over the same N points.

    Args:
        features: For each kernel (N, C_m), divided by its standard deviation theta; all of one floating dtype.
        normalization: "after" divides by K 1 (CRF-as-RNN); "symmetric" multiplies by (K 1)^-1/2 on either side
            (Kraehenbuehl & Koltun); "none" leaves the lattice's own scale, which lies below the true kernel's.
        ring: Add the vertices next to those that a point touches. Blurring then loses less of what passes through
            them: more exact, for 2 to 6 times the vertices.
        lengths: The numbers of points of several images, in order; no vertex is shared between them.

    Raises:
        ValueError: If features are not finite, there are no points, or they spread so far that a lattice coordinate
            overflows its 64-bit key.
    """
    for kernel in features:
        _check_features(kernel)
    first, backend = features[0], _backend(features[0].device)
    corners = [kernel.shape[1] + 1 for kernel in features]
    vertices = backend.empty((len(first), sum(corners)), first, torch.int32)
    weights = backend.empty((len(first), sum(corners)), first)
    blurs: list[Blur] = []
    for kernel, columns in zip(features, _slices(corners), strict=True):
        start = stop = blurs[-1].stop if blurs else 0
        neighbors = []
        for rows in _slices(lengths or [len(first)]):
            views = vertices[rows, columns], weights[rows, columns]
            neighbors.append(backend.embed(kernel[rows], *key_layout(kernel[rows]), stop, ring, *views))
            stop += neighbors[-1].shape[2]
        blurs.append(Blur(start, stop, torch.cat(neighbors, 2) if len(neighbors) > 1 else neighbors[0]))
    splat_lists = backend.sort_by_vertex(vertices, weights, blurs[-1].stop)
    return _normalize(Lattice(vertices, weights, *splat_lists, tuple(blurs)), normalization, corners)


def deviations(num_features: int, dtype: torch.dtype) -> list[float]:
    """What each feature is multiplied by in the embedding, so that blurring once in each direction is unit variance.

    Rounded as the reference library does: at theta_beta = 3 ten iterations amplify one float32 rounding of a
    coordinate to 6e-4 in the marginals.
    """
    unit = torch.tensor((2.0 / 3.0) ** 0.5 * (num_features + 1), dtype=dtype).item()
    return [unit / (index * (index + 1)) ** 0.5 for index in range(1, num_features + 1)]


def key_layout(features: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) int64 lowest coordinates and strides with which a vertex's first C coordinates pack into one int64."""
    num_features, margin = features.shape[1], 4 * (features.shape[1] + 1)
    scales = torch.tensor(deviations(num_features, torch.float64), dtype=torch.float64)
    bounds = torch.stack(torch.aminmax(features, dim=0)).cpu().double() * scales
    # Coordinate j is the sum of the scaled features after the j-th, less j times the j-th.
    factors = torch.ones(num_features, num_features, dtype=torch.float64).triu()
    factors -= torch.diag(torch.arange(1.0, num_features, dtype=torch.float64), -1)
    extremes = factors * bounds[:, None]
    low = extremes.amin(0).sum(1).floor().long() - margin
    sizes = (extremes.amax(0).sum(1).ceil().long() + margin - low + 1).tolist()
    if prod(sizes) >= 2**62:
        raise ValueError(
            f"features: lattice coordinates span {sizes} cells, more than a 64-bit key holds; use larger thetas"
        )
    return low, torch.tensor([prod(sizes[:index]) for index in range(num_features)])


def _check_features(features: Tensor) -> None:
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features: expected shape (N, C) with N, C >= 1, got {tuple(features.shape)}")
    if not torch.isfinite(features).all():
        raise ValueError("features: expected finite values, got NaN or infinity; check the image and the thetas")


def _normalize(lattice: Lattice, normalization: Normalization, corners: Sequence[int]) -> Lattice:
    """Put the kernels' normalisation into the weights, so that it costs nothing in an iteration."""
    columns = torch.tensor(corners, device=lattice.vertices.device)
    if normalization == "none":
        # The factor that makes one isolated vertex reproduce the volume of the continuous Gaussian, half on each side.
        root = (1.0 / (1.0 + 0.5 ** (columns - 1.0))).sqrt().to(lattice.slice_weights.dtype)
        scales = root.expand(len(lattice.vertices), -1)
    else:
        ones = lattice.slice_weights.new_ones(len(lattice.vertices), 1)
        blurred = lattice.splat_and_blur(ones)
        apart = blurred.new_zeros(len(blurred), len(corners))  # one column a kernel, so that slicing keeps them apart
        for kernel, blur in enumerate(lattice.blurs):
            apart[blur.start : blur.stop, kernel] = blurred[blur.start : blur.stop, 0]
        norm = lattice.slice(apart)
        scales = norm.rsqrt() if normalization == "symmetric" else norm.reciprocal()
    sliced = lattice.slice_weights * scales.repeat_interleave(columns, 1)
    if normalization == "after":
        return replace(lattice, slice_weights=sliced, scales=scales)
    both_alike = replace(lattice, scales=scales).adjoint.splat_weights
    return replace(lattice, slice_weights=sliced, splat_weights=both_alike)


def _slices(lengths: Sequence[int]) -> Iterator[slice]:
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


def _backend(device: torch.device) -> ModuleType:
    """The fastest backend there is for `device`; numba and triton are optional."""
    if device.type == "cpu" and find_spec("numba"):
        from instseg.crf import lattice_numba as backend
    elif device.type == "cuda" and find_spec("triton"):
        from instseg.crf import lattice_triton as backend
    else:
        from instseg.crf import lattice_torch as backend
    return backend
