"""The pairwise term (paper 3.1): a spatial and a bilateral Gaussian kernel, normalisation, compatibility."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from instseg.config import KernelConfig
from instseg.crf.exact import ExactKernels
from instseg.crf.lattice import build_lattice


class Kernels(Protocol):
    """The Gaussian kernels K_m of one image, or of several images one after another; normalised, self term j = i kept.

    They serve every iteration, the backward pass and both CRFs.
    """

    def energy(self, q: Tensor, energy: Tensor, matrices: Tensor) -> Tensor:
        """`energy` (N, L) plus sum_m K_m q A_m for marginals `q` (N, L) and `matrices` A (number of kernels, L, L)."""
        ...

    def update(self, q: Tensor, energy: Tensor, matrices: Tensor) -> Tensor:
        """softmax(-energy(...)) (N, L)."""
        ...

    def infer(self, energy: Tensor, matrices: Tensor, num_iterations: int, normalize: bool) -> Tensor:
        """The energies (N, L) after `num_iterations` >= 1 steps from softmax(-energy), with the same `energy` in each.

        With `normalize` their softmax(-...).
        """
        ...


def build_kernels(image: Tensor | Sequence[Tensor], config: KernelConfig) -> Kernels:
    """The spatial and the bilateral kernel of one image, or of a batch of images of any sizes.

    Args:
        image: (H, W, 3) RGB on the scale 0..255, or several; its floating dtype becomes the kernels' (integers become
            float32).
        config: Thetas, normalisation, accuracy.

    Raises:
        ValueError: If an image has another shape or values that are not finite, or an exact kernel would be too large.
    """
    images = [image] if isinstance(image, Tensor) else list(image)
    spatial, bilateral = zip(*(_features(image, config) for image in images), strict=True)
    lengths = [len(features) for features in spatial]
    features = torch.cat(spatial), torch.cat(bilateral)
    if config.accuracy == "exact":
        return ExactKernels.build(features, config.normalization, lengths)
    return build_lattice(features, config.normalization, ring=config.accuracy == "ring", lengths=lengths)


def _features(image: Tensor, config: KernelConfig) -> tuple[Tensor, Tensor]:
    """(H*W, 2) and (H*W, 5): what the spatial and the bilateral kernel compare, in standard deviations."""
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image: expected shape (H, W, 3) with H, W >= 1, got {tuple(image.shape)}")
    image = image if image.is_floating_point() else image.float()
    y, x = (torch.arange(size, dtype=image.dtype, device=image.device) for size in image.shape[:2])
    position = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=2).reshape(-1, 2)
    color = image.reshape(-1, 3) / config.theta_beta
    return position / config.theta_gamma, torch.cat([position / config.theta_alpha, color], dim=1)


def message_matrices(weights: Sequence[Tensor], compatibility: Tensor) -> Tensor:
    """(number of kernels, L, L): A_m[l', l] = w_m(l') mu(l, l'), with which the message is sum_m K_m q A_m.

    Args:
        weights: One (L,) class-specific or scalar weight for each kernel.
        compatibility: (L, L) mu.
    """
    return torch.stack([weight.expand(len(compatibility))[:, None] * compatibility.T for weight in weights])


def potts(num_labels: int, reference: Tensor) -> Tensor:
    """(L, L) compatibility [l != l'], in the dtype and on the device of `reference`."""
    return 1.0 - torch.eye(num_labels, dtype=reference.dtype, device=reference.device)
