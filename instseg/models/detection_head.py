"""What the network knows of each detection: the given, its pixels, and what it learned to see in its box."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from instseg.models.crops import SIZE, crop_planes, paste
from instseg.models.foreground import ForegroundNetwork
from instseg.models.validity import ValidityPrior
from instseg.shapes import Bool, Float, Int
from instseg.structures import Detections


class DetectionTensors(NamedTuple):
    """The detections of one image on the network's device.

    Attributes:
        labels: (D,) int64, class l_d.
        scores: (D,) detector's scores s_d.
        boxes: (D, N) bool, the pixels B_d.
        foregrounds: (D, N) in 0..1, F_d; None until they are computed.
        seen: What was learned of them; None where nothing was.
    """

    labels: Int[Tensor, " D"]
    scores: Float[Tensor, " D"]
    boxes: Bool[Tensor, "D N"]
    foregrounds: Float[Tensor, "D N"] | None
    seen: SeenDetections | None = None

    @property
    def prior(self) -> Float[Tensor, " D"]:
        """(D,) s_d of Eq. 2, how likely each detection is right before the CRF: learned, else the detector's score."""
        return self.scores if self.seen is None else self.seen.prior.sigmoid()


class SeenDetections(NamedTuple):
    """What `DetectionHead` makes of the D detections of one image.

    Attributes:
        mask_logits: (D, size, size), F_d on the grid of each detection's window.
        prior: (D,) log-odds of Y_d = 1 before the CRF.
    """

    mask_logits: Float[Tensor, "D size size"]
    prior: Float[Tensor, " D"]

    def foregrounds(self, detections: Detections, height: int, width: int) -> Float[Tensor, "D N"]:
        """F_d as probabilities of the image's pixels."""
        return paste(self.mask_logits, detections, height, width).flatten(1)


class DetectionHead(nn.Module):
    """Foreground and validity of each detection, from its crop.

    Args:
        num_labels: L.
    """

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.foreground = ForegroundNetwork(num_labels)
        self.validity = ValidityPrior(num_labels)

    def forward(
        self,
        image: Float[Tensor, "H W 3"],
        logits: Float[Tensor, "L H W"],
        detections: Detections,
        with_gradient: Bool[np.ndarray, " D"] | None = None,
    ) -> SeenDetections:
        """Look at each detection.

        Args:
            image: RGB 0..255.
            logits: Of the classes, before the CRF.
            detections: D detections inside the image.
            with_gradient: Whose foregrounds have gradients, which take two thirds of the time; default: all.
        """
        labels = torch.from_numpy(detections.labels).to(image.device)
        scores = torch.from_numpy(detections.scores).to(image)
        planes = crop_planes(image, logits.softmax(0), detections)
        mask_logits = self._mask_logits(planes, labels, with_gradient)
        # A prior that could move F_d would make masks that look right, not right ones.
        prior = self.validity(planes, mask_logits.detach().sigmoid(), labels, scores)
        return SeenDetections(mask_logits, prior)

    def _mask_logits(
        self, planes: Float[Tensor, "D planes size size"], labels: Int[Tensor, " D"], with_gradient: np.ndarray | None
    ) -> Float[Tensor, "D size size"]:
        if with_gradient is None:
            return self.foreground(planes, labels)
        chosen = torch.from_numpy(with_gradient).to(planes.device)
        with torch.no_grad():
            rest = self.foreground(planes[~chosen], labels[~chosen])
        logits = rest.new_empty(len(planes), SIZE, SIZE)
        logits[~chosen] = rest
        logits[chosen] = self.foreground(planes[chosen], labels[chosen])
        return logits
