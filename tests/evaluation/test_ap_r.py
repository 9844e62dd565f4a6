from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instseg.config import MatchingRule
from instseg.evaluation import ranking
from instseg.evaluation.ap_r import THRESHOLDS, ImageRecord, ap_r, image_record, rank_classes
from instseg.evaluation.semantic import Confusion, total
from instseg.structures import Detections, InstanceMap, Sample

NUM_LABELS = 4
RULES: tuple[MatchingRule, ...] = get_args(MatchingRule)


def record(
    image_id: str, predictions: list[tuple[int, float]], iou: list[list[float]], truth_labels: list[int]
) -> ImageRecord:
    nothing = Confusion.of(np.zeros((NUM_LABELS, NUM_LABELS), np.int64))
    return ImageRecord(
        image_id=image_id,
        labels=np.array([label for label, _ in predictions], np.int64),
        scores=np.array([score for _, score in predictions]),
        iou=np.array(iou, np.float64).reshape(len(predictions), len(truth_labels)),
        truth_labels=np.array(truth_labels, np.int64),
        confusion_before=nothing,
        confusion_after=nothing,
        pixels=np.ones(len(predictions), np.int64),
        void_pixels=np.zeros(len(predictions), np.int64),
        truth_pixels=np.ones(len(truth_labels), np.int64),
    )


def ap_at(records: list[ImageRecord], threshold: float, rule: MatchingRule, label: int = 1) -> float:
    return float(ap_r(records, NUM_LABELS, rule).values[THRESHOLDS.index(threshold), label - 1])


def brute_force(records: list[ImageRecord], label: int, threshold: float, rule: MatchingRule) -> float:
    """One ranked list, walked once; precision and recall by counting afresh at every cut."""
    ranked = sorted(
        (-r.scores[p], r.image_id, p, r) for r in records for p in range(len(r.labels)) if r.labels[p] == label
    )
    num_truths = sum(int(g == label) for r in records for g in r.truth_labels)
    if num_truths == 0:
        return math.nan
    taken: set[tuple[str, int]] = set()
    hits = []
    for _, image_id, p, r in ranked:
        candidates = [
            (r.iou[p, g], -g)
            for g in range(len(r.truth_labels))
            if r.truth_labels[g] == label and (rule == "authors" or (image_id, g) not in taken)
        ]
        iou, minus_g = max(candidates, default=(0.0, 0))
        hits.append(iou > threshold)
        if hits[-1]:
            taken.add((image_id, -minus_g))
    points = [(sum(hits[:cut]) / num_truths, sum(hits[:cut]) / cut) for cut in range(1, len(hits) + 1)]
    if rule == "authors":
        return sum(points[cut][1] for cut in range(len(hits)) if hits[cut]) / num_truths
    if rule == "voc07":
        return sum(best(points, tenth / 10) for tenth in range(11)) / 11
    recalls = sorted({0.0} | {recall for recall, _ in points})
    return sum((b - a) * best(points, b) for a, b in pairwise(recalls))


def best(points: list[tuple[float, float]], recall: float) -> float:
    return max((precision for r, precision in points if r >= recall - 1e-12), default=0.0)


@st.composite
def splits(draw: st.DrawFn) -> list[ImageRecord]:
    """Few distinct scores and IoUs, so that ties, duplicates and values on a threshold are common."""
    records = []
    for index in range(draw(st.integers(0, 4))):
        num_predictions, num_truths = draw(st.integers(0, 5)), draw(st.integers(0, 4))
        predictions = [
            (draw(st.integers(1, 3)), draw(st.sampled_from([0.1, 0.5, 0.9]))) for _ in range(num_predictions)
        ]
        tenths = st.integers(0, 20).map(lambda twentieth: twentieth / 20)
        iou = [[draw(tenths) for _ in range(num_truths)] for _ in range(num_predictions)]
        records.append(record(f"image{index}", predictions, iou, [draw(st.integers(1, 2)) for _ in range(num_truths)]))
    return records


@settings(max_examples=150, deadline=None)
@given(splits(), st.sampled_from(RULES))
def test_against_brute_force(records: list[ImageRecord], rule: MatchingRule) -> None:
    result = ap_r(records, NUM_LABELS, rule)
    expected = [[brute_force(records, label, t, rule) for label in (1, 2, 3)] for t in THRESHOLDS]
    np.testing.assert_allclose(result.values, expected, atol=1e-12)
    present = [label for label in (1, 2, 3) if any(label in r.truth_labels for r in records)]
    assert (result.num_truths > 0).tolist() == [label in present for label in (1, 2, 3)]
    if present:
        columns = np.array(expected)[:, [label - 1 for label in present]]
        np.testing.assert_allclose(result.mean(0.5), columns[4].mean())
        np.testing.assert_allclose(result.mean_volume, columns.mean())
    else:
        assert math.isnan(result.mean_volume)


def by_every_class_and_image(records: list[ImageRecord], rule: MatchingRule) -> list[list[float]]:
    """Each threshold and class looks at every image, whether it has anything of the class or not."""
    records = sorted(records, key=lambda record: record.image_id)
    rows = []
    for threshold in THRESHOLDS:
        rows.append([])
        for label in range(1, NUM_LABELS):
            images = [record.of_class(label) for record in records]
            scores = np.concatenate([np.zeros(0), *(scores for scores, _ in images)])
            hits = np.array([hit for pair in images for hit in hits_by_walking(*pair, threshold, rule)], bool)
            num_truths = sum(iou.shape[1] for _, iou in images)
            rows[-1].append(ranking._area(hits[np.argsort(-scores, kind="stable")], num_truths, rule))
    return rows


def hits_by_walking(scores: np.ndarray, iou: np.ndarray, threshold: float, rule: MatchingRule) -> list[bool]:
    hits, free = [False] * len(scores), {*range(iou.shape[1])}
    for index in np.argsort(-scores, kind="stable"):
        best = max(free, key=lambda g: (iou[index, g], -g), default=-1)
        hits[index] = best >= 0 and bool(iou[index, best] > threshold)
        if hits[index] and rule != "authors":
            free.remove(best)
    return hits


@settings(max_examples=100, deadline=None)
@given(splits(), st.sampled_from(RULES))
def test_to_the_bit_as_by_every_class_and_image(records: list[ImageRecord], rule: MatchingRule) -> None:
    np.testing.assert_array_equal(ap_r(records, NUM_LABELS, rule).values, by_every_class_and_image(records, rule))


def test_an_image_is_looked_at_once_for_each_class_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, find_hits = [], ranking.find_hits
    monkeypatch.setattr(ranking, "find_hits", lambda *arguments: looked.append(1) or find_hits(*arguments))
    records = [record(f"{index}", [(index + 1, 0.5)], [[0.7]], [index + 1]) for index in range(80)]
    assert ap_r(records, 81).mean(0.5) == 1.0
    assert len(looked) == 80


@settings(max_examples=50, deadline=None)
@given(splits(), st.sampled_from(RULES), st.randoms(use_true_random=False))
def test_order_of_records_does_not_matter(records: list[ImageRecord], rule: MatchingRule, random: Any) -> None:
    shuffled = random.sample(records, len(records))
    first, second = ap_r(records, NUM_LABELS, rule), ap_r(shuffled, NUM_LABELS, rule)
    np.testing.assert_array_equal(first.values, second.values)


@settings(max_examples=50, deadline=None)
@given(splits(), st.sampled_from(RULES))
def test_only_the_order_of_scores_matters(records: list[ImageRecord], rule: MatchingRule) -> None:
    rescaled = [replace(r, scores=np.exp(3.0 * r.scores) - 7.0) for r in records]
    first, second = ap_r(records, NUM_LABELS, rule), ap_r(rescaled, NUM_LABELS, rule)
    np.testing.assert_array_equal(first.values, second.values)


def test_a_duplicate_is_wrong_except_for_the_authors() -> None:
    # Ranked: hit, duplicate of the same object, hit on the second object.
    split = [record("a", [(1, 0.9), (1, 0.8), (1, 0.7)], [[0.8, 0], [0.7, 0], [0, 0.8]], [1, 1])]
    assert ap_at(split, 0.5, "sds") == pytest.approx((1 + 2 / 3) / 2)
    assert ap_at(split, 0.5, "voc07") == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert ap_at(split, 0.5, "authors") == pytest.approx((1 + 1 + 1) / 2)


def test_a_prediction_takes_the_second_best_object_that_is_free() -> None:
    split = [record("a", [(1, 0.9), (1, 0.8)], [[0.9, 0.6], [0.8, 0.6]], [1, 1])]
    assert ap_at(split, 0.5, "sds") == 1.0
    assert ap_at(split, 0.6, "sds") == 0.5  # 0.6 is not above 0.6


def test_the_envelope_lifts_early_precision_and_the_authors_have_none() -> None:
    split = [record("a", [(1, 0.9), (1, 0.8), (1, 0.7)], [[0, 0], [0.8, 0], [0, 0.8]], [1, 1])]
    assert ap_at(split, 0.5, "sds") == pytest.approx(2 / 3)
    assert ap_at(split, 0.5, "voc07") == pytest.approx(2 / 3)
    assert ap_at(split, 0.5, "authors") == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_voc07_counts_a_recall_of_three_tenths_exactly() -> None:
    split = [record("a", [(1, 0.9 - 0.1 * p) for p in range(3)], np.eye(3, 10).tolist(), [1] * 10)]
    assert ap_at(split, 0.5, "voc07") == pytest.approx(4 / 11)


def test_equal_scores_are_ranked_by_image_then_instance() -> None:
    hit, miss = record("a", [(1, 0.5)], [[0.8]], [1]), record("b", [(1, 0.5)], [[0.0]], [1])
    assert ap_at([miss, hit], 0.5, "sds") == 0.5
    hit, miss = replace(hit, image_id="b"), replace(miss, image_id="a")
    assert ap_at([miss, hit], 0.5, "sds") == 0.25
    within = [record("a", [(1, 0.5), (1, 0.5)], [[0.0], [0.8]], [1])]
    assert ap_at(within, 0.5, "authors") == 0.5


def test_another_class_never_matches() -> None:
    split = [record("a", [(2, 0.9)], [[1.0]], [1])]
    assert ap_at(split, 0.1, "sds") == 0.0


def test_a_class_without_ground_truth_is_left_out() -> None:
    result = ap_r([record("a", [(1, 0.9), (2, 0.9)], [[1.0], [0.0]], [1])], NUM_LABELS)
    assert result.num_truths.tolist() == [1, 0, 0]
    assert np.isnan(result.volume).tolist() == [False, True, True]
    assert result.mean_volume == 1.0


@pytest.mark.parametrize("rule", RULES)
def test_no_predictions(rule: MatchingRule) -> None:
    assert ap_r([record("a", [], [], [1, 2])], NUM_LABELS, rule).mean(0.1) == 0.0


def test_an_image_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="image_7 twice"):
        ap_r([record("image_7", [], [], [])] * 2, NUM_LABELS)


def sample(instances: list[list[int]], labels: list[int], semantic: list[list[int]]) -> Sample:
    height, width = np.shape(instances)
    return Sample(
        image_id="a",
        image=np.zeros((height, width, 3), np.uint8),
        detections=Detections.empty(height, width),
        semantic=np.array(semantic, np.uint8),
        instances=np.array(instances, np.int32),
        instance_labels=np.array(labels, np.int64),
    )


def predict(instances: list[list[int]], labels: list[int], scores: list[float] | None = None) -> InstanceMap:
    array = np.array(instances, np.int32)
    return InstanceMap(
        instances=array,
        labels=np.array(labels, np.int64),
        scores=np.array(scores or [0.5] * len(labels), np.float32),
        detection_indices=np.arange(len(labels)),
        semantic=np.append(0, labels)[array].astype(np.uint8),
    )


def test_void_is_removed_from_predictions() -> None:
    truth = sample([[1, 1, -1, -1, 0, 0]], [2], [[2, 2, 255, 255, 0, 255]])
    predicted = predict([[1, 1, 1, 2, 1, 1]], [2, 2])
    result = image_record(truth, predicted, np.zeros((1, 6), np.int64), NUM_LABELS)
    # Instance 1 keeps pixels 0, 1, 4 (5 is semantic void on background); instance 2 keeps none and is no claim.
    np.testing.assert_array_equal(result.iou, [[2 / 3]])
    assert len(result.labels) == len(result.scores) == 1
    before, after = (total([found], NUM_LABELS) for found in (result.confusion_before, result.confusion_after))
    assert before.sum() == after.sum() == 3
    assert after[2].tolist() == [0, 0, 2, 0]
    assert before[2].tolist() == [2, 0, 0, 0]


def test_ground_truth_ids_without_pixels_or_class_are_ignored() -> None:
    truth = sample([[1, 3, 3, 0]], [1, 0, 0], [[1, 1, 1, 0]])
    result = image_record(truth, predict([[0, 0, 0, 0]], []), np.zeros((1, 4), np.int64), NUM_LABELS)
    assert result.truth_labels.tolist() == [1]
    assert result.iou.shape == (0, 1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_iou_against_sets_of_pixels(data: st.DataObject) -> None:
    cells = st.lists(st.integers(-1, 3), min_size=12, max_size=12)
    truth, predicted = data.draw(cells), [max(0, cell) for cell in data.draw(cells)]
    known = {i for i in range(12) if truth[i] != -1}
    expected = []
    for p in (1, 2, 3):
        mine = {i for i in known if predicted[i] == p}
        theirs = [{i for i in known if truth[i] == g} for g in (1, 2, 3)]
        if mine:
            expected.append([len(mine & t) / len(mine | t) for t in theirs if t])
    semantic = [255 if cell == -1 else min(cell, 1) for cell in truth]
    result = image_record(
        sample([truth], [1, 1, 1], [semantic]),
        predict([predicted], [1, 1, 1]),
        np.zeros((1, 12), int),
        NUM_LABELS,
    )
    np.testing.assert_allclose(result.iou, np.reshape(expected, result.iou.shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"instances": None}, "a: expected ground truth"), ({"semantic": None}, "a: expected ground truth")],
)
def test_a_sample_without_ground_truth_is_an_error(changes: dict[str, Any], message: str) -> None:
    truth = replace(sample([[1]], [1], [[1]]), **changes)
    with pytest.raises(ValueError, match=message):
        image_record(truth, predict([[1]], [1]), np.zeros((1, 1), int), NUM_LABELS)


def test_a_score_that_is_not_finite_is_an_error() -> None:
    truth = sample([[1]], [1], [[1]])
    with pytest.raises(ValueError, match="a: expected a semantic segmentation and finite scores"):
        image_record(truth, predict([[1]], [1], [math.nan]), np.zeros((1, 1), int), NUM_LABELS)


@settings(max_examples=60, deadline=None)
@given(splits())
def test_curves_are_the_best_precision_from_a_recall_on(records: list[ImageRecord]) -> None:
    for label, ranked in enumerate(rank_classes(sorted(records, key=lambda r: r.image_id), NUM_LABELS, "sds"), 1):
        num_truths = sum(int(truth == label) for r in records for truth in r.truth_labels)
        curves = ranked.precision(num_recalls=21)
        if num_truths == 0:
            assert np.isnan(curves).all()
            continue
        for hits, curve in zip(ranked.hits, curves, strict=True):
            points = [(hits[:cut].sum() / num_truths, hits[:cut].mean()) for cut in range(1, len(hits) + 1)]
            assert curve.tolist() == pytest.approx([best(points, twentieth / 20) for twentieth in range(21)])
