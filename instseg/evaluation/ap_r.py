"""AP^r: average precision of regions (Hariharan et al., ECCV 2014; paper section 4).

Images travel as `ImageRecord`s, which hold all that ranking and matching need, so the result does not depend
on who computed which record in what order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from instseg.checks import choice, require
from instseg.config import MatchingRule
from instseg.evaluation.matching import match_boxes
from instseg.evaluation.ranking import Ranked
from instseg.evaluation.semantic import Confusion, confusion_matrix
from instseg.shapes import Bool, Float, Int
from instseg.structures import InstanceMap, Sample

THRESHOLDS = tuple(tenth / 10 for tenth in range(1, 10))


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """What one image contributes to the scores: P predicted instances and D detections against G true instances.

    Attributes:
        image_id: Unique in the data set.
        labels: (P,) int64, class of each predicted instance that has pixels outside void, in the order of ids.
        scores: (P,) float64, what predictions are ranked by.
        iou: (P, G) float64 in 0..1, void pixels removed from the predictions.
        truth_labels: (G,) int64, class of each true instance that has pixels.
        confusion_before: Of the network's semantic segmentation.
        confusion_after: Of the one refined by the CRF.
        pixels: (P,) int64 > 0, of each prediction, void ones left out.
        void_pixels: (P,) int64, the void ones.
        truth_pixels: (G,) int64 > 0, of each true instance.
        detection_labels: (D,) int64, class of each detection.
        detection_scores: (D,) float64, the detector's.
        validity: (D,) float64, Pr(Y_d = 1).
        matched: (D,) bool, which detections are right; see `match_boxes`.
    """

    image_id: str
    labels: Int[np.ndarray, " P"]
    scores: Float[np.ndarray, " P"]
    iou: Float[np.ndarray, "P G"]
    truth_labels: Int[np.ndarray, " G"]
    confusion_before: Confusion
    confusion_after: Confusion
    pixels: Int[np.ndarray, " P"]
    void_pixels: Int[np.ndarray, " P"]
    truth_pixels: Int[np.ndarray, " G"]
    detection_labels: Int[np.ndarray, " D"] = field(default_factory=lambda: np.zeros(0, np.int64))
    detection_scores: Float[np.ndarray, " D"] = field(default_factory=lambda: np.zeros(0))
    validity: Float[np.ndarray, " D"] = field(default_factory=lambda: np.zeros(0))
    matched: Bool[np.ndarray, " D"] = field(default_factory=lambda: np.zeros(0, np.bool_))

    def of_class(self, label: int) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, "P G"]]:
        """Scores, and IoUs with the true instances, of the predictions of one class."""
        mine = self.labels == label
        return self.scores[mine], self.iou[mine][:, self.truth_labels == label]


@dataclass(frozen=True, eq=False)
class ApR:
    """AP^r by threshold and class.

    Attributes:
        values: (T, K) float64, T = len(THRESHOLDS); NaN for a class without ground truth. In 0..1, except
            that the `authors` rule can exceed 1, because it counts duplicates as correct.
        num_truths: (K,) int64, ground-truth instances of classes 1..K.
    """

    values: Float[np.ndarray, "T K"]
    num_truths: Int[np.ndarray, " K"]

    @property
    def volume(self) -> np.ndarray:
        """(K,) AP^r_vol of each class: the mean over thresholds."""
        return self.values.mean(axis=0)

    def mean(self, threshold: float) -> float:
        """Mean over the classes with ground truth at one of THRESHOLDS; NaN if there is no ground truth."""
        return self._class_mean(self.values[THRESHOLDS.index(threshold)])

    @property
    def mean_volume(self) -> float:
        """AP^r_vol, the mean over classes and thresholds."""
        return self._class_mean(self.volume)

    def _class_mean(self, values: np.ndarray) -> float:
        present = self.num_truths > 0
        return float(values[present].mean()) if present.any() else float("nan")


def image_record(
    sample: Sample,
    predicted: InstanceMap,
    semantic_before: np.ndarray,
    num_labels: int,
    validity: Float[np.ndarray, " D"] | None = None,
) -> ImageRecord:
    """Compare one image's segmentation with its ground truth.

    Args:
        sample: Image with `semantic` and `instances`.
        predicted: Instances and refined semantic segmentation of the image.
        semantic_before: (H, W) integers, the semantic segmentation before the CRF.
        num_labels: L.
        validity: (D,) Pr(Y_d = 1) of the sample's detections; default: their scores, as where Y is ignored.

    Raises:
        ValueError: If the sample has no ground truth, the prediction no semantic part, or scores or validity are unfit.
    """
    truth = sample.known_instances
    if sample.semantic is None or truth is None:
        raise ValueError(f"{sample.image_id}: expected ground truth to evaluate against, got none")
    if predicted.semantic is None or not np.isfinite(predicted.scores).all():
        raise ValueError(f"{sample.image_id}: expected a semantic segmentation and finite scores")
    detections = sample.detections
    validity = detections.scores if validity is None else validity
    fits = validity.shape == detections.scores.shape and bool(np.isfinite(validity).all())
    require(fits, f"{sample.image_id}: validity", f"{len(detections)} finite numbers", validity)
    joint = _joint_histogram(truth, len(sample.instance_labels), predicted)
    union = joint.sum(1)[:, None] + joint.sum(0)[None, :] - joint
    iou = (joint / np.maximum(union, 1))[1:, 1:]
    # A prediction of nothing but void pixels claims nothing, so it is no false positive.
    predictions = joint.sum(1)[1:] > 0
    truths = (joint.sum(0)[1:] > 0) & (sample.instance_labels > 0)
    return ImageRecord(
        image_id=sample.image_id,
        labels=predicted.labels[predictions].astype(np.int64),
        scores=predicted.scores[predictions].astype(np.float64),
        iou=iou[predictions][:, truths],
        truth_labels=sample.instance_labels[truths].astype(np.int64),
        confusion_before=Confusion.of(confusion_matrix(sample.semantic, semantic_before, num_labels)),
        confusion_after=Confusion.of(confusion_matrix(sample.semantic, predicted.semantic, num_labels)),
        pixels=joint.sum(1)[1:][predictions],
        void_pixels=np.bincount(predicted.instances[truth < 0], minlength=len(joint))[1:][predictions],
        truth_pixels=joint.sum(0)[1:][truths],
        detection_labels=detections.labels,
        detection_scores=detections.scores.astype(np.float64),
        validity=validity.astype(np.float64),
        matched=match_boxes(detections, truth, sample.instance_labels) >= 0,
    )


def _joint_histogram(
    truth: Int[np.ndarray, "H W"], num_truths: int, predicted: InstanceMap
) -> Int[np.ndarray, "P1 G1"]:
    """(P+1, G+1) pixels by predicted and true instance, 0 being none; void pixels do not count."""
    known = truth >= 0
    shape = (len(predicted) + 1, num_truths + 1)
    joint = np.ravel_multi_index((predicted.instances[known], truth[known]), shape)
    return np.bincount(joint, minlength=shape[0] * shape[1]).reshape(shape)


def ap_r(records: Iterable[ImageRecord], num_labels: int, rule: MatchingRule = "sds") -> ApR:
    """AP^r of a whole split at every threshold and class.

    Predictions are ranked by score over all images; ties by image id, then by instance id. `sds` gives each
    prediction the best ground truth of its class that is still free, makes a duplicate a false positive, and
    takes the area under the monotone precision envelope. `voc07` matches alike and interpolates at 11
    recalls. `authors` counts every prediction above the threshold as correct and takes the area without an
    envelope.

    Args:
        records: One record for each image, in any order.
        num_labels: L = K + 1.
        rule: Matching and area.

    Raises:
        ValueError: If an image occurs twice, or there is no such rule.
    """
    choice("rule", rule, MatchingRule)
    records = sorted(records, key=lambda record: record.image_id)
    for first, second in pairwise(records):
        if first.image_id == second.image_id:
            raise ValueError(f"records: expected each image once, got {first.image_id} twice")
    classes = rank_classes(records, num_labels, rule)
    values = np.empty((len(THRESHOLDS), len(classes)))
    for column, ranked in enumerate(classes):
        values[:, column] = ranked.average_precision(rule)
    return ApR(values, np.array([len(ranked.truth_image) for ranked in classes], np.int64))


def rank_classes(records: Sequence[ImageRecord], num_labels: int, rule: MatchingRule) -> list[Ranked]:
    """The predictions of each of classes 1..K, ties in the order of `records`; looks only where a class occurs."""
    places = defaultdict(list)
    for index, record in enumerate(records):
        for label in {*record.labels.tolist(), *record.truth_labels.tolist()}:
            places[label].append(index)
    return [
        Ranked.of(((index, *records[index].of_class(label)) for index in places[label]), THRESHOLDS, rule)
        for label in range(1, num_labels)
    ]
