"""The dense CRF (paper 3.1) as a module with learnable, class-specific weights; usable alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from instseg.checks import finite, integer, non_negative, positive, require
from instseg.config import KernelConfig
from instseg.crf.inputs import image_tensors, unary_tensor
from instseg.crf.mean_field import PairwiseTerm
from instseg.crf.pairwise import Kernels, build_kernels, message_matrices, potts
from instseg.lattice import pixel_major
from instseg.lattice.memory import total_memory


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
        num_iterations: T; 0 leaves the unary's own marginals.

    Raises:
        ValueError: If a weight is not finite, or a number no integer, 1 or more labels, 0 or more iterations.
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
        positive("num_labels", integer("num_labels", num_labels))
        non_negative("num_iterations", integer("num_iterations", num_iterations))
        self.kernel_config = kernels or KernelConfig()
        self.num_iterations = num_iterations
        self.spatial_weight = nn.Parameter(torch.full((num_labels,), finite("spatial_weight", spatial_weight)))
        self.bilateral_weight = nn.Parameter(torch.full((num_labels,), finite("bilateral_weight", bilateral_weight)))
        self.compatibility = nn.Parameter(potts(num_labels, self.spatial_weight.detach()))

    def pairwise(self, kernels: Kernels) -> PairwiseTerm:
        """The pairwise term with an image's kernels."""
        return PairwiseTerm(kernels, message_matrices((self.spatial_weight, self.bilateral_weight), self.compatibility))

    def forward(self, image: Any, unary: Any) -> Any:
        """Marginals (L, H, W) of an image (H, W, 3), RGB 0..255, with unary energies (L, H, W) in nats.

        NumPy in gives NumPy out (and no gradient), wherever the weights are; torch in gives torch out, differentiable
        in `unary` and weights. A list counts as NumPy. The image may be either.

        Raises:
            ValueError: If an argument is no array of numbers, the shapes do not fit each other or the number of labels,
                the unary is not finite in the weights' dtype or on another device than they, or an image's integers are
                outside 0..255.

        Warns:
            UserWarning: If a floating-point image has values in 0..1.
        """
        return self.batch([image], [unary])[0]

    def batch(self, images: Sequence[Any], unaries: Sequence[Any]) -> list[Any]:
        """`forward` of several images of any sizes at once: the same marginals, in fewer and larger operations."""
        if len(images) != len(unaries) or len(images) == 0:
            raise ValueError(f"batch: expected as many unaries as images, 1 or more; got {len(unaries)}, {len(images)}")
        device = self.spatial_weight.device
        tensors = [unary_tensor(unary, device) for unary in unaries]
        if isinstance(unaries[0], Tensor):
            return self._infer(image_tensors(images, device), tensors)
        with torch.no_grad():
            return [q.cpu().numpy() for q in self._infer(image_tensors(images, device), tensors)]

    def _infer(self, images: list[Tensor], unaries: list[Tensor]) -> list[Tensor]:
        for image, unary in zip(images, unaries, strict=True):
            expected = (len(self.spatial_weight), *image.shape[:2])
            require(tuple(unary.shape) == expected, "unary", f"shape (L, H, W) = {expected}", tuple(unary.shape))
        _check_memory(unaries)
        dtype = self.spatial_weight.dtype
        columns = [unary.to(dtype).flatten(1) for unary in unaries]
        if not all(torch.isfinite(torch.stack(torch.aminmax(unary))).all() for unary in columns):
            raise ValueError(f"unary: expected energies that are finite in {dtype}, got NaN, infinity or more")
        kernels = build_kernels(images, self.kernel_config, dtype)
        rows = pixel_major(columns[0] if len(columns) == 1 else torch.cat(columns, 1))
        q = self.pairwise(kernels).marginals(rows, self.num_iterations)
        parts = q.split([unary[0].numel() for unary in unaries])
        return [part.T.unflatten(1, unary.shape[1:]) for part, unary in zip(parts, unaries, strict=True)]


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
