"""torchvision's segmentation models by name."""

from __future__ import annotations

import difflib

from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models, segmentation

from instseg.shapes import Float

_VOC_WEIGHTS = "COCO_WITH_VOC_LABELS_V1"  # trained on COCO alone, so VOC's validation images are unseen
_VOC_LABELS = 21


class TorchvisionSegmentation(nn.Module):
    """A segmentation model of torchvision.

    Args:
        name: E.g. "deeplabv3_mobilenet_v3_large" or "fcn_resnet50".
        num_labels: L, background included.
        weights: None, initialised at random; or "default", trained on COCO with the 21 VOC labels (downloaded
            by torchvision into its own cache).

    Raises:
        ValueError: If there is no such model or weights, or the weights have another number of labels.
        FileNotFoundError: If the weights are not in the cache and cannot be downloaded.
    """

    def __init__(self, name: str, num_labels: int, weights: str | None = None) -> None:
        super().__init__()
        _check(name, num_labels, weights)
        self.model = _pretrained(name) if weights else _untrained(name, num_labels)
        # The auxiliary loss is not part of ours, and parameters without a gradient break DDP.
        setattr(self.model, "aux_classifier", None)  # noqa: B010

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B L H W"]:
        """Class logits.

        Args:
            images: (B, 3, H, W) float32, normalised as torchvision's ImageNet weights expect.

        Returns:
            (B, L, H, W) float32 logits.
        """
        return self.model(images)["out"]


def _check(name: str, num_labels: int, weights: str | None) -> None:
    names = list_models(module=segmentation)
    if name not in names:
        nearest = difflib.get_close_matches(name, [*names, "logits", "fcn8s"], n=1, cutoff=0)[0]
        raise ValueError(f"semantic: unknown network {name!r}; did you mean {nearest!r}?")
    if weights not in (None, "default"):
        raise ValueError(f'semantic_weights: expected "default" or unset for {name}, got {weights!r}')
    if weights and num_labels != _VOC_LABELS:
        raise ValueError(f"semantic_weights: {name} has {_VOC_LABELS} labels, the data {num_labels}")


def _untrained(name: str, num_labels: int) -> nn.Module:
    return get_model(name, weights=None, weights_backbone=None, num_classes=num_labels)


def _pretrained(name: str) -> nn.Module:
    weights = get_model_weights(name)[_VOC_WEIGHTS]
    try:
        return get_model(name, weights=weights, weights_backbone=None)
    except OSError as error:
        raise FileNotFoundError(
            f"semantic_weights: could not download {weights.url} ({error}); put that file into "
            "torch's cache ($TORCH_HOME/hub/checkpoints), or leave semantic_weights unset"
        ) from error
