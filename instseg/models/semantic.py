"""Semantic networks behind one interface: an RGB image in, class logits of the same size out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from instseg.shapes import Float, Num

LOGITS = "logits"  # the semantic source that is no network: logits that another system wrote
FCN8S = "fcn8s"
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class SemanticNetwork(nn.Module):
    """A fully convolutional network on one image, with ImageNet's normalisation before it.

    Args:
        body: Maps a normalised batch (B, 3, H, W) float32 to logits (B, L, H, W).
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


def build_semantic(name: str, num_labels: int, weights: str | None = None) -> SemanticNetwork | None:
    """The semantic network of that name.

    Args:
        name: "logits" (no network), "fcn8s", or a torchvision segmentation model, e.g. "fcn_resnet50".
        num_labels: L, background included.
        weights: None initialises at random. "fcn8s" takes a safetensors file of VGG-16 weights; torchvision's
            models take "default", their COCO weights with VOC classes.

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

        body: nn.Module = FCN8s(num_labels)
        if weights is not None:
            body.load_imagenet_weights(weights)  # pyright: ignore[reportCallIssue]
        return SemanticNetwork(body)
    from instseg.models.torchvision import TorchvisionSegmentation

    return SemanticNetwork(TorchvisionSegmentation(name, num_labels, weights))
