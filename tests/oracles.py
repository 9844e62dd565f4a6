"""Independent references: enumeration of small CRFs, brute-force kernels. Slow, float64, and obviously right."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor


def gaussian_kernel(features: Tensor) -> Tensor:
    """(N, N) exp(-|f_i - f_j|^2 / 2), every difference written out."""
    difference = features[:, None, :] - features[None, :, :]
    return torch.exp(-0.5 * (difference * difference).sum(2))


@dataclass
class DenseKernels:
    """Kernels written out as matrices (N, N), with the interface of `instseg.crf.pairwise.Kernels`."""

    kernels: list[Tensor]

    def energy(self, q: Tensor, energy: Tensor, matrices: Tensor) -> Tensor:
        return energy + sum(kernel @ q @ matrix for kernel, matrix in zip(self.kernels, matrices, strict=True))

    def update(self, q: Tensor, energy: Tensor, matrices: Tensor) -> Tensor:
        return (-self.energy(q, energy, matrices)).softmax(1)

    def infer(
        self, energy: Tensor, matrices: Tensor, num_iterations: int, normalize: bool, overwrite: bool = False
    ) -> Tensor:
        q = (-energy).softmax(1)
        for _ in range(num_iterations - 1):
            q = self.update(q, energy, matrices)
        return self.update(q, energy, matrices) if normalize else self.energy(q, energy, matrices)


@dataclass
class TinyCRF:
    """Eq. 3 on a handful of pixels, every energy written out as in the paper.

    unary (N, L); kernel (N, N) with a zero diagonal; compatibility (L, L) symmetric; detections as (label, w * score,
    pixels F_d, psi_U(0), psi_U(1)).
    """

    unary: Tensor
    kernel: Tensor
    compatibility: Tensor
    detections: list[tuple[int, float, list[int], float, float]]

    def energy(self, x: tuple[int, ...], y: tuple[int, ...]) -> Tensor:
        num = len(x)
        total = torch.stack([self.unary[i, x[i]] for i in range(num)]).sum()
        for i, j in itertools.combinations(range(num), 2):
            total = total + self.kernel[i, j] * self.compatibility[x[i], x[j]]
        for (label, weight, pixels, unary_0, unary_1), y_d in zip(self.detections, y, strict=True):
            agree = sum(x[i] == label for i in pixels)
            count = agree if y_d == 0 else len(pixels) - agree
            total = total + weight / len(pixels) * count + (unary_1 if y_d else unary_0)
        return total

    def states(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        num, labels = self.unary.shape
        xs = itertools.product(range(labels), repeat=num)
        ys = list(itertools.product((0, 1), repeat=len(self.detections)))
        return [(x, y) for x in xs for y in ys]

    def log_z(self) -> Tensor:
        return torch.logsumexp(-torch.stack([self.energy(x, y) for x, y in self.states()]), 0)

    def expected_energy(self, q: Tensor, validity: Tensor) -> Tensor:
        """Sum over all states of Q(x, y) E(x, y); differentiable in q (N, L) and in validity (D,)."""
        total = q.new_zeros(())
        for x, y in self.states():
            probability = q.new_ones(())
            for i, label in enumerate(x):
                probability = probability * q[i, label]
            for d, y_d in enumerate(y):
                probability = probability * (validity[d] if y_d else 1.0 - validity[d])
            total = total + probability * self.energy(x, y)
        return total
