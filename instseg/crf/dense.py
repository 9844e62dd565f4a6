"""The dense CRF (paper 3.1) as a module with learnable, class-specific weights; usable alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from instseg.config import KernelConfig
from instseg.crf.mean_field import PairwiseTerm
from instseg.crf.pairwise import Kernels, build_kernels, message_matrices, potts
from instseg.lattice import pixel_major
from instseg.lattice.memory import total_memory

Array = TypeVar("Array", np.ndarray, Tensor)


class DenseCRF(nn.Module):
    """Fully connected CRF of Kraehenbuehl & Koltun (2011), trainable as in CRF-as-RNN; usable alone.

    Example:
        >>> crf = DenseCRF(num_labels=21)
        >>> q = crf(image, unary)  # (H, W, 3) uint8 and (L, H, W) energies, NumPy or torch -> (L, H, W) marginals

    Args:
        num_labels: L.
        kernels: Thetas and normalisation.
        spatial_weight: Initial w_s of every class.
        bilateral_weight: Initial w_b of every class.
        num_iterations: T.
    """

    def __init__(
        self,
        num_labels: int,
        kernels: KernelConfig | None = None,
        spatial_weight: float = 3.0,
        bilateral_weight: float = 5.0,
        num_iterations: int = 10,
    ) -> None:
        super().__init__()
        self.kernel_config = kernels or KernelConfig()
        self.num_iterations = num_iterations
        self.spatial_weight = nn.Parameter(torch.full((num_labels,), float(spatial_weight)))
        self.bilateral_weight = nn.Parameter(torch.full((num_labels,), float(bilateral_weight)))
        self.compatibility = nn.Parameter(potts(num_labels, self.spatial_weight.detach()))

    def pairwise(self, kernels: Kernels) -> PairwiseTerm:
        """The pairwise term with an image's kernels."""
        return PairwiseTerm(kernels, message_matrices((self.spatial_weight, self.bilateral_weight), self.compatibility))

    def forward(self, image: Array, unary: Array) -> Array:
        """Marginals (L, H, W) of an image (H, W, 3), RGB 0..255, with unary energies (L, H, W) in nats.

        NumPy in gives NumPy out (and no gradient); torch in gives torch out, differentiable in `unary` and weights.

        Raises:
            ValueError: If the shapes do not fit each other or the number of labels, or the unary is not finite.
        """
        return self.batch([image], [unary])[0]

    def batch(self, images: Sequence[Array], unaries: Sequence[Array]) -> list[Array]:
        """`forward` of several images of any sizes at once: the same marginals, in fewer and larger operations."""
        if len(images) != len(unaries) or not images:
            raise ValueError(f"batch: expected as many unaries as images, 1 or more; got {len(unaries)}, {len(images)}")
        if isinstance(unaries[0], np.ndarray):
            with torch.no_grad():
                tensors = self._infer([torch.from_numpy(np.asarray(x)) for x in images], list(map(_tensor, unaries)))
            return [q.numpy() for q in tensors]  # pyright: ignore[reportReturnType]
        return self._infer(list(map(torch.as_tensor, images)), list(map(_tensor, unaries)))  # pyright: ignore

    def _infer(self, images: list[Tensor], unaries: list[Tensor]) -> list[Tensor]:
        for image, unary in zip(images, unaries, strict=True):
            expected = (len(self.spatial_weight), *image.shape[:2])
            if tuple(unary.shape) != expected:
                raise ValueError(f"unary: expected shape (L, H, W) = {expected}, got {tuple(unary.shape)}")
        _check_memory(unaries)
        if not all(torch.isfinite(torch.stack(torch.aminmax(unary))).all() for unary in unaries):
            raise ValueError("unary: expected finite energies, got NaN or infinity")
        dtype = self.spatial_weight.dtype
        kernels = build_kernels(images, self.kernel_config, dtype)
        columns = [unary.to(dtype).flatten(1) for unary in unaries]
        rows = pixel_major(columns[0] if len(columns) == 1 else torch.cat(columns, 1))
        q = self.pairwise(kernels).marginals(rows, self.num_iterations)
        parts = q.split([unary[0].numel() for unary in unaries])
        return [part.T.unflatten(1, unary.shape[1:]) for part, unary in zip(parts, unaries, strict=True)]


def _tensor(array: np.ndarray | Tensor) -> Tensor:
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array


def _check_memory(unaries: Sequence[Tensor]) -> None:
    """Refuse what cannot fit before it is tried: an allocation that fails late takes the process with it.

    Raises:
        ValueError: If the unaries, their copy and the marginals exceed the device's memory.
    """
    needed = 3 * 4 * sum(unary.numel() for unary in unaries)
    total = total_memory(unaries[0].device)
    if needed > total:
        pixels = sum(unary[0].numel() for unary in unaries)
        raise ValueError(
            f"unary: {unaries[0].shape[0]} labels for {pixels} pixels need {needed / 2**30:.1f} GiB, and this "
            f"{unaries[0].device.type} has {total / 2**30:.1f} GiB; use fewer labels or smaller images"
        )
