"""A record of one image, for tests of what is made of records."""

from __future__ import annotations

import numpy as np

from instseg.evaluation.ap_r import ImageRecord
from instseg.evaluation.semantic import Confusion

CLASSES = ("background", "cat", "dog")


def one_cat(iou: float) -> ImageRecord:
    """One cat found with `iou`; no dog anywhere, but a detection of one, which Y rejects."""
    return ImageRecord(
        image_id="a",
        labels=np.array([1]),
        scores=np.array([0.9]),
        iou=np.array([[iou]]),
        truth_labels=np.array([1]),
        confusion_before=Confusion.of(np.array([[6, 2, 0], [2, 2, 0], [0, 0, 0]])),
        confusion_after=Confusion.of(np.array([[8, 0, 0], [1, 3, 0], [0, 0, 0]])),
        pixels=np.array([3]),
        void_pixels=np.array([0]),
        truth_pixels=np.array([4]),
        detection_labels=np.array([1, 2]),
        detection_scores=np.array([0.5, 0.75]),
        validity=np.array([0.75, 0.0]),
        matched=np.array([True, False]),
    )
