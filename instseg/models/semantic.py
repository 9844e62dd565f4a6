"""Semantic networks behind one interface: an RGB image in, class logits of the same size out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from instseg.models.weights import DEFAULT
from instseg.shapes import Float, Num
from instseg.storage import StoragePath

LOGITS = "logits"  # the semantic source that is no network: logits that another system wrote
FCN8S = "fcn8s"
_STRIDE = 8  # of coarse logits
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class SemanticNetwork(nn.Module):
    """A fully convolutional network on one image, with ImageNet's normalisation before it.

    Args:
        body: Maps a normalised batch (B, 3, H, W) float32 to logits (B, L, H, W). One that upsamples coarse logits
            bilinearly has a method `coarse` that returns them; one to train has `stage_parameters` and
            `new_parameters`.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, image: Float[Tensor, "3 H W"]) -> Float[Tensor, "L H W"]:
        """Class logits.

        Args:
            image: (3, H, W) float32 RGB in 0..255.

        Returns:
            (L, H, W) float32 logits.
        """
        return self.body(normalize(image)[None])[0]

    @torch.no_grad()
    def coarse_logits(self, image: Float[Tensor, "3 H W"]) -> Float[Tensor, "L h w"]:
        """Class logits to store: upsampled bilinearly, align_corners=False, they are those of `forward`, or near them.

        Args:
            image: (3, H, W) float32 RGB in 0..255.

        Returns:
            (L, h, w) float32, the body's own before it upsamples them; else an eighth of the image's size, rounded up.
        """
        if hasattr(self.body, "coarse"):
            return self.body.coarse(normalize(image)[None])[0]  # pyright: ignore[reportCallIssue]
        size = [-(-side // _STRIDE) for side in image.shape[1:]]
        return interpolate(self(image)[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]

    def stage_parameters(self, num_stages: int) -> Iterator[nn.Parameter]:
        """Parameters of the first stages, as of `FCN8s.stage_parameters`; torchvision's networks have 0 of them.

        Raises:
            ValueError: If there are not as many.
        """
        return self.body.stage_parameters(num_stages)  # pyright: ignore[reportCallIssue]

    def new_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that no ImageNet weights are for: as of `FCN8s.new_parameters`, or torchvision's classifier."""
        return self.body.new_parameters()  # pyright: ignore[reportCallIssue]

    def train(self, mode: bool = True) -> SemanticNetwork:
        """As `nn.Module.train`, but batch normalisation keeps its statistics: one image is no batch."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


def normalize(image: Num[Tensor, "3 H W"]) -> Float[Tensor, "3 H W"]:
    """ImageNet normalisation as torchvision's weights expect it.

    Args:
        image: (3, H, W) RGB in 0..255.

    Returns:
        (3, H, W) float32, roughly zero mean and unit variance.
    """
    mean = torch.tensor(_MEAN, device=image.device)[:, None, None]
    std = torch.tensor(_STD, device=image.device)[:, None, None]
    return (image.float() / 255 - mean) / std


def build_semantic(
    name: str,
    num_labels: int,
    weights: str | None = None,
    fcn_width: int = 4096,
    fcn_stride: int = 8,
    fcn_padding: int = 100,
) -> SemanticNetwork | None:
    """The semantic network of that name.

    Args:
        name: "logits" (no network), "fcn8s", or a torchvision segmentation model, e.g. "fcn_resnet50".
        num_labels: L, background included.
        weights: None initialises at random; else a file as of `read_weights`, for "fcn8s" of VGG-16; or "default",
            torchvision's: for "fcn8s" VGG-16 trained on ImageNet, else the model on COCO with VOC classes.
        fcn_width: As of `FCN8s`, for "fcn8s" alone.
        fcn_stride: Likewise.
        fcn_padding: Likewise.

    Returns:
        The network, or None for "logits".

    Raises:
        ValueError: If the name is unknown, or the weights do not fit.
        FileNotFoundError: If the weights cannot be had.
    """
    if name == LOGITS:
        if weights is not None:
            raise ValueError(f'semantic_weights: "logits" has no weights, got {weights!r}; leave it unset')
        return None
    if name == FCN8S:
        from instseg.models.fcn8s import FCN8s

        body: nn.Module = FCN8s(num_labels, fcn_width, fcn_stride, fcn_padding)
        if weights is not None:
            body.load_imagenet_weights(weights)  # pyright: ignore[reportCallIssue]
        return SemanticNetwork(body)
    from instseg.models.torchvision import TorchvisionSegmentation

    return SemanticNetwork(TorchvisionSegmentation(name, num_labels, weights))


def weights_file(weights: str | None) -> StoragePath | None:
    """The file that `build_semantic` reads its weights from, None where it reads none."""
    return None if weights is None or weights == DEFAULT else StoragePath.of(weights)
