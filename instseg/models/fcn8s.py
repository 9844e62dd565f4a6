"""FCN-8s on VGG-16 (Long, Shelhamer & Darrell, CVPR 2015), layer for layer as the authors' voc-fcn8s."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instseg.models.weights import read_weights
from instseg.shapes import Float
from instseg.storage import Place

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_POOL3, _POOL4 = 17, 24  # number of layers of `features` up to and including those pools
_FIRST_PADDING = 100  # lets an image of any size reach fc6, whose 7x7 window sees 224 pixels
_CROP_POOL4, _CROP_POOL3, _CROP_OUTPUT = 5, 9, 31  # where the streams meet, given that padding
_FULLY_CONNECTED = {"classifier.0": "fc6", "classifier.3": "fc7"}


class FCN8s(nn.Module):
    """FCN-8s: predictions at strides 32, 16 and 8, fused from coarse to fine.

    The score convolutions start at zero and the upsampling is fixed bilinear interpolation, as published.

    Args:
        num_labels: L, background included.
    """

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.features = _trunk()
        self.fc6 = nn.Conv2d(512, 4096, 7)
        self.fc7 = nn.Conv2d(4096, 4096, 1)
        self.score_fr = nn.Conv2d(4096, num_labels, 1)
        self.score_pool4 = nn.Conv2d(512, num_labels, 1)
        self.score_pool3 = nn.Conv2d(256, num_labels, 1)
        self._initialize()

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B L H W"]:
        """Class logits.

        Args:
            images: (B, 3, H, W) float32, normalised as torchvision's ImageNet weights expect.

        Returns:
            (B, L, H, W) float32 logits.
        """
        pool3 = self.features[:_POOL3](images)
        pool4 = self.features[_POOL3:_POOL4](pool3)
        pool5 = self.features[_POOL4:](pool4)
        fc6 = F.dropout(self.fc6(pool5).relu(), 0.5, self.training)
        fc7 = F.dropout(self.fc7(fc6).relu(), 0.5, self.training)
        fused = _upsample(self.score_fr(fc7), 2)  # stride 16
        fused = fused + _crop(self.score_pool4(pool4), _CROP_POOL4, fused.shape[-2:])
        fused = _upsample(fused, 2)  # stride 8
        fused = fused + _crop(self.score_pool3(pool3), _CROP_POOL3, fused.shape[-2:])
        return _crop(_upsample(fused, 8), _CROP_OUTPUT, images.shape[-2:])

    def load_imagenet_weights(self, path: Place) -> None:
        """Start from VGG-16 trained on ImageNet.

        Args:
            path: A file as of `read_weights` with torchvision's keys: `features.N.weight/bias` and, where it has them,
                `classifier.0` and `classifier.3`, which become fc6 and fc7. Any float dtype.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is no state dict, or lacks a tensor, or one has another shape.
        """
        tensors = read_weights(path)
        wanted = {f"features.{name}": target for name, target in self.features.named_parameters()}
        for source, target in _FULLY_CONNECTED.items():
            if f"{source}.weight" in tensors:
                layer = self.get_submodule(target)
                wanted |= {f"{source}.{name}": parameter for name, parameter in layer.named_parameters()}
        for name, target in wanted.items():
            _copy(tensors, name, target, path)

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]
        for score in (self.score_fr, self.score_pool4, self.score_pool3):
            nn.init.zeros_(score.weight)


def bilinear_kernel(factor: int) -> Float[Tensor, "2*{factor} 2*{factor}"]:
    """The interpolation kernel of a deconvolution that upsamples by `factor`.

    Args:
        factor: Upsampling factor, which is the deconvolution's stride.

    Returns:
        (2 * factor, 2 * factor) float32, separable and triangular.
    """
    size = 2 * factor
    center = factor - 0.5
    line = 1 - (torch.arange(size, dtype=torch.float32) - center).abs() / factor
    return line[:, None] * line[None, :]


def _trunk() -> nn.Sequential:
    """VGG-16's convolutions, numbered as torchvision numbers them so that its weights load by name."""
    layers: list[nn.Module] = []
    channels = 3
    for stage in _STAGES:
        for width in stage:
            padding = _FIRST_PADDING if not layers else 1
            layers += [nn.Conv2d(channels, width, 3, padding=padding), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2, 2, ceil_mode=True))
    return nn.Sequential(*layers)


def _upsample(scores: Float[Tensor, "B L h w"], factor: int) -> Float[Tensor, "B L {factor}*(h+1) {factor}*(w+1)"]:
    """(B, L, h, w) -> (B, L, factor * (h + 1), factor * (w + 1)): uncropped, as the offsets expect."""
    num_labels = scores.shape[1]
    kernel = bilinear_kernel(factor).to(scores).expand(num_labels, 1, -1, -1)
    return F.conv_transpose2d(scores, kernel, stride=factor, groups=num_labels)


def _crop(tensor: Tensor, offset: int, size: torch.Size) -> Tensor:
    return tensor[..., offset : offset + size[0], offset : offset + size[1]]


def _copy(tensors: dict[str, Tensor], name: str, target: nn.Parameter, path: Place) -> None:
    if name not in tensors:
        raise ValueError(f"semantic_weights: {path} has no tensor {name!r} (torchvision's names)")
    if tensors[name].numel() != target.numel():
        expected, got = tuple(target.shape), tuple(tensors[name].shape)
        raise ValueError(f"semantic_weights: {path}: {name!r}: expected {expected}, got {got}")
    with torch.no_grad():
        target.copy_(tensors[name].view_as(target))
