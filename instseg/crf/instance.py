"""The instance CRF (paper 3.3, Eq. 5): a dense CRF whose label set, one label a detection, is new for every image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from instseg.config import InstanceCrfConfig
from instseg.crf.mean_field import PairwiseTerm, mean_field
from instseg.crf.pairwise import Kernels, build_kernels, message_matrices, potts
from instseg.shapes import Float

_LABELS = 8  # label counts are rounded up to multiples of this in a batch; the CPU's rows are padded to it anyway
_ABSENT = 1e4  # energy of a label that an image has not


class InstanceCRF(nn.Module):
    """Two class-agnostic kernel weights and Potts compatibility, so that any number of labels fits.

    Args:
        config: Kernels, initial weights, T.
    """

    def __init__(self, config: InstanceCrfConfig) -> None:
        super().__init__()
        self.config = config
        self.spatial_weight = nn.Parameter(torch.tensor(config.spatial_weight))
        self.bilateral_weight = nn.Parameter(torch.tensor(config.bilateral_weight))

    def forward(self, unary: Float[Tensor, "N L"], kernels: Kernels) -> Float[Tensor, "N L"]:
        """Log Q(v) (N, D+1) from the `unary` energies (N, D+1), -ln Pr(v_i) of Eq. 4."""
        weights = (self.spatial_weight, self.bilateral_weight)
        matrices = message_matrices(weights, potts(unary.shape[1], unary))
        return mean_field(unary, PairwiseTerm(kernels, matrices), None, self.config.num_iterations).log_q

    def batch(self, images: Sequence[Tensor], unaries: Sequence[Tensor]) -> list[Tensor]:
        """`forward` of several images (H, W, 3) of any sizes, with any numbers of detections each.

        Images whose numbers of labels round up to the same are computed together, so that an iteration has as many
        operations as there are such numbers, not images.

        Raises:
            ValueError: If there is not one (H*W, D+1) for each image.
        """
        if len(images) != len(unaries):
            raise ValueError(f"batch: expected one unary for each of {len(images)} images, got {len(unaries)}")
        groups: dict[int, list[int]] = {}
        for index, (image, values) in enumerate(zip(images, unaries, strict=True)):
            if values.ndim != 2 or len(values) != image.shape[0] * image.shape[1]:
                expected = f"({image.shape[0] * image.shape[1]}, D+1)"
                raise ValueError(f"unaries[{index}]: expected shape {expected}, got {tuple(values.shape)}")
            groups.setdefault(-(-values.shape[1] // _LABELS) * _LABELS, []).append(index)
        log_q: dict[int, Tensor] = {}
        for num_labels, members in groups.items():
            kernels = build_kernels([images[index] for index in members], self.config.kernels)
            values = [unaries[index] for index in members]
            padded = torch.cat([pad(v, (0, num_labels - v.shape[1]), value=_ABSENT) for v in values])
            parts = self(padded, kernels).split([len(v) for v in values])
            log_q |= {index: part[:, : v.shape[1]] for index, part, v in zip(members, parts, values, strict=True)}
        return [log_q[index] for index in range(len(images))]
