"""The Gaussian kernels by brute force: exact, quadratic in the number of pixels. The yardstick of the lattice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from instseg.config import Normalization
from instseg.crf.lattice import check_features

_BLOCK_ELEMENTS = 1 << 24  # entries of the kernel that exist at a time


@dataclass(frozen=True)
class ExactKernels:
    """sum_j exp(-|f_i - f_j|^2 / 2) q_j, computed block by block in every iteration.

    Attributes:
        features: For each kernel (N, C_m), in standard deviations.
        lengths: The numbers of points of the images, which do not see each other.
        scales: For each kernel (N, 1) before and (N, 1) after filtering.
    """

    features: Sequence[Tensor]
    lengths: Sequence[int]
    scales: Sequence[tuple[Tensor, Tensor]]

    @classmethod
    def build(cls, features: Sequence[Tensor], normalization: Normalization, lengths: Sequence[int]) -> ExactKernels:
        """The kernels, normalised as `build_lattice` says.

        Raises:
            ValueError: If features are not finite, or there are no points.
        """
        scales = []
        for kernel in features:
            check_features(kernel)
            one = torch.ones_like(kernel[:, :1])
            norm = one if normalization == "none" else _filter(kernel, one, lengths)
            root = norm.rsqrt()
            scales.append((root, root) if normalization == "symmetric" else (one, norm.reciprocal()))
        return cls(features, lengths, scales)

    def energy(self, q: Tensor, energy: Tensor, matrices: Tensor) -> Tensor:
        """See `Kernels.energy`."""
        for kernel, (before, after), matrix in zip(self.features, self.scales, matrices, strict=True):
            energy = energy + (_Filter.apply(q * before, kernel, self.lengths) * after) @ matrix  # pyright: ignore
        return energy

    def update(self, q: Tensor, energy: Tensor, matrices: Tensor) -> Tensor:
        """See `Kernels.update`."""
        return (-self.energy(q, energy, matrices)).softmax(1)

    def infer(self, energy: Tensor, matrices: Tensor, num_iterations: int, normalize: bool) -> Tensor:
        """See `Kernels.infer`."""
        q = (-energy).softmax(1)
        for _ in range(num_iterations - 1):
            q = self.update(q, energy, matrices)
        return self.update(q, energy, matrices) if normalize else self.energy(q, energy, matrices)


class _Filter(torch.autograd.Function):
    """A symmetric operator, so its own adjoint: no block of it is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, features: Tensor, lengths: Sequence[int]) -> Tensor:
        ctx.features, ctx.lengths = features, lengths
        return _filter(features, values, lengths)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _filter(ctx.features, grad_outputs[0], ctx.lengths), None, None


def _filter(features: Tensor, values: Tensor, lengths: Sequence[int]) -> Tensor:
    filtered = torch.empty_like(values)
    for image_features, image_values, out in zip(
        features.split(list(lengths)), values.split(list(lengths)), filtered.split(list(lengths)), strict=True
    ):
        for rows in _blocks(len(image_features)):
            # Squared distances as sums of squares of differences: the faster product formula cancels.
            distance = torch.cdist(image_features[rows], image_features, compute_mode="donot_use_mm_for_euclid_dist")
            torch.mm(distance.square_().mul_(-0.5).exp_(), image_values, out=out[rows])
    return filtered


def _blocks(num_points: int) -> Iterator[slice]:
    size = max(1, _BLOCK_ELEMENTS // num_points)
    yield from (slice(start, min(start + size, num_points)) for start in range(0, num_points, size))
