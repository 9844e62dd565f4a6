"""The instance CRF (paper 3.3, Eq. 5): a dense CRF whose label set, one label a detection, is new for every image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from instseg.config import InstanceCrfConfig
from instseg.crf.mean_field import mean_field
from instseg.crf.pairwise import Kernel, pairwise_message


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

    def forward(self, log_identity: Tensor, kernels: Sequence[Kernel]) -> Tensor:
        """Log Q(v) (N, D+1) from log Pr(v) (N, D+1) of Eq. 4, whose negative is the unary."""
        weights = (self.spatial_weight, self.bilateral_weight)
        num_iterations = self.config.num_iterations
        return mean_field(-log_identity, lambda q: pairwise_message(q, kernels, weights), None, num_iterations).log_q
