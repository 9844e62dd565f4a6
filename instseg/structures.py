"""The nouns of every module: validated, frozen records of NumPy arrays.

Images are RGB uint8. Boxes are `xyxy` in pixels, half-open, inside the image. Class 0 is background, 255 is void.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from instseg.checks import array, require

if TYPE_CHECKING:
    from supervision import Detections as SupervisionDetections  # pyright: ignore[reportMissingImports]

BACKGROUND = 0
IGNORE_LABEL = 255
VOID = -1  # of instance maps


@dataclass(frozen=True, eq=False)
class Detections:
    """The D object detections of one image: (l_d, s_d, B_d, F_d) of paper section 3.2. D may be 0.

    Lists, and arrays of other dtypes and byte orders, become what stands below.

    Attributes:
        labels: (D,) int64, class l_d in 1..K.
        scores: (D,) float32, detector confidence s_d in (0, 1].
        boxes: (D, 4) float32, xyxy pixels, half-open.
        foregrounds: (D, H, W) bool, the pixels F_d; a row without any pixel means that foreground segmentation failed
            and keeps the detection out of the CRF (it stays a candidate instance). None until it is computed.

    Raises:
        ValueError: If shapes, dtypes or ranges are not as above.
    """

    labels: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    foregrounds: np.ndarray | None = None

    def __post_init__(self) -> None:
        labels = array("labels", self.labels, "integers (D,)")
        num = labels.size
        require(labels.shape == (num,), "labels", "shape (D,)", labels.shape)
        require(labels.dtype.kind in "ui" or num == 0, "labels", "integers", labels.dtype)  # an empty list has floats
        scores = array("scores", self.scores, f"numbers ({num},)", np.float32)
        require(scores.shape == (num,), "scores", f"shape ({num},) as labels", scores.shape)
        boxes = array("boxes", self.boxes, f"numbers ({num}, 4)", np.float32)
        boxes = boxes.reshape(-1, 4) if boxes.size == 0 else boxes
        require(boxes.shape == (num, 4), "boxes", f"shape ({num}, 4)", boxes.shape)
        for index in range(num):
            _check_detection(index, int(labels[index]), float(scores[index]), boxes[index])
        foregrounds = None if self.foregrounds is None else _checked_foregrounds(self.foregrounds, num)
        _store(self, labels=labels.astype(np.int64, copy=False), scores=scores, boxes=boxes, foregrounds=foregrounds)

    def __len__(self) -> int:
        return len(self.labels)

    @staticmethod
    def empty(height: int, width: int) -> Detections:
        """No detections on an image of `height` x `width` pixels."""
        return Detections(
            labels=np.zeros(0, np.int64),
            scores=np.zeros(0, np.float32),
            boxes=np.zeros((0, 4), np.float32),
            foregrounds=np.zeros((0, height, width), np.bool_),
        )

    def box_masks(self, height: int, width: int) -> np.ndarray:
        """(D, height, width) bool, the pixels B_d of each box."""
        masks = np.zeros((len(self), height, width), np.bool_)
        for index, box in enumerate(self.boxes):
            masks[(index, *box_to_slices(box, height, width))] = True
        return masks

    def check_image(self, height: int, width: int, num_labels: int) -> None:
        """Check against the image and class list that these detections belong to.

        Raises:
            ValueError: If a box leaves the image, a class is not in 1..num_labels-1, or foregrounds have another size.
        """
        for index, (x0, y0, x1, y1) in enumerate(self.boxes):
            inside = x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height
            require(inside, f"boxes[{index}]", f"inside the {width}x{height} image", (x0, y0, x1, y1))
            label = int(self.labels[index])
            require(label < num_labels, f"labels[{index}]", f"a class in 1..{num_labels - 1}", label)
        if self.foregrounds is not None:
            size = self.foregrounds.shape[1:]
            require(size == (height, width), "foregrounds", f"image size {(height, width)}", size)


@dataclass(frozen=True, eq=False)
class Sample:
    """One image with everything known about it.

    Attributes:
        image_id: Unique in its data set.
        image: (H, W, 3) uint8 RGB.
        detections: Detections, with foregrounds once prepared.
        semantic: (H, W) uint8 class map, 255 void; None without ground truth.
        instances: (H, W) int32, 0 background, 1..G instances, 255 (8-bit source) recorded as -1 void; None without
            ground truth.
        instance_labels: (G,) int64, class of instance g+1; 0 where that id has no pixel.
        logits: (L, h, w) float16 of an external semantic network at any resolution; None if there is none.
    """

    image_id: str
    image: np.ndarray
    detections: Detections
    semantic: np.ndarray | None = None
    instances: np.ndarray | None = None
    instance_labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    logits: np.ndarray | None = None

    def __post_init__(self) -> None:
        image = array("image", self.image, "(H, W, 3) uint8")
        _store(self, image=image)
        require(image.dtype == np.uint8, "image", "dtype uint8, RGB 0..255", image.dtype)
        shape_ok = image.ndim == 3 and image.shape[2] == 3 and image.size > 0
        require(shape_ok, "image", "shape (H, W, 3) with H, W >= 1", image.shape)
        for name in ("semantic", "instances"):
            if (value := getattr(self, name)) is not None:
                plane = array(f"{self.image_id}: {name}", value, "integers (H, W)")
                size_ok = plane.shape == image.shape[:2]
                require(size_ok, f"{self.image_id}: {name}", f"the image's size {image.shape[:2]}", plane.shape)
                _store(self, **{name: plane})

    @property
    def known_instances(self) -> np.ndarray | None:
        """(H, W) int32: `instances`, with -1 also where no instance lies and the class is void.

        What scores, losses and pictures compare with: of a pixel without an instance whose class is void nobody knows
        whether it is background.
        """
        if self.instances is None or self.semantic is None:
            return self.instances
        return np.where((self.instances == BACKGROUND) & (self.semantic == IGNORE_LABEL), -1, self.instances)


@dataclass(frozen=True, eq=False)
class InstanceMap:
    """The instance segmentation of one image: K non-overlapping instances, the output of the whole system.

    Attributes:
        instances: (H, W) int32, 0 background, k = 1..K.
        labels: (K,) int64, class of instance k+1.
        scores: (K,) float32, ranking score (ALGORITHM section 6).
        detection_indices: (K,) int64, the detection that instance k+1 came from.
        semantic: (H, W) uint8, the refined semantic segmentation; None where it was not computed.
    """

    instances: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    detection_indices: np.ndarray
    semantic: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def masks(self) -> np.ndarray:
        """(K, H, W) bool, the pixels of each instance."""
        return self.instances == np.arange(1, len(self) + 1)[:, None, None]

    def to_coco(self, image_id: int | str) -> list[dict[str, Any]]:
        """COCO results, one for each instance: {image_id, category_id, score, bbox, segmentation}.

        The category is the label, the box [x, y, w, h] that of the mask in pixels, the segmentation compressed run
        lengths with text counts, which JSON can hold.

        Raises:
            ImportError: If pycocotools is not installed.
        """
        from pycocotools import mask as coco_mask

        results = []
        for index, mask in enumerate(self.masks):
            rle: Any = coco_mask.encode(np.asfortranarray(mask, np.uint8))
            result = {
                "image_id": image_id,
                "category_id": int(self.labels[index]),
                "score": float(self.scores[index]),
                "bbox": [float(value) for value in coco_mask.toBbox(rle)],
                "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode()},
            }
            results.append(result)
        return results

    @staticmethod
    def from_coco(results: Sequence[dict[str, Any]], size: tuple[int, int]) -> InstanceMap:
        """The instances of one image's COCO results, as `to_coco` or another system wrote them.

        Where masks overlap, the higher score is on top; what is covered altogether is left out.

        Args:
            results: Each with category_id, score, and a segmentation in run lengths or polygons.
            size: (height, width) of the image.

        Returns:
            The instances in the order of the results, whose indices are its `detection_indices`.

        Raises:
            ValueError: If one lacks a field or its mask has another size.
            ImportError: If pycocotools is not installed.
        """
        owner = np.full(size, -1)
        for index in sorted(range(len(results)), key=lambda i: results[i].get("score", 0)):
            owner[_decode_mask(f"results[{index}]", results[index], size)] = index
        kept = np.unique(owner[owner >= 0])
        renumber = np.zeros(len(results) + 1, np.int32)  # the last stands for -1
        renumber[kept] = np.arange(1, len(kept) + 1)
        return InstanceMap(
            instances=renumber[owner],
            labels=np.array([results[index]["category_id"] for index in kept], np.int64),
            scores=np.array([results[index]["score"] for index in kept], np.float32),
            detection_indices=kept.astype(np.int64),
        )

    def to_supervision(self) -> SupervisionDetections:
        """The instances as `supervision.Detections`, with masks, tight boxes (xyxy), labels and scores.

        Raises:
            ImportError: If the package supervision is not installed, which instseg does not need otherwise.
        """
        try:
            import supervision  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ImportError("to_supervision needs the package supervision: pip install supervision") from None
        masks = self.masks
        corners = [[(axis.min(), axis.max() + 1) for axis in np.nonzero(mask)] for mask in masks]
        boxes = [[x0, y0, x1, y1] for (y0, y1), (x0, x1) in corners]
        return supervision.Detections(
            xyxy=np.array(boxes, np.float32).reshape(-1, 4), mask=masks, confidence=self.scores, class_id=self.labels
        )


def _decode_mask(name: str, result: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool, of a COCO result's run lengths or polygons."""
    from pycocotools import mask as coco_mask

    missing = {"category_id", "score", "segmentation"} - result.keys()
    require(not missing, name, "category_id, score and segmentation", f"none of {sorted(missing)}")
    segmentation = result["segmentation"]
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))  # pyright: ignore
    elif isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, *size)
    got = tuple(segmentation["size"])
    require(got == size, f"{name}: segmentation", f"the image's size {size}", got)
    return coco_mask.decode(segmentation).astype(np.bool_)


def box_to_slices(box: np.ndarray, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns of the pixels that a box touches, inside the image; at least one pixel."""
    x0, y0 = (int(np.floor(value)) for value in box[:2])
    x1, y1 = (int(np.ceil(value)) for value in box[2:])
    x0, y0 = min(max(x0, 0), width - 1), min(max(y0, 0), height - 1)
    return slice(y0, max(min(y1, height), y0 + 1)), slice(x0, max(min(x1, width), x0 + 1))


def _checked_foregrounds(value: np.ndarray, num: int) -> np.ndarray:
    foregrounds = array("foregrounds", value, f"truth values ({num}, H, W)")
    require(foregrounds.dtype == np.bool_, "foregrounds", "dtype bool", foregrounds.dtype)
    shape_ok = foregrounds.ndim == 3 and len(foregrounds) == num
    require(shape_ok, "foregrounds", f"shape ({num}, H, W)", foregrounds.shape)
    return foregrounds


def _check_detection(index: int, label: int, score: float, box: np.ndarray) -> None:
    require(label >= 1, f"labels[{index}]", "a foreground class, 1 or more (0 is background)", label)
    require(0.0 < score <= 1.0, f"scores[{index}]", "a confidence in (0, 1]", score)
    finite = bool(np.isfinite(box).all())
    require(
        finite and box[0] < box[2] and box[1] < box[3],
        f"boxes[{index}]",
        "finite x0 < x1, y0 < y1",
        box.tolist(),
    )


def _store(record: Detections | Sample, **values: np.ndarray | None) -> None:
    for name, value in values.items():
        object.__setattr__(record, name, value)  # past the frozen record's own guard
