"""The instance CRF (paper 3.3, Eq. 5): a dense CRF whose label set, one label a detection, is new for every image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from instseg.config import InstanceCrfConfig
from instseg.crf.mean_field import PairwiseTerm, mean_field
from instseg.crf.pairwise import Kernels, message_matrices, potts


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

    def forward(self, log_identity: Tensor, kernels: Kernels) -> Tensor:
        """Log Q(v) (N, D+1) from log Pr(v) (N, D+1) of Eq. 4, whose negative is the unary."""
        weights = (self.spatial_weight, self.bilateral_weight)
        matrices = message_matrices(weights, potts(log_identity.shape[1], log_identity))
        return mean_field(-log_identity, PairwiseTerm(kernels, matrices), None, self.config.num_iterations).log_q
