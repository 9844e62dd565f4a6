"""COCO's mask AP of instances, by pycocotools' own COCOeval, which is given the records' IoUs in the place of masks.

Void pixels are taken off the predictions, as in AP^r, and are a crowd of every class besides: a prediction that matches
no true instance and has a share of its pixels in void that reaches the threshold is neither right nor wrong.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from instseg.evaluation.ap_r import ImageRecord
from instseg.evaluation.semantic import class_mean
from instseg.shapes import Float

SIZES = ("small", "medium", "large")  # below 32 x 32 pixels, below 96 x 96, above


@dataclass(frozen=True, eq=False)
class CocoAp:
    """Average precision in 0..1, at most 100 predictions of a class and image; NaN where there is no ground truth.

    Attributes:
        values: (T, K) float64 at IoU .5 to .95 in steps of .05, of classes 1..K.
        by_size: (3,) float64, mean over thresholds and classes by `SIZES` of the true instances.
    """

    values: Float[np.ndarray, "T K"]
    by_size: Float[np.ndarray, " 3"]

    @property
    def of_class(self) -> np.ndarray:
        """(K,) AP of each class: the mean over thresholds."""
        return self.values.mean(axis=0)

    def means(self) -> dict[str, float]:
        """The means over classes by the names of COCO's own summary."""
        at = {"ap": self.of_class, "ap_50": self.values[0], "ap_75": self.values[5]}
        sizes = {f"ap_{name}": float(value) for name, value in zip(SIZES, self.by_size, strict=True)}
        return {name: class_mean(values) for name, values in at.items()} | sizes


def coco_ap(records: Sequence[ImageRecord], num_labels: int) -> CocoAp:
    """Of classes 1..K over all images.

    Args:
        records: One record for each image, in any order; equal scores rank by image id, then as in the record.
        num_labels: L = K + 1.
    """
    scorer = _Scorer(sorted(records, key=lambda record: record.image_id), num_labels)
    with redirect_stdout(io.StringIO()):  # it prints how far it is
        scorer.evaluate()
        scorer.accumulate()
    precision = scorer.eval["precision"][..., -1]  # (T, R, K, A), -1 where there is no ground truth
    precision = np.where(precision < 0, np.nan, precision).mean(axis=1)
    return CocoAp(precision[:, :, 0], np.array([class_mean(precision[:, :, size]) for size in (1, 2, 3)]))


class _Scorer(COCOeval):
    """COCOeval of records: what it asks of its files and of masks is answered from them."""

    _gts: Any  # true instances and predictions by image and class; it makes both, empty
    _dts: Any

    def __init__(self, records: Sequence[ImageRecord], num_labels: int) -> None:
        super().__init__(iouType="segm")
        self._records = records
        self.params.imgIds, self.params.catIds = list(range(len(records))), list(range(1, num_labels))

    def _prepare(self) -> None:
        for image, record in enumerate(self._records):
            crowds = {*record.labels.tolist()} if record.void_pixels.any() else set()
            for index, label in enumerate(record.truth_labels.tolist()):
                self._gts[image, label].append(_region(index, int(record.truth_pixels[index])))
            for label in crowds:
                self._gts[image, label].append(_region(len(record.truth_labels), 0, crowd=True))
            for index, label in enumerate(record.labels.tolist()):
                scored = _region(index, int(record.pixels[index])) | {"score": float(record.scores[index])}
                self._dts[image, label].append(scored)

    def computeIoU(self, imgId: Any, catId: Any) -> Any:  # noqa: N802 its name there
        """(D, G) IoUs of the predictions, best first, with the true instances and the void."""
        truths, found, record = self._gts[imgId, catId], self._dts[imgId, catId], self._records[imgId]
        if not truths or not found:
            return []
        best = sorted(found, key=lambda region: -region["score"])[: self.params.maxDets[-1]]
        share = record.void_pixels / (record.pixels + record.void_pixels)
        iou = np.column_stack([record.iou, share])
        return iou[np.ix_([region["id"] - 1 for region in best], [region["id"] - 1 for region in truths])]


def _region(index: int, pixels: int, crowd: bool = False) -> dict[str, Any]:
    return {"id": index + 1, "area": pixels, "iscrowd": int(crowd), "ignore": int(crowd)}  # an id of 0 means no match
