"""The pairwise term (paper 3.1): a spatial and a bilateral Gaussian kernel, normalisation, compatibility."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from instseg.config import KernelConfig
from instseg.crf.exact import ExactKernels
from instseg.lattice import build_lattice
from instseg.lattice.memory import empty
from instseg.shapes import Float, Num


@runtime_checkable
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

    def infer(
        self,
        energy: Tensor,
        matrices: Tensor,
        num_iterations: int,
        normalize: bool,
        overwrite: bool = False,
    ) -> Tensor:
        """The energies (N, L) after `num_iterations` >= 1 steps from softmax(-energy), with the same `energy` in each.

        With `normalize` their softmax(-...), which may `overwrite` the energy where no gradient is needed.
        """
        ...


def build_kernels(image: Tensor | Sequence[Tensor], config: KernelConfig, dtype: torch.dtype | None = None) -> Kernels:
    """The spatial and the bilateral kernel of one image, or of a batch of images of any sizes.

    Args:
        image: (H, W, 3) RGB on the scale 0..255, or several.
        config: Thetas, normalisation, accuracy.
        dtype: Of the kernels; by default the image's, or float32 if that is an integer type.

    Raises:
        ValueError: If an image has another shape or values that are not finite.
    """
    images = [image] if isinstance(image, Tensor) else list(image)
    for image in images:
        if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"image: expected shape (H, W, 3) with H, W >= 1, got {tuple(image.shape)}")
    dtype = dtype or (images[0].dtype if images[0].is_floating_point() else torch.float32)
    lengths = [image.shape[0] * image.shape[1] for image in images]
    spatial, bilateral = (empty((sum(lengths), size), dtype, images[0].device) for size in (2, 5))
    for image, *features in zip(images, spatial.split(lengths), bilateral.split(lengths), strict=True):
        _fill_features(image, config, *features)
    if config.accuracy == "exact":
        return ExactKernels.build((spatial, bilateral), config.normalization, lengths)
    return build_lattice((spatial, bilateral), config.normalization, ring=config.accuracy == "ring", lengths=lengths)


def _fill_features(
    image: Num[Tensor, "H W 3"],
    config: KernelConfig,
    spatial: Float[Tensor, "H*W 2"],
    bilateral: Float[Tensor, "H*W 5"],
) -> None:
    """(H*W, 2) and (H*W, 5): what the spatial and the bilateral kernel compare, in standard deviations."""
    height, width = image.shape[:2]
    y = torch.arange(height, dtype=spatial.dtype, device=spatial.device)[:, None]
    x = torch.arange(width, dtype=spatial.dtype, device=spatial.device)
    for features, theta in ((spatial, config.theta_gamma), (bilateral, config.theta_alpha)):
        grid = features.view(height, width, -1)
        grid[..., 0], grid[..., 1] = x / theta, y / theta
    color = bilateral.view(height, width, 5)[..., 2:]
    color.copy_(image.detach()).div_(config.theta_beta)


def message_matrices(weights: Sequence[Tensor], compatibility: Float[Tensor, "L L"]) -> Float[Tensor, "kernels L L"]:
    """(number of kernels, L, L): A_m[l', l] = w_m(l') mu(l, l'), with which the message is sum_m K_m q A_m.

    Args:
        weights: One (L,) class-specific or scalar weight for each kernel.
        compatibility: (L, L) mu.
    """
    return torch.stack([weight.expand(len(compatibility))[:, None] * compatibility.T for weight in weights])


def potts(num_labels: int, reference: Tensor) -> Float[Tensor, "L L"]:
    """(L, L) compatibility [l != l'], in the dtype and on the device of `reference`."""
    return 1.0 - torch.eye(num_labels, dtype=reference.dtype, device=reference.device)
