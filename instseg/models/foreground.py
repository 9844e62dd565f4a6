"""The foreground F_d of each detection (paper 3.2), from a small network that learns it from true masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d

from instseg.models.crops import BOX, COLOURS, GIVEN, NUM_PLANES
from instseg.shapes import Float, Int

_WIDTH = 16  # channels
_COLOUR_JITTER = 0.2  # in training, the standard deviation of a shift of each colour, in those of natural images
_WITHHELD = 0.3  # how often what was given is withheld in training, so that the network can do without


class ForegroundNetwork(nn.Module):
    """A U-Net of three levels over the planes of `crop_planes`.

    Without normalisation layers: they made no better masks, and a batch of one image's detections is none to them.

    Args:
        num_labels: L.
    """

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        width = _WIDTH  # at the crop's own resolution
        self.down = nn.ModuleList([_block(NUM_PLANES, width), _block(width, 2 * width), _block(2 * width, 4 * width)])
        self.bottom = _block(4 * width, 4 * width)
        self.of_class = nn.Embedding(num_labels, 4 * width)
        self.up = nn.ModuleList([_block(8 * width, 4 * width), _block(6 * width, 2 * width), _block(3 * width, width)])
        self.out = nn.Conv2d(width, 1, 1)
        nn.init.zeros_(self.of_class.weight)

    def forward(
        self, planes: Float[Tensor, "D planes size size"], labels: Int[Tensor, " D"]
    ) -> Float[Tensor, "D size size"]:
        """Logits of F_d on the grid: in training of one of two mirror images at random, else the mean of both."""
        planes = planes.contiguous(memory_format=torch.channels_last)  # a third faster on CPUs
        if not self.training:
            return (self._logits(planes, labels) + self._mirrored_logits(planes, labels)) / 2
        planes = planes.clone()  # the caller's may be this very tensor
        planes[:, COLOURS] += _COLOUR_JITTER * torch.randn(len(planes), 3, 1, 1).to(planes)
        if torch.rand(()) < _WITHHELD:
            planes[:, GIVEN] = planes[:, BOX]
        return self._mirrored_logits(planes, labels) if torch.rand(()) < 0.5 else self._logits(planes, labels)

    def _mirrored_logits(
        self, planes: Float[Tensor, "D planes size size"], labels: Int[Tensor, " D"]
    ) -> Float[Tensor, "D size size"]:
        return self._logits(planes.flip(3), labels).flip(2)

    def _logits(
        self, planes: Float[Tensor, "D planes size size"], labels: Int[Tensor, " D"]
    ) -> Float[Tensor, "D size size"]:
        skipped, features = [], planes
        for block in self.down:
            features = block(features)
            skipped.append(features)
            features = max_pool2d(features, 2)
        features = self.bottom(features) + self.of_class(labels)[:, :, None, None]
        for block in self.up:
            larger = interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)
            features = block(torch.cat([larger, skipped.pop()], 1))
        return self.out(features)[:, 0]


def _block(num_in: int, num_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (num_in, num_out):
        convolution = nn.Conv2d(channels, num_out, 3, padding=1)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        assert convolution.bias is not None  # for type checkers
        nn.init.zeros_(convolution.bias)
        layers += [convolution, nn.ReLU()]
    return nn.Sequential(*layers)
