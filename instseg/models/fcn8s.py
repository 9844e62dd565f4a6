"""FCN-32s, -16s and -8s on VGG-16 (Long, Shelhamer & Darrell, CVPR 2015), layer for layer as the authors' networks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from instseg.checks import require
from instseg.models.weights import DEFAULT, download_weights, read_weights
from instseg.shapes import Float
from instseg.storage import Place

_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_POOLS = tuple(accumulate(2 * len(stage) + 1 for stage in _STAGES))  # layers of `features` up to and with each pool
_POOL3, _POOL4 = _POOLS[2:4]
_PADDING = 100  # of the image, as published, lets one of any size reach fc6, whose 7x7 window sees 224 pixels
_FC6_PADDING = {100: 0, 1: 3}  # by that of the image: with 1, fc6 is padded instead
# By the padding of the image: where the streams meet, and where the image begins by the stride of the finest scores.
_CROP_POOL4 = {100: 5, 1: -1}
_CROP_POOL3 = {100: 9, 1: -1}
_CROP_OUTPUT = {100: {32: 19, 16: 27, 8: 31}, 1: {32: 16, 16: 8, 8: 4}}
_FULLY_CONNECTED = {"classifier.0": "fc6", "classifier.3": "fc7"}
_VGG_WIDTH = 4096


class FCN8s(nn.Module):
    """FCN-8s: predictions at strides 32, 16 and 8, fused from coarse to fine; or what is trained before it.

    The score convolutions start at zero and the upsampling is fixed bilinear interpolation, as published. FCN-32s and
    FCN-16s lack the finer ones, `score_pool4` and `score_pool3`, and have the other parameters under the same names: a
    network that takes those of a coarser one by name, and keeps its own zeros for the rest, starts with its predictions
    (but for the interpolation, which in two steps is a little smoother than in one).

    Args:
        num_labels: L, background included.
        width: Channels of fc6 and fc7.
        stride: Of the finest scores: 32, 16 or 8.
        padding: Of the image: 100 as published, or 1 with fc6 padded by 3, which does without the zeros around the
            image. They are more than half of the work at 375 x 500 pixels, and change what is seen at the border alone.
    """

    def __init__(self, num_labels: int, width: int = _VGG_WIDTH, stride: int = 8, padding: int = _PADDING) -> None:
        super().__init__()
        self.stride = stride
        self.padding = padding
        self.features = _trunk(padding)
        self.fc6 = nn.Conv2d(_STAGES[4][-1], width, 7, padding=_FC6_PADDING[padding])
        self.fc7 = nn.Conv2d(width, width, 1)
        self.score_fr = nn.Conv2d(width, num_labels, 1)
        self.score_pool4 = nn.Conv2d(_STAGES[3][-1], num_labels, 1) if stride <= 16 else None
        self.score_pool3 = nn.Conv2d(_STAGES[2][-1], num_labels, 1) if stride == 8 else None
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
        scores = self.score_fr(fc7)
        if self.score_pool4 is not None:
            scores = _fuse(scores, self.score_pool4(pool4), _CROP_POOL4[self.padding])
        if self.score_pool3 is not None:
            scores = _fuse(scores, self.score_pool3(pool3), _CROP_POOL3[self.padding])
        return _crop(_upsample(scores, self.stride), _CROP_OUTPUT[self.padding][self.stride], images.shape[-2:])

    def stage_parameters(self, num_stages: int) -> Iterator[nn.Parameter]:
        """Parameters of the first `num_stages` of VGG-16's five stages of convolutions, each up to its pool.

        Raises:
            ValueError: If there are not as many.
        """
        require(0 <= num_stages <= len(_POOLS), "num_stages", f"0 to {len(_POOLS)}", num_stages)
        return self.features[: (0, *_POOLS)[num_stages]].parameters()

    def new_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that VGG-16 has not: of the score convolutions, and of fc6 and fc7 at another width than 4096."""
        vgg = [self.features] if self.fc6.out_channels != _VGG_WIDTH else [self.features, self.fc6, self.fc7]
        known = {parameter for layers in vgg for parameter in layers.parameters()}
        return (parameter for parameter in self.parameters() if parameter not in known)

    def load_imagenet_weights(self, path: Place) -> None:
        """Start from VGG-16 trained on ImageNet.

        Args:
            path: "default", torchvision's (0.5 GB, downloaded into torch's cache); or a file as of `read_weights` with
                its keys: `features.N.weight/bias` and, where it has them, `classifier.0` and `classifier.3`, which
                become fc6 and fc7 if these are 4096 wide. Of another width, they stay as they are, at random.
                Any float dtype.

        Raises:
            FileNotFoundError: If there is no such file, or the default can neither be found nor downloaded.
            ValueError: If the file is no state dict, or lacks a tensor, or one has another shape.
        """
        tensors = _torchvision_weights() if path == DEFAULT else read_weights(path)
        wanted = {f"features.{name}": target for name, target in self.features.named_parameters()}
        for source, target in _FULLY_CONNECTED.items():
            if f"{source}.weight" in tensors and self.fc6.out_channels == _VGG_WIDTH:
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
            if score is not None:
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


def _torchvision_weights() -> dict[str, Tensor]:
    from torchvision.models import VGG16_Weights  # the rest of this module does without

    return download_weights(VGG16_Weights.IMAGENET1K_V1.url)


def _trunk(first_padding: int) -> nn.Sequential:
    """VGG-16's convolutions, numbered as torchvision numbers them so that its weights load by name."""
    layers: list[nn.Module] = []
    channels = 3
    for stage in _STAGES:
        for width in stage:
            padding = first_padding if not layers else 1
            layers += [nn.Conv2d(channels, width, 3, padding=padding), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2, 2, ceil_mode=True))
    return nn.Sequential(*layers)


def _upsample(scores: Float[Tensor, "B L h w"], factor: int) -> Float[Tensor, "B L {factor}*(h+1) {factor}*(w+1)"]:
    """(B, L, h, w) -> (B, L, factor * (h + 1), factor * (w + 1)): uncropped, as the offsets expect."""
    num_labels = scores.shape[1]
    kernel = bilinear_kernel(factor).to(scores).expand(num_labels, 1, -1, -1)
    return F.conv_transpose2d(scores, kernel, stride=factor, groups=num_labels)


def _fuse(coarse: Float[Tensor, "B L h w"], finer: Float[Tensor, "B L H W"], offset: int) -> Float[Tensor, "B L _ _"]:
    """The sum at twice the resolution of the coarse scores, of which the first lies on the finer one at `offset`.

    With a negative offset it lies outside, and the sum has the finer scores' size.
    """
    upsampled = _upsample(coarse, 2)
    if offset < 0:
        return _crop(upsampled, -offset, finer.shape[-2:]) + finer
    return upsampled + _crop(finer, offset, upsampled.shape[-2:])


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
