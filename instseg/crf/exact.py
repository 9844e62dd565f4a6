"""The Gaussian kernels by brute force: exact, quadratic in the number of pixels. The yardstick of the lattice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from instseg.config import Normalization
from instseg.lattice import check_features
from instseg.lattice.memory import total_memory
from instseg.shapes import Float

_BLOCK_ELEMENTS = 1 << 24  # entries of a kernel that are computed at a time
_KEPT = 1 / 8  # share of the memory in which kernels are kept


class _Kernel:
    """The symmetric matrix exp(-|f_i - f_j|^2 / 2), in blocks of rows, which are kept where `keep` says so.

    Args:
        features: (N, C), in standard deviations.
        lengths: The numbers of points of the images, which do not see each other.
        keep: Whether to compute it once for all.
    """

    def __init__(self, features: Float[Tensor, "N C"], lengths: Sequence[int], keep: bool) -> None:
        self._features, self._lengths = features, lengths
        self._kept = list(self._compute()) if keep else None

    def __matmul__(self, values: Float[Tensor, "N L"]) -> Float[Tensor, "N L"]:
        product = torch.empty_like(values)
        for rows, columns, block in self._kept or self._compute():
            torch.mm(block, values[columns], out=product[rows])
        return product

    def _compute(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Blocks, with their rows and columns: the latter are the points of one image."""
        start = 0
        for length in self._lengths:
            columns = slice(start, start + length)
            size = max(1, _BLOCK_ELEMENTS // length)
            for first in range(start, columns.stop, size):
                rows = slice(first, min(first + size, columns.stop))
                # Squared distances as sums of squares of differences: the faster product formula cancels.
                points, others = self._features[rows], self._features[columns]
                distance = torch.cdist(points, others, compute_mode="donot_use_mm_for_euclid_dist")
                yield rows, columns, distance.square_().mul_(-0.5).exp_()
            start += length


@dataclass(frozen=True)
class ExactKernels:
    """The exact kernels of one or several images.

    Attributes:
        kernels: One matrix for each.
        scales: For each (N, 1) before and (N, 1) after filtering.
    """

    kernels: Sequence[_Kernel]
    scales: Sequence[tuple[Float[Tensor, "N 1"], Float[Tensor, "N 1"]]]

    @classmethod
    def build(cls, features: Sequence[Tensor], normalization: Normalization, lengths: Sequence[int]) -> ExactKernels:
        """The kernels, normalised as `build_lattice` says; computed in every iteration where memory is short.

        Raises:
            ValueError: If features are not finite, or there are no points.
        """
        size = len(features) * sum(length**2 for length in lengths) * features[0].element_size()
        kernels, scales = [], []
        for points in features:
            check_features(points)
            kernels.append(_Kernel(points, lengths, keep=size <= _KEPT * total_memory(points.device)))
            one = torch.ones_like(points[:, :1])
            norm = one if normalization == "none" else kernels[-1] @ one
            root = norm.rsqrt()
            scales.append((root, root) if normalization == "symmetric" else (one, norm.reciprocal()))
        return cls(kernels, scales)

    def energy(
        self, q: Float[Tensor, "N L"], energy: Float[Tensor, "N L"], matrices: Float[Tensor, "kernels L L"]
    ) -> Float[Tensor, "N L"]:
        """See `Kernels.energy`."""
        for kernel, (before, after), matrix in zip(self.kernels, self.scales, matrices, strict=True):
            energy = energy + (_Filter.apply(q * before, kernel) * after) @ matrix  # pyright: ignore
        return energy

    def update(
        self, q: Float[Tensor, "N L"], energy: Float[Tensor, "N L"], matrices: Float[Tensor, "kernels L L"]
    ) -> Float[Tensor, "N L"]:
        """See `Kernels.update`."""
        return (-self.energy(q, energy, matrices)).softmax(1)

    def infer(
        self,
        energy: Float[Tensor, "N L"],
        matrices: Float[Tensor, "kernels L L"],
        num_iterations: int,
        normalize: bool,
        overwrite: bool = False,
    ) -> Float[Tensor, "N L"]:
        """See `Kernels.infer`."""
        del overwrite
        q = (-energy).softmax(1)
        for _ in range(num_iterations - 1):
            q = self.update(q, energy, matrices)
        return self.update(q, energy, matrices) if normalize else self.energy(q, energy, matrices)


class _Filter(torch.autograd.Function):
    """A symmetric operator, so its own adjoint."""

    @staticmethod
    def forward(ctx: Any, values: Float[Tensor, "N L"], kernel: _Kernel) -> Float[Tensor, "N L"]:
        ctx.kernel = kernel
        return kernel @ values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.kernel @ grad_outputs[0], None
