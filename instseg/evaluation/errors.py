"""Errors by kind, and what each kind costs, as TIDE splits them (Bolya et al., ECCV 2020), on masks.

A prediction that is no hit at an IoU of `FOUND` is one of, the first that holds:
`mask_0.1`, `mask_0.3`: its class is right, its mask is not: an IoU in (0.1, 0.3] or (0.3, 0.5] with a truth of it;
`class`: an IoU above `FOUND` with a truth of another class;
`duplicate`: the same with a truth of its class, which a better-ranked prediction has taken;
`background`: an IoU of `TOUCHED` or less with all truths;
`both`: what is left, an IoU in (0.1, 0.5] with a truth of another class.
A truth is `missed` if no prediction hits it and no error of class or mask is about it.
As in AP^r, an IoU has to be above a threshold to count.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

import numpy as np

from instseg.evaluation.ap_r import ImageRecord, ap_r
from instseg.evaluation.matching import match_greedily
from instseg.shapes import Bool, Int

FOUND, HALF_FOUND, TOUCHED = 0.5, 0.3, 0.1  # mask IoU
HIT = "hit"
MASK_KINDS = ("mask_0.1", "mask_0.3")
KINDS = ("class", *MASK_KINDS, "both", "duplicate", "background", "missed")


@dataclass(frozen=True)
class ErrorKind:
    """One kind of error on a whole split.

    Attributes:
        count: Predictions of this kind; of `missed`, truths.
        gain: What AP^r at `FOUND`, in 0..1, gains where this kind alone is corrected; NaN without ground truth.
    """

    count: int
    gain: float


@dataclass(frozen=True, eq=False)
class ImageErrors:
    """The errors on one image with P predictions and G truths.

    Attributes:
        kinds: (P,) one of `KINDS` or `HIT` for each prediction.
        targets: (P,) int64, the truth that a hit, or an error of class or mask, is about; -1 for the others.
        hit: (G,) bool, truths that have a hit.
        missed: (G,) bool.
    """

    kinds: np.ndarray
    targets: Int[np.ndarray, " P"]
    hit: Bool[np.ndarray, " G"]
    missed: Bool[np.ndarray, " G"]


def errors_by_kind(records: Iterable[ImageRecord], num_labels: int) -> dict[str, ErrorKind]:
    """Count the errors of a split and correct one kind at a time; see `corrected`.

    Args:
        records: One record for each image, in any order.
        num_labels: L = K + 1.

    Returns:
        All of `KINDS` in that order.

    Raises:
        ValueError: If an image occurs twice.
    """
    records = list(records)
    found = [image_errors(record) for record in records]
    counts = {kind: sum(int((errors.kinds == kind).sum()) for errors in found) for kind in KINDS}
    counts["missed"] = sum(int(errors.missed.sum()) for errors in found)
    as_it_is = ap_r(records, num_labels).mean(FOUND)
    gains = {}
    for kind in KINDS:
        better = [corrected(record, [kind]) for record in records]
        gains[kind] = ap_r(better, num_labels).mean(FOUND) - as_it_is
    return {kind: ErrorKind(counts[kind], gains[kind]) for kind in KINDS}


def image_errors(record: ImageRecord) -> ImageErrors:
    """Sort the predictions and truths of one image into kinds."""
    same = record.labels[:, None] == record.truth_labels
    own, other = np.where(same, record.iou, 0.0), np.where(same, 0.0, record.iou)
    (matches,) = match_greedily(record.scores, own, [FOUND])
    best_own, best_other = own.max(1, initial=0.0), other.max(1, initial=0.0)
    mask = (best_own > TOUCHED) & (best_own <= FOUND)
    conditions = {
        HIT: matches >= 0,
        "mask_0.1": mask & (best_own <= HALF_FOUND),
        "mask_0.3": mask,
        "class": best_other > FOUND,
        "duplicate": best_own > FOUND,
        "background": best_other <= TOUCHED,
    }
    kinds = np.select(list(conditions.values()), list(conditions), "both")
    targets = matches.copy()
    for names, iou in ((MASK_KINDS, own), (("class",), other)):
        about = np.isin(kinds, names)
        targets[about] = iou[about].argmax(1) if about.any() else -1
    truths = np.arange(len(record.truth_labels))
    return ImageErrors(kinds, targets, np.isin(truths, matches), ~np.isin(truths, targets))


def corrected(record: ImageRecord, kinds: Collection[str]) -> ImageRecord:
    """The record with errors of some kinds made good, as TIDE's oracles do.

    An error of class or mask whose truth has no hit gets the truth's class and an IoU of 1 with it, where several are
    about one truth the best-ranked; the others, and all of the other kinds, are removed. Missed truths are
    removed too, so a class with no other truth no longer counts in a mean over classes.
    """
    errors = image_errors(record)
    labels, iou = record.labels.copy(), record.iou.copy()
    kept, free = ~np.isin(errors.kinds, list(kinds)), ~errors.hit
    for index in np.argsort(-record.scores, kind="stable"):
        target = errors.targets[index]
        if not kept[index] and target >= 0 and free[target]:
            labels[index], iou[index] = record.truth_labels[target], np.arange(len(free)) == target
            kept[index], free[target] = True, False
    truths = ~errors.missed if "missed" in kinds else np.ones_like(errors.missed)
    return replace(
        record,
        labels=labels[kept],
        scores=record.scores[kept],
        iou=iou[kept][:, truths],
        truth_labels=record.truth_labels[truths],
        pixels=record.pixels[kept],
        void_pixels=record.void_pixels[kept],
        truth_pixels=record.truth_pixels[truths],
    )
