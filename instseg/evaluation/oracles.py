"""One part of the system replaced by the truth, the others left as they are: what limits the whole.

Each function takes a `Sample` with ground truth and returns another one, which the same network then sees. None of
them looks at what the network makes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from instseg.checks import require
from instseg.evaluation.matching import match_boxes, tight_boxes
from instseg.structures import IGNORE_LABEL, Detections, Sample

Oracle = Callable[[Sample], Sample]
FLOOR = 1e-4  # probability of each false class: certain, but not so that a CRF could never change it
CERTAIN = 1.0 - 1e-4  # score of a true detection
RIGHT, WRONG = 0.999, 0.001  # scores of detections that found an instance, and of those that did not


def true_map(sample: Sample) -> Sample:
    """The true class of each pixel as the network's logits; void pixels keep theirs.

    Args:
        sample: With `logits` (L, H, W) at the image's size.

    Raises:
        ValueError: If the logits have another size, or there is no ground truth.
    """
    semantic = _present(sample, "semantic")
    logits = _present(sample, "logits")
    require(logits.shape[1:] == semantic.shape, "logits", f"the image's size {semantic.shape}", logits.shape[1:])
    is_label = np.arange(len(logits))[:, None, None] == semantic
    truth = np.where(is_label, 0.0, np.log(FLOOR)).astype(logits.dtype)
    return replace(sample, logits=np.where(semantic == IGNORE_LABEL, logits, truth))


def true_boxes(sample: Sample) -> Sample:
    """The instance's tight box for each detection that found one: a perfect regression of boxes.

    Which instance a detection is of stays decided by its own box, so one with too bad a box keeps it, and no
    detection is added or dropped. Foregrounds stay as they are; a detection head sees the new boxes.
    """
    matches, boxes = _matches(sample), sample.detections.boxes.copy()
    boxes[matches >= 0] = _tight_boxes(sample)[matches[matches >= 0]]
    return replace(sample, detections=replace(sample.detections, boxes=boxes))


def true_foregrounds(sample: Sample) -> Sample:
    """The instance's mask as foreground of each detection that found one; the others keep theirs."""
    instances, matches = _present(sample, "instances"), _matches(sample)
    foregrounds = _foregrounds(sample.detections).copy()
    for index in np.flatnonzero(matches >= 0):
        foregrounds[index] = instances == matches[index] + 1
    return replace(sample, detections=replace(sample.detections, foregrounds=foregrounds))


def true_scores(sample: Sample) -> Sample:
    """Scores that know which detections found an instance: a perfect prior of Pr(Y)."""
    scores = np.where(_matches(sample) >= 0, RIGHT, WRONG)
    return replace(sample, detections=replace(sample.detections, scores=scores))


def true_detections(sample: Sample) -> Sample:
    """The true instances as detections: right classes, tight boxes, and no false ones.

    Their foregrounds are their boxes, as where GrabCut learns nothing: what a perfect detector leaves to be found.
    """
    boxes = _tight_boxes(sample)
    present = np.flatnonzero((sample.instance_labels > 0) & boxes.any(1))
    height, width = sample.image.shape[:2]
    found = Detections(sample.instance_labels[present], np.full(len(present), CERTAIN), boxes[present])
    return replace(sample, detections=replace(found, foregrounds=found.box_masks(height, width)))


def true_map_and_detections(sample: Sample) -> Sample:
    """Both: what identification and the instance CRF lose by themselves. Raises as `true_map`."""
    return true_map(true_detections(sample))


# These replace what a detection head makes of the detections, the others what it sees.
AFTER_THE_HEAD = (true_foregrounds, true_scores)


def _matches(sample: Sample) -> np.ndarray:
    return match_boxes(sample.detections, _present(sample, "instances"), sample.instance_labels)


def _tight_boxes(sample: Sample) -> np.ndarray:
    return tight_boxes(_present(sample, "instances"), len(sample.instance_labels))


def _foregrounds(detections: Detections) -> np.ndarray:
    if detections.foregrounds is None:
        raise ValueError("detections: expected foregrounds, got None; compute them with compute_foregrounds")
    return detections.foregrounds


def _present(sample: Sample, name: str) -> np.ndarray:
    value = getattr(sample, name)
    require(value is not None, f"{sample.image_id}: {name}", "an array to replace a part of the system by", None)
    return value
