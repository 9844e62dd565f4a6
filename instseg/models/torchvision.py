"""torchvision's segmentation models by name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.models import get_model, get_model_weights, list_models, segmentation

from instseg.checks import require
from instseg.models.weights import DEFAULT, download_weights, load_weights, read_weights
from instseg.shapes import Float
from instseg.storage import Place

_VOC_WEIGHTS = "COCO_WITH_VOC_LABELS_V1"  # trained on COCO alone, so VOC's validation images are unseen
_VOC_LABELS = 21
_AUXILIARY = "aux_classifier."  # its loss is not part of ours, and parameters without a gradient break DDP


class TorchvisionSegmentation(nn.Module):
    """A segmentation model of torchvision, without its auxiliary classifier.

    Args:
        name: E.g. "deeplabv3_mobilenet_v3_large" or "fcn_resnet50".
        num_labels: L, background included.
        weights: None, initialised at random; "default", trained on COCO with the 21 VOC labels (downloaded
            by torchvision into its own cache); or a file, as of `read_weights`.

    Raises:
        ValueError: If there is no such model, or the weights do not fit it.
        FileNotFoundError: If there is no such file, or the default is not in the cache and cannot be downloaded.
    """

    def __init__(self, name: str, num_labels: int, weights: Place | None = None) -> None:
        super().__init__()
        _check(name, num_labels, weights)
        self.model = get_model(name, weights=None, weights_backbone=None, num_classes=num_labels)
        if weights is not None:
            url = get_model_weights(name)[_VOC_WEIGHTS].url
            tensors = download_weights(url) if weights == DEFAULT else read_weights(weights)
            kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(_AUXILIARY)}
            load_weights(self.model, kept, f"weights {weights}: do not fit {name} with {num_labels} labels")

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B L H W"]:
        """Class logits.

        Args:
            images: (B, 3, H, W) float32, normalised as torchvision's ImageNet weights expect.

        Returns:
            (B, L, H, W) float32 logits.
        """
        return interpolate(self.coarse(images), size=images.shape[-2:], mode="bilinear", align_corners=False)

    def coarse(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B L h w"]:
        """What `forward` upsamples, at an eighth of the image's size or near it."""
        features = self.model.get_submodule("backbone")(images)
        head = self.model.get_submodule("classifier")
        return head(features if isinstance(self.model, segmentation.LRASPP) else features["out"])

    def stage_parameters(self, num_stages: int) -> Iterator[nn.Parameter]:
        """None, as backbones have no stages in common. Raises ValueError unless `num_stages` is 0."""
        require(num_stages == 0, "num_stages", '0 with any network but "fcn8s"', num_stages)
        return iter(())

    def new_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters behind the backbone."""
        return self.model.get_submodule("classifier").parameters()


def _check(name: str, num_labels: int, weights: Place | None) -> None:
    names = list_models(module=segmentation)
    if name not in names:
        nearest = difflib.get_close_matches(name, [*names, "logits", "fcn8s"], n=1, cutoff=0)[0]
        raise ValueError(f"semantic: unknown network {name!r}; did you mean {nearest!r}?")
    if weights == DEFAULT and num_labels != _VOC_LABELS:
        raise ValueError(f"semantic_weights: {name} has {_VOC_LABELS} labels, the data {num_labels}")
