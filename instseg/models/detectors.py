"""torchvision's Faster R-CNN: an RGB image in, detections of the data's classes out."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import detection as torchvision_detection
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.ops import batched_nms, clip_boxes_to_image

from instseg.checks import array, require, unit_interval
from instseg.data.categories import match_classes
from instseg.models.weights import DEFAULT, download_weights, load_weights, read_weights
from instseg.storage import Place
from instseg.structures import Detections

_NUM_COCO = 91  # outputs of torchvision's weights: the background and COCO's ids 1..90, ten of which are no category
_HEAD = "roi_heads.box_predictor.cls_score.bias"
_WITHOUT_EPSILON = "fasterrcnn_resnet50_fpn"  # torchvision's weights of it were trained with a batch norm of eps 0


class Detector(nn.Module):
    """A Faster R-CNN of torchvision, in evaluation mode.

    Its own cuts would come before the categories become classes, so they are opened: those that are no class of the
    data would take places among its best 100, and a box that its NMS at 0.5 removes may be one that ours keeps, which
    first removes what removed it. The proposals' are part of the network as it was trained, and stay.

    Args:
        name: "fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "fasterrcnn_mobilenet_v3_large_fpn" or
            "fasterrcnn_mobilenet_v3_large_320_fpn".
        classes: The data's, 0 the background. A network of 91 outputs has COCO's categories, which become classes by
            name; one of as many outputs as there are classes has these, in this order.
        weights: None, initialised at random; "default", torchvision's, trained on COCO (downloaded by torchvision into
            its own cache); or a file, as of `read_weights`.
        nms_iou: Of two boxes of a class with a greater IoU than this, the one with the lower score goes.
        min_score: Detections that score less go.

    Raises:
        ValueError: If there is no such network, the weights do not fit it or the classes, or a limit is not in [0, 1].
        FileNotFoundError: If there is no such file, or the default is not in the cache and cannot be downloaded.
    """

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        weights: Place | None = None,
        nms_iou: float = 0.3,
        min_score: float = 0.05,
    ) -> None:
        super().__init__()
        unit_interval("nms_iou", nms_iou)
        unit_interval("min_score", min_score)
        tensors = _read(name, weights)
        num_outputs = tensors[_HEAD].numel() if _HEAD in tensors else len(classes)
        self._labels = torch.tensor(_labels_of_outputs(name, num_outputs, classes))
        self._nms_iou, self._min_score = nms_iou, min_score
        self.model = _build(name, num_outputs, min_score)
        if weights is not None:
            load_weights(self.model, tensors, f"weights {weights}: do not fit {name}")
        self.eval()

    @torch.no_grad()
    def forward(self, image: np.ndarray) -> Detections:
        """The detections of one image, the same each time on the same device.

        Args:
            image: (H, W, 3) uint8 RGB.

        Returns:
            Detections in the order of descending scores, boxes inside the image, without foregrounds.

        Raises:
            ValueError: If the image is of another shape or dtype, or so long that its short side would vanish.
        """
        pixels = _checked(image, self.model.transform.max_size)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
        device = next(self.parameters()).device
        output = self.model([torch.from_numpy(pixels).to(device).permute(2, 0, 1) / 255])[0]
        boxes, scores, outputs = (output[name].cpu() for name in ("boxes", "scores", "labels"))
        return self._select(clip_boxes_to_image(boxes, pixels.shape[:2]), scores, self._labels[outputs])

    def _select(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Detections:
        positive = (scores > 0) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        kept = (labels > 0) & (scores >= self._min_score) & positive
        boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
        # Classes are told apart by offsets on their boxes, which would cost digits in single precision.
        best = batched_nms(boxes.double(), scores.double(), labels, self._nms_iou)
        return Detections(labels[best].numpy(), scores[best].numpy(), boxes[best].numpy())


def _read(name: str, weights: Place | None) -> dict[str, Tensor]:
    names = [model for model in list_models(module=torchvision_detection) if model.startswith("fasterrcnn_")]
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
        raise ValueError(f"detector: unknown network {name!r}; did you mean {nearest!r}?")
    if weights is None:
        return {}
    return download_weights(get_model_weights(name)["DEFAULT"].url) if weights == DEFAULT else read_weights(weights)


def _labels_of_outputs(name: str, num_outputs: int, classes: Sequence[str]) -> list[int]:
    """The label of each output, 0 where it is none of the classes."""
    if num_outputs == _NUM_COCO:
        categories = get_model_weights(name)["DEFAULT"].meta["categories"]
        labels = list(match_classes(dict(enumerate(categories)), classes).values())
        require(any(labels), "classes", f"some of COCO's categories, which {name} detects", list(classes))
        return labels
    expected = f"a detector of {_NUM_COCO} outputs (COCO) or of {len(classes)} (the data's classes and the background)"
    require(num_outputs == len(classes), "weights", expected, num_outputs)
    return list(range(num_outputs))


def _build(name: str, num_outputs: int, min_score: float) -> nn.Module:
    model = get_model(
        name,
        weights=None,
        weights_backbone=None,
        num_classes=num_outputs,
        box_score_thresh=min_score / 2,  # it keeps what scores more, not as much
        box_nms_thresh=1.0,
        box_detections_per_img=sys.maxsize,
    )
    if name == _WITHOUT_EPSILON and num_outputs == _NUM_COCO:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 0.0
    return model


def _checked(image: np.ndarray, max_size: int) -> np.ndarray:
    pixels = array("image", image, "(H, W, 3) uint8")
    require(pixels.dtype == np.uint8, "image", "dtype uint8, RGB 0..255", pixels.dtype)
    shape_ok = pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size > 0
    require(shape_ok, "image", "shape (H, W, 3) with H, W >= 1", pixels.shape)
    height, width = pixels.shape[:2]
    ratio = max(height, width) / min(height, width)
    require(
        ratio < max_size, "image", f"sides of a ratio below {max_size}, which is scaled to fit", f"{height}x{width}"
    )
    return pixels
