"""Mean IoU of a semantic segmentation, from confusion matrices that add up over images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from instseg.checks import require
from instseg.shapes import Float, Int, Integer
from instseg.structures import IGNORE_LABEL


class Confusion(NamedTuple):
    """The confusion matrix of one image as its E entries other than zero: an image has few of the labels.

    Attributes:
        num_labels: L.
        places: (E,) int64, true label * L + predicted label; ascending, each once.
        counts: (E,) int64, pixels.
    """

    num_labels: int
    places: Int[np.ndarray, " E"]
    counts: Int[np.ndarray, " E"]

    @staticmethod
    def of(matrix: Integer[np.ndarray, "L L"]) -> Confusion:
        """Keep the entries of a matrix, row = true label, column = predicted label."""
        places = np.flatnonzero(matrix)
        return Confusion(len(matrix), places, matrix.ravel()[places].astype(np.int64))

    def pixels(self) -> Int[np.ndarray, "3 L"]:
        """Return (3, L) int64: pixels of each label in the truth, in the prediction, and in both."""
        true, predicted = np.divmod(self.places, self.num_labels)
        both = true == predicted
        pixels = np.zeros((3, self.num_labels), np.int64)
        np.add.at(pixels[0], true, self.counts)
        np.add.at(pixels[1], predicted, self.counts)
        pixels[2, true[both]] = self.counts[both]
        return pixels


def total(confusions: Iterable[Confusion], num_labels: int) -> Int[np.ndarray, "L L"]:
    """Add up the confusions of many images: (L, L) int64, row = true label, column = predicted label.

    Raises:
        ValueError: If one is of another number of labels than `num_labels`, which is L.
    """
    matrix = np.zeros((num_labels, num_labels), np.int64)
    for confusion in confusions:
        require(confusion.num_labels == num_labels, "confusion", f"{num_labels} labels", confusion.num_labels)
        matrix.ravel()[confusion.places] += confusion.counts
    return matrix


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
    correct = np.diag(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - correct
    return np.divide(correct, union, out=np.full(len(correct), np.nan), where=union > 0)


def mean_iou(confusion: Integer[np.ndarray, "L L"]) -> float:
    """Mean of `label_iou` over the labels that occur, background included."""
    return class_mean(label_iou(confusion))


def class_mean(values: np.ndarray) -> float:
    """Mean of what is not NaN; NaN if all is."""
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
