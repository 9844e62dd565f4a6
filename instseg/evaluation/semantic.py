"""Mean IoU of a semantic segmentation, from confusion matrices that add up over images."""

from __future__ import annotations

import numpy as np

from instseg.shapes import Float, Int, Integer
from instseg.structures import IGNORE_LABEL


def confusion_matrix(
    truth: Integer[np.ndarray, "H W"], prediction: Integer[np.ndarray, "H W"], num_labels: int
) -> Int[np.ndarray, "L L"]:
    """Count pixels by (true, predicted) label; true label 255 is left out.

    Args:
        truth: (H, W) integers, 0..L-1 or 255.
        prediction: (H, W) integers, 0..L-1.
        num_labels: L.

    Returns:
        (L, L) int64, row = true label, column = predicted label.

    Raises:
        ValueError: If a label is outside 0..L-1.
    """
    known = truth != IGNORE_LABEL
    truth, prediction = truth[known].astype(np.int64), prediction[known].astype(np.int64)
    for name, labels in (("ground truth", truth), ("prediction", prediction)):
        if labels.size and not 0 <= labels.min() <= labels.max() < num_labels:
            found = (int(labels.min()), int(labels.max()))
            raise ValueError(f"semantic {name}: expected labels 0..{num_labels - 1}, got {found}")
    return np.bincount(truth * num_labels + prediction, minlength=num_labels**2).reshape(num_labels, -1)


def label_iou(confusion: Integer[np.ndarray, "L L"]) -> Float[np.ndarray, " L"]:
    """Return (L,) float64 intersection over union in 0..1; NaN for a label that occurs nowhere."""
    correct, union = intersection_and_union(confusion)
    return np.divide(correct, union, out=np.full(len(correct), np.nan), where=union > 0)


def intersection_and_union(confusion: Integer[np.ndarray, "L L"]) -> tuple[Float[np.ndarray, " L"], ...]:
    """Return two (L,) float64: pixels in both truth and prediction, and in either; they add up over images."""
    correct = np.diag(confusion).astype(np.float64)
    return correct, confusion.sum(0) + confusion.sum(1) - correct


def mean_iou(confusion: Integer[np.ndarray, "L L"]) -> float:
    """Mean of `label_iou` over the labels that occur, background included."""
    iou = label_iou(confusion)
    return float(iou[~np.isnan(iou)].mean()) if not np.isnan(iou).all() else float("nan")
