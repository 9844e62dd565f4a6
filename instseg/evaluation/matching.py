"""Who is matched with whom: predictions with true instances, detections with true boxes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from instseg.config import MatchingRule
from instseg.shapes import Bool, Float, Int, Integer
from instseg.structures import Detections

BOX_IOU = 0.5  # a detection found an instance where their boxes have more


def match_greedily(
    scores: Float[np.ndarray, " P"], iou: Float[np.ndarray, "P G"], thresholds: Sequence[float]
) -> Int[np.ndarray, "T P"]:
    """Give each prediction, best score first, the ground truth with the highest IoU that is still free.

    Args:
        scores: (P,) floats; of equal ones the first in the array comes first.
        iou: (P, G) floats >= 0; 0 where a pair may not match.
        thresholds: T; a match has a higher IoU than this. Each is a matching of its own.

    Returns:
        (T, P) int64 index of the ground truth, or -1.
    """
    matches = np.full((len(thresholds), len(scores)), -1, np.int64)
    free = np.ones((len(thresholds), iou.shape[1]), np.bool_)
    for index in np.argsort(-scores, kind="stable") if iou.shape[1] else ():
        left = np.where(free, iou[index], -1.0)
        best = left.argmax(axis=1)
        found = left.max(axis=1) > thresholds
        matches[found, index] = best[found]
        free[found, best[found]] = False
    return matches


def find_hits(
    scores: Float[np.ndarray, " P"], iou: Float[np.ndarray, "P G"], thresholds: Sequence[float], rule: MatchingRule
) -> Bool[np.ndarray, "T P"]:
    """Which of the predictions of one image and class are correct at each of T thresholds, (T, P) bool.

    With `authors` all above the threshold are, duplicates included; else as `match_greedily`.
    """
    if rule == "authors":
        return np.max(iou, axis=1, initial=-1.0) > np.array(thresholds)[:, None]
    return match_greedily(scores, iou, thresholds) >= 0


def match_boxes(
    detections: Detections, instances: Integer[np.ndarray, "H W"], instance_labels: Integer[np.ndarray, " G"]
) -> Int[np.ndarray, " D"]:
    """Which true instance each detection found: of its class, still free, with a box IoU above `BOX_IOU`.

    Args:
        detections: D detections; the best score chooses first.
        instances: (H, W) integers, g+1 where instance g lies; 0 and negative ids are no instance.
        instance_labels: (G,) class of each instance; 0 where it has no pixel.

    Returns:
        (D,) int64 index g of the instance, or -1.
    """
    boxes = tight_boxes(instances, len(instance_labels))
    same = detections.labels[:, None] == instance_labels
    iou = np.where(same, box_iou(detections.boxes, boxes), 0.0)
    return match_greedily(detections.scores, iou, [BOX_IOU])[0]


def tight_boxes(instances: Integer[np.ndarray, "H W"], num_instances: int) -> Float[np.ndarray, "G 4"]:
    """(G, 4) float32 xyxy, half-open: the smallest box around each instance's pixels; zeros where it has none."""
    boxes = np.zeros((num_instances, 4), np.float32)
    for index in range(num_instances):
        mask = instances == index + 1
        if mask.any():
            (y0, y1), (x0, x1) = _extent(mask.any(1)), _extent(mask.any(0))
            boxes[index] = x0, y0, x1, y1
    return boxes


def _extent(occupied: Bool[np.ndarray, " N"]) -> tuple[int, int]:
    places = np.flatnonzero(occupied)
    return int(places[0]), int(places[-1]) + 1


def box_iou(first: Float[np.ndarray, "D 4"], second: Float[np.ndarray, "G 4"]) -> Float[np.ndarray, "D G"]:
    """(D, G) float64 IoU in 0..1 of every pair of xyxy boxes; 0 where both are empty."""
    first, second = first.astype(np.float64)[:, None], second.astype(np.float64)[None]
    sides = np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(first[..., :2], second[..., :2])
    common = sides.clip(min=0.0).prod(-1)
    union = _area(first) + _area(second) - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def _area(boxes: np.ndarray) -> np.ndarray:
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)
