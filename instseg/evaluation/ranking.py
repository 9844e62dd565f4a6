"""The predictions of one class over many images, best first, and which of them are right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from instseg.config import MatchingRule
from instseg.evaluation.matching import find_hits
from instseg.shapes import Bool, Float, Int


class Ranked(NamedTuple):
    """The M predictions of a class with N true instances.

    Attributes:
        image: (M,) int64 index of each prediction's image, best prediction first.
        hits: (T, M) bool, right at each of T thresholds.
        truth_image: (N,) int64 index of each true instance's image.
    """

    image: Int[np.ndarray, " M"]
    hits: Bool[np.ndarray, "T M"]
    truth_image: Int[np.ndarray, " N"]

    @staticmethod
    def of(
        images: Iterable[tuple[int, np.ndarray, np.ndarray]], thresholds: Sequence[float], rule: MatchingRule
    ) -> Ranked:
        """Match within each image, then rank by score; equal scores in the order of `images`.

        Args:
            images: Index, (P,) scores and (P, G) IoUs in the class; an image that has nothing of it may be left out.
            thresholds: T, of the IoU.
            rule: Of the matching; see `find_hits`.
        """
        images = list(images)
        scores = np.concatenate([np.zeros(0), *(scores for _, scores, _ in images)])
        none = np.zeros((len(thresholds), 0), np.bool_)
        hits = np.concatenate([none, *(find_hits(scores, iou, thresholds, rule) for _, scores, iou in images)], axis=1)
        image = np.array([index for index, scores, _ in images for _ in scores], np.int64)
        truth_image = np.array([index for index, _, iou in images for _ in range(iou.shape[1])], np.int64)
        ranked = np.argsort(-scores, kind="stable")
        return Ranked(image[ranked], hits[:, ranked], truth_image)

    def average_precision(self, rule: MatchingRule) -> Float[np.ndarray, " T"]:
        """(T,) float64 area at each threshold; NaN without ground truth. The rules are those of `ap_r`."""
        return np.array([_area(hits, len(self.truth_image), rule) for hits in self.hits])

    def precision(self, num_recalls: int = 101) -> Float[np.ndarray, "T R"]:
        """(T, R) float64: the highest precision at a recall of 0, 1/(R-1), … 1 or above; NaN without ground truth."""
        num_truths = len(self.truth_image)
        if num_truths == 0:
            return np.full((len(self.hits), num_recalls), np.nan)
        needed = -(-np.arange(num_recalls) * num_truths // (num_recalls - 1))  # hits; integers, as in `_area`
        envelope = [np.append(_envelope(hits), 0.0) for hits in self.hits]
        return np.stack([e[np.searchsorted(np.cumsum(h), needed)] for e, h in zip(envelope, self.hits, strict=True)])


def _envelope(hits: Bool[np.ndarray, " M"]) -> Float[np.ndarray, " M"]:
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return np.maximum.accumulate(precision[::-1])[::-1]


def _area(hits: Bool[np.ndarray, " M"], num_truths: int, rule: MatchingRule) -> float:
    if num_truths == 0:
        return float("nan")
    num_hits = np.cumsum(hits)
    if rule == "authors":
        precision = num_hits / np.arange(1, len(hits) + 1)
        return float(precision[hits].sum() / num_truths)
    envelope = _envelope(hits)
    if rule == "sds":
        return float(envelope[hits].sum() / num_truths)
    # Integers, because a recall of 3/10 is below the float 0.1 * 3.
    reached = [envelope[10 * num_hits >= tenth * num_truths] for tenth in range(11)]
    return float(np.mean([rest[0] if len(rest) else 0.0 for rest in reached]))
