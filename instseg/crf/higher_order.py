"""The higher-order semantic CRF (paper 3.2, Eq. 3): unary, pairwise term and detection potentials, learnable."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from instseg.config import SemanticCrfConfig
from instseg.crf.dense import DenseCRF
from instseg.crf.detection import DetectionPotential
from instseg.crf.mean_field import MeanFieldState, mean_field
from instseg.crf.pairwise import Kernels
from instseg.shapes import Float, Int


class HigherOrderCRF(nn.Module):
    """The semantic CRF of Eq. 3: a dense CRF plus detection potentials with latent validity.

    Args:
        num_labels: L.
        config: Kernels, initial weights, form of the detection potential, T.
    """

    def __init__(self, num_labels: int, config: SemanticCrfConfig) -> None:
        super().__init__()
        self.config = config
        self.dense = DenseCRF(
            num_labels, config.kernels, config.spatial_weight, config.bilateral_weight, config.num_iterations
        )
        self.detection_weight_x = nn.Parameter(torch.full((num_labels,), config.detection_weight_x))
        self.detection_weight_y = nn.Parameter(torch.full((num_labels,), config.detection_weight_y))

    def potential(
        self, labels: Int[Tensor, " D"], scores: Float[Tensor, " D"], foregrounds: Float[Tensor, "D N"]
    ) -> DetectionPotential:
        """The detection potentials of one image: (D,) int64, (D,) float, (D, N) float 0/1."""
        return DetectionPotential(
            labels,
            scores,
            foregrounds,
            self.detection_weight_x,
            self.detection_weight_y,
            self.config.detection_form,
            self.config.validity_unary,
        )

    def forward(
        self, unary: Float[Tensor, "N L"], kernels: Kernels, detections: DetectionPotential | None
    ) -> MeanFieldState:
        """Q and Pr(Y) from the pixels' `unary` energies (N, L), the negated logits of the semantic network."""
        return mean_field(unary, self.dense.pairwise(kernels), detections, self.config.num_iterations)
