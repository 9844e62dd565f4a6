"""The unary of Y_d, psi_U of Eq. 3, learned: how likely a detection is right before the CRF has looked at it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from instseg.models.crops import BOX, OF_BACKGROUND, OF_CLASS, OF_OTHERS, RIVALS
from instseg.shapes import Float, Int

_NUM_FEATURES = 10
_OF_CLASS = 8  # features learned for each class
_HIDDEN = 32
_SCALE = 4.0  # of features in 0..1, beside log-odds
_MIN_SCORE = 1e-4  # scores are kept so far from 0 and 1 that their log-odds are finite


class ValidityPrior(nn.Module):
    """Log-odds of Y_d = 1 from the detector's score, and from how F_d, the class probabilities and rivals agree.

    It begins as the detector's own log-odds.

    Args:
        num_labels: L.
    """

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.of_class = nn.Embedding(num_labels, _OF_CLASS)
        self.hidden = nn.Linear(_NUM_FEATURES + _OF_CLASS, _HIDDEN)
        self.out = nn.Linear(_HIDDEN, 1)
        nn.init.normal_(self.of_class.weight, std=0.1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        planes: Float[Tensor, "D planes size size"],
        foregrounds: Float[Tensor, "D size size"],
        labels: Int[Tensor, " D"],
        scores: Float[Tensor, " D"],
    ) -> Float[Tensor, " D"]:
        """Log-odds of Y_d = 1.

        Args:
            planes: Of `crop_planes`.
            foregrounds: F_d on the grid, probabilities.
            labels: l_d.
            scores: s_d.
        """
        log_odds = torch.logit(scores.clamp(_MIN_SCORE, 1 - _MIN_SCORE))
        features = torch.cat([log_odds[:, None], _SCALE * _agreement(planes, foregrounds), self.of_class(labels)], 1)
        return self.scale * log_odds + self.out(self.hidden(features).relu())[:, 0]


def _agreement(
    planes: Float[Tensor, "D planes size size"], foregrounds: Float[Tensor, "D size size"]
) -> Float[Tensor, "D features"]:
    """Nine features in 0..1: means over F_d and over the box, how sure F_d is, and the strongest other class."""
    box = planes[:, BOX]
    over_foreground = [_mean(planes[:, plane], foregrounds) for plane in (OF_CLASS, OF_BACKGROUND, OF_OTHERS, RIVALS)]
    over_box = [_mean(values, box) for values in (foregrounds, planes[:, OF_CLASS], planes[:, RIVALS])]
    certainty, strongest_other = _mean(foregrounds, foregrounds), planes[:, OF_OTHERS].amax((1, 2))
    return torch.stack([*over_foreground, *over_box, certainty, strongest_other], 1)


def _mean(values: Float[Tensor, "D size size"], weights: Float[Tensor, "D size size"]) -> Float[Tensor, " D"]:
    return (values * weights).sum((1, 2)) / weights.sum((1, 2)).clamp(min=1.0)
