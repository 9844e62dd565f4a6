"""Whether scores mean what they say: of detections scored 0.7, seven in ten should be right (Guo et al., ICML 2017).

The ranking is judged apart from that, by its average precision, which knows only the order of the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from instseg.evaluation.ap_r import ImageRecord
from instseg.shapes import Bool, Float, Int

NUM_BINS = 15  # of equal width; [0, 1/15), ..., the last with 1
MIN_PROBABILITY = 1e-6  # of what happened, in the log-likelihood: a score of 1 that is wrong costs 13.8 nats, not all


@dataclass(frozen=True, eq=False)
class Calibration:
    """How D scores agree with whether their detections are right; all NaN without detections.

    Attributes:
        ap: Average precision of the ranking in 0..1, right detections being the positives; equal scores are one rank.
        ece: Expected calibration error in 0..1: |mean score - share right|, averaged over detections by bin.
        brier: Mean square of score - right, in 0..1.
        nll_nats: Mean negative log-likelihood.
        mean_score: (NUM_BINS,) float64; NaN in an empty bin.
        share_right: (NUM_BINS,) float64 in 0..1; NaN in an empty bin.
        count: (NUM_BINS,) int64 detections.
    """

    ap: float
    ece: float
    brier: float
    nll_nats: float
    mean_score: Float[np.ndarray, " B"]
    share_right: Float[np.ndarray, " B"]
    count: Int[np.ndarray, " B"]


def calibrations(records: Sequence[ImageRecord]) -> dict[str, Calibration]:
    """Of the detections of all images together: `detector_score`, and `validity`, which is Pr(Y_d = 1)."""
    matched = np.concatenate([record.matched for record in records])
    return {
        "detector_score": calibration(np.concatenate([record.detection_scores for record in records]), matched),
        "validity": calibration(np.concatenate([record.validity for record in records]), matched),
    }


def calibration(scores: Float[np.ndarray, " D"], right: Bool[np.ndarray, " D"]) -> Calibration:
    """Judge scores in 0..1 of D detections by which of them are right.

    Raises:
        ValueError: If a score is outside 0..1.
    """
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError(f"scores: expected values in 0..1, got {scores.min()} to {scores.max()}")
    bins = np.minimum((scores * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    count = np.bincount(bins, minlength=NUM_BINS)
    sum_scores, sum_right = (np.bincount(bins, weights, NUM_BINS) for weights in (scores, right))
    of_what_happened = np.where(right, scores, 1 - scores)
    num = len(scores) if len(scores) else np.nan
    return Calibration(
        ap=_average_precision(scores, right),
        ece=float(np.abs(sum_scores - sum_right).sum() / num),
        brier=float(np.square(scores - right).sum() / num),
        nll_nats=float(-np.log(np.maximum(of_what_happened, MIN_PROBABILITY)).sum() / num),
        mean_score=np.divide(sum_scores, count, out=np.full(NUM_BINS, np.nan), where=count > 0),
        share_right=np.divide(sum_right, count, out=np.full(NUM_BINS, np.nan), where=count > 0),
        count=count,
    )


def _average_precision(scores: Float[np.ndarray, " D"], right: Bool[np.ndarray, " D"]) -> float:
    """Mean over right detections of the precision among all scored as high or higher; NaN if none is right."""
    if not right.any():
        return float("nan")
    ranked = np.sort(-scores)
    as_high = np.searchsorted(ranked, -scores, side="right")
    right_as_high = np.searchsorted(np.sort(-scores[right]), -scores, side="right")
    return float((right_as_high / as_high)[right].mean())
