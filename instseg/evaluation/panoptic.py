"""Panoptic quality of the instances (Kirillov et al., CVPR 2019), as panopticapi defines it.

A prediction and a true instance of one class match at an IoU above one half; none has two such. Void pixels count for
nobody, and a prediction with more than half of its pixels in void is no false positive. The classes are things alone:
the background has no segment.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from instseg.evaluation.ap_r import ImageRecord
from instseg.evaluation.semantic import class_mean
from instseg.shapes import Float, Int

MATCHED = 0.5  # a match has a higher IoU
MAX_VOID = 0.5  # of a prediction's pixels; one with a larger share may be unmatched


@dataclass(frozen=True, eq=False)
class PanopticQuality:
    """What PQ is made of, for K classes or for one image as a whole.

    Attributes:
        sum_iou: (K,) float64, of the matches.
        matches: (K,) int64.
        false_positives: (K,) int64.
        false_negatives: (K,) int64.
    """

    sum_iou: Float[np.ndarray, " K"]
    matches: Int[np.ndarray, " K"]
    false_positives: Int[np.ndarray, " K"]
    false_negatives: Int[np.ndarray, " K"]

    @property
    def pq(self) -> Float[np.ndarray, " K"]:
        """(K,) panoptic quality in 0..1, `sq` times `rq`; NaN for a class with nothing true or predicted."""
        return np.divide(self.sum_iou, self._segments, out=np.full(len(self.matches), np.nan), where=self._segments > 0)

    @property
    def sq(self) -> Float[np.ndarray, " K"]:
        """(K,) segmentation quality, the mean IoU of matches; 0 without one; NaN as `pq`."""
        return np.where(self._segments > 0, self.sum_iou / np.maximum(self.matches, 1), np.nan)

    @property
    def rq(self) -> Float[np.ndarray, " K"]:
        """(K,) recognition quality, F1 of the matches; NaN as `pq`."""
        return np.where(self._segments > 0, self.matches / np.maximum(self._segments, 0.5), np.nan)

    @property
    def _segments(self) -> Float[np.ndarray, " K"]:
        return self.matches + 0.5 * (self.false_positives + self.false_negatives)

    def means(self) -> dict[str, float]:
        """`pq`, `sq` and `rq`, means over the classes that have one; NaN if none has."""
        return {name: class_mean(getattr(self, name)) for name in ("pq", "sq", "rq")}


def panoptic_quality(records: Iterable[ImageRecord], num_labels: int) -> PanopticQuality:
    """Of classes 1..K over all images.

    Args:
        records: One record for each image, in any order.
        num_labels: L = K + 1.
    """
    counts = np.zeros((3, num_labels), np.int64)
    sum_iou = np.zeros(num_labels)
    for record in sorted(records, key=lambda record: record.image_id):  # sums of floats depend on their order
        hits, wrong, missed = _matches(record)
        np.add.at(sum_iou, record.labels[hits.any(1)], record.iou[hits])
        for row, labels in zip(
            counts, (record.labels[hits.any(1)], record.labels[wrong], record.truth_labels[missed]), strict=True
        ):
            np.add.at(row, labels, 1)
    return PanopticQuality(sum_iou[1:], *counts[:, 1:])


def image_quality(record: ImageRecord) -> float:
    """PQ of one image, all its classes' segments together, in 0..1; NaN with nothing true or predicted."""
    hits, wrong, missed = _matches(record)
    segments = hits.sum() + 0.5 * (wrong.sum() + missed.sum())
    return float(record.iou[hits].sum() / segments) if segments else float("nan")


def _matches(record: ImageRecord) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(P, G) bool matches, (P,) bool false positives, (G,) bool false negatives."""
    hits = (record.labels[:, None] == record.truth_labels) & (record.iou > MATCHED)
    void_share = record.void_pixels / (record.pixels + record.void_pixels)
    return hits, ~hits.any(1) & (void_share <= MAX_VOID), ~hits.any(0)
