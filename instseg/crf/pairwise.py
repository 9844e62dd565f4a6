"""The pairwise term (paper 3.1): a spatial and a bilateral Gaussian kernel, normalisation, compatibility."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from instseg.config import KernelConfig
from instseg.crf.lattice import Lattice, build_lattice

# A symmetric linear filter (N, L) -> (N, L). Tests put dense matrices in its place.
Kernel = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LatticeKernel:
    """A Gaussian kernel through its lattice, with the self term j = i kept, scaled before and after filtering.

    "after" divides by filter(1) (CRF-as-RNN); "symmetric" multiplies by filter(1)^-1/2 on either side (Kraehenbuehl &
    Koltun); "none" leaves the lattice's own scale, which lies below the true kernel's (0.88 of it for 2 features and
    about 0.5 for 5 on photographs: vertices that no point touches lose their share).
    """

    lattice: Lattice
    scale_before: Tensor | None  # (N, 1)
    scale_after: Tensor | None  # (N, 1)

    def __call__(self, q: Tensor) -> Tensor:
        """Filter marginals `q` (N, L)."""
        values = q if self.scale_before is None else q * self.scale_before
        values = self.lattice.filter(values)
        return values if self.scale_after is None else values * self.scale_after


def build_kernels(image: Tensor, config: KernelConfig) -> tuple[LatticeKernel, LatticeKernel]:
    """The spatial and the bilateral kernel of one image; they serve every iteration and both CRFs.

    Args:
        image: (H, W, 3) RGB on the scale 0..255; its floating dtype becomes the kernels' (integers become float32).
        config: Thetas and normalisation.

    Raises:
        ValueError: If the image has another shape or values that are not finite.
    """
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image: expected shape (H, W, 3) with H, W >= 1, got {tuple(image.shape)}")
    image = image if image.is_floating_point() else image.float()
    height, width = image.shape[:2]
    y, x = torch.meshgrid(
        torch.arange(height, dtype=image.dtype, device=image.device),
        torch.arange(width, dtype=image.dtype, device=image.device),
        indexing="ij",
    )
    position = torch.stack([x, y], dim=2).reshape(-1, 2)
    color = image.reshape(-1, 3) / config.theta_beta
    return (
        _build_kernel(position / config.theta_gamma, config),
        _build_kernel(torch.cat([position / config.theta_alpha, color], dim=1), config),
    )


def _build_kernel(features: Tensor, config: KernelConfig) -> LatticeKernel:
    lattice = build_lattice(features)
    if config.normalization == "none":
        return LatticeKernel(lattice, None, None)
    norm = lattice.apply_operator(torch.ones_like(features[:, :1]))
    if config.normalization == "symmetric":
        scale = norm.rsqrt()
        return LatticeKernel(lattice, scale, scale)
    return LatticeKernel(lattice, None, norm.reciprocal())


def pairwise_message(
    q: Tensor, kernels: Sequence[Kernel], weights: Sequence[Tensor], compatibility: Tensor | None = None
) -> Tensor:
    """message_i(l) = sum_l' mu(l, l') sum_m w_m(l') sum_j k_m(i, j) Q_j(l'), an energy in nats.

    Args:
        q: (N, L) marginals.
        kernels: The filters k_m.
        weights: One (L,) class-specific or scalar weight tensor for each kernel.
        compatibility: (L, L) matrix mu; None for Potts, mu(l, l') = [l != l'].

    Returns:
        (N, L).
    """
    num_labels = q.shape[1]
    if compatibility is None:
        compatibility = potts(num_labels, q.dtype).to(q.device)
    # Weights and compatibility make one small matrix a kernel: a single pass over the (N, L) result.
    message = torch.zeros(num_labels, dtype=q.dtype, device=q.device)
    for kernel, weight in zip(kernels, weights, strict=True):
        message = torch.addmm(message, kernel(q), weight.expand(num_labels)[:, None] * compatibility.T)
    return message


def potts(num_labels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(L, L) compatibility [l != l']."""
    return 1.0 - torch.eye(num_labels, dtype=dtype)
