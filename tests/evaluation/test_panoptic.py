from __future__ import annotations

import math
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest

from instseg.evaluation.ap_r import ImageRecord
from instseg.evaluation.panoptic import image_quality, panoptic_quality
from instseg.structures import InstanceMap, Sample
from tests.evaluation.scenes import NUM_LABELS, record_of, scene
from tests.records import one_cat

Segments = dict[int, tuple[int, set[int]]]  # class and pixels of each


def segments(ids: np.ndarray, labels: np.ndarray) -> Segments:
    found = {k + 1: (int(label), set(np.flatnonzero(ids == k + 1).tolist())) for k, label in enumerate(labels)}
    return {k: segment for k, segment in found.items() if segment[1]}


def brute_force(pairs: list[tuple[Sample, InstanceMap]]) -> dict[int, list[tuple[float, float, float]]]:
    """Sets of pixels, as panopticapi counts them: (iou, 1, 0) of a match, (0, 0, 1/2) of what is alone, by class."""
    counted: dict[int, list[tuple[float, float, float]]] = {label: [] for label in range(1, NUM_LABELS)}
    for sample, predicted in pairs:
        assert sample.instances is not None
        truths, found = (
            segments(sample.instances, sample.instance_labels),
            segments(predicted.instances, predicted.labels),
        )
        void = set(np.flatnonzero(sample.instances < 0).tolist())
        matched_truths, matched = set(), set()
        for k, (label, pixels) in found.items():
            for g, (true_label, true_pixels) in truths.items():
                common = len(pixels & true_pixels)
                iou = common / (len(pixels) + len(true_pixels) - common - len(pixels & void))
                if label == true_label and iou > 0.5:
                    counted[label].append((iou, 1, 0))
                    matched_truths.add(g)
                    matched.add(k)
        for k in found.keys() - matched:
            if len(found[k][1] & void) / len(found[k][1]) <= 0.5:
                counted[found[k][0]].append((0, 0, 0.5))
        for g in truths.keys() - matched_truths:
            counted[truths[g][0]].append((0, 0, 0.5))
    return counted


@pytest.mark.parametrize("void", [False, True])
def test_against_sets_of_pixels(void: bool) -> None:
    pairs = [scene(seed, void) for seed in range(12)]
    result = panoptic_quality([record_of(*pair) for pair in reversed(pairs)], NUM_LABELS)
    for label, parts in brute_force(pairs).items():
        iou, matches, alone = np.sum(parts, axis=0)
        assert matches > 3
        assert alone > 1
        assert result.pq[label - 1] == pytest.approx(iou / (matches + alone))
        assert result.sq[label - 1] == pytest.approx(iou / matches)
        assert result.rq[label - 1] == pytest.approx(matches / (matches + alone))
    assert result.means()["pq"] == pytest.approx(result.pq.mean())
    for pair in pairs:
        iou, matches, alone = np.sum([(0, 0, 0), *chain(*brute_force([pair]).values())], axis=0)
        expected = iou / (matches + alone) if matches + alone else math.nan
        assert image_quality(record_of(*pair)) == pytest.approx(expected, nan_ok=True)


def test_half_in_void_is_wrong_and_more_is_nothing() -> None:
    def quality(void_pixels: int) -> tuple[int, float]:
        record = replace(one_cat(0.5), pixels=np.array([3]), void_pixels=np.array([void_pixels]))
        return int(panoptic_quality([record], 3).false_positives[0]), image_quality(record)

    assert [quality(num) for num in (3, 4)] == [(1, 0.0), (0, 0.0)]


def test_a_class_that_is_nowhere_has_no_number() -> None:
    result = panoptic_quality([one_cat(0.75)], 3)
    np.testing.assert_array_equal(result.pq, [0.75, math.nan])
    assert result.means() == {"pq": 0.75, "sq": 0.75, "rq": 1.0}
    nothing: list[ImageRecord] = []
    assert all(math.isnan(value) for value in panoptic_quality(nothing, 3).means().values())
