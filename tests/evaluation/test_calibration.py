from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instseg.evaluation.ap_r import ImageRecord, image_record
from instseg.evaluation.calibration import NUM_BINS, calibration, calibrations
from instseg.evaluation.matching import box_iou, match_boxes
from instseg.evaluation.semantic import Confusion
from instseg.structures import Detections, InstanceMap, Sample


def test_perfectly_calibrated_scores_have_no_error() -> None:
    # Of four detections at .25 one is right, of four at .75 three.
    scores = np.repeat([0.25, 0.75], 4)
    result = calibration(scores, np.array([1, 0, 0, 0, 1, 1, 1, 0], bool))
    assert result.ece == 0.0
    assert result.brier == pytest.approx(0.25 * 0.75)
    assert result.nll_nats == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert result.ap == pytest.approx((3 * 3 / 4 + 4 / 8) / 4)
    filled = np.flatnonzero(result.count)
    assert filled.tolist() == [3, 11]
    assert result.mean_score[filled].tolist() == result.share_right[filled].tolist() == [0.25, 0.75]
    assert result.count.sum() == 8
    assert np.isnan(np.delete(result.share_right, filled)).all()


def test_constant_scores() -> None:
    result = calibration(np.full(10, 0.5), np.arange(10) < 3)
    assert result.ap == pytest.approx(0.3)  # nothing is ranked
    assert result.ece == pytest.approx(0.2)
    assert result.brier == pytest.approx(0.25)
    assert result.nll_nats == pytest.approx(math.log(2))


def test_a_draw_from_its_own_scores_is_nearly_calibrated_and_a_sharper_one_is_not() -> None:
    rng = np.random.default_rng(0)
    scores = rng.random(20_000)
    right = rng.random(20_000) < scores
    honest, sure = calibration(scores, right), calibration(np.sqrt(scores), right)
    assert honest.ece < 0.02
    assert sure.ece == pytest.approx(2 / 3 - 1 / 2, abs=0.01)  # integral of sqrt(x) - x
    assert sure.ap == honest.ap  # the order is the same
    assert honest.nll_nats < sure.nll_nats
    assert honest.brier < sure.brier


def test_scores_at_the_ends_are_in_the_outer_bins_and_cost_finite() -> None:
    result = calibration(np.array([0.0, 1.0]), np.array([True, False]))
    assert result.count[0] == result.count[NUM_BINS - 1] == 1
    assert result.nll_nats == pytest.approx(6 * math.log(10))
    with pytest.raises(ValueError, match=r"scores: expected values in 0\.\.1, got 0.5 to 1.5"):
        calibration(np.array([0.5, 1.5]), np.array([True, False]))


def test_without_detections_or_right_ones_there_is_no_number() -> None:
    nothing = calibrations([ImageRecord("a", *(np.zeros(0, int), np.zeros(0), np.zeros((0, 0))), *_no_truth())])
    for result in nothing.values():
        assert math.isnan(result.ap)
        assert math.isnan(result.ece)
        assert not result.count.any()
    assert math.isnan(calibration(np.array([0.3]), np.array([False])).ap)


def _no_truth() -> tuple:
    nothing, none = Confusion.of(np.zeros((2, 2), int)), np.zeros(0, int)
    return none, nothing, nothing, none, none, none


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.1, 0.4, 0.5, 0.9]), st.booleans()), max_size=12))
def test_ap_against_counting(pairs: list[tuple[float, bool]]) -> None:
    of_right = [
        sum(r for s, r in pairs if s >= score) / sum(s >= score for s, _ in pairs) for score, right in pairs if right
    ]
    scores, right = np.array([s for s, _ in pairs], float), np.array([r for _, r in pairs], bool)
    expected = sum(of_right) / len(of_right) if of_right else math.nan
    assert calibration(scores, right).ap == pytest.approx(expected, nan_ok=True)


BOXES = [(x0, y0, x0 + w, y0 + h) for x0 in (0, 2) for y0 in (0, 1) for w in (3, 5) for h in (3, 4)]
BOX = st.sampled_from(BOXES)
DETECTION = st.tuples(BOX, st.integers(1, 2), st.sampled_from([0.3, 0.6, 0.9]))


@settings(max_examples=150, deadline=None)
@given(st.lists(DETECTION, max_size=5), st.lists(st.tuples(BOX, st.integers(1, 2)), max_size=3))
def test_matching_against_sets_of_pixels(detected: list, truths: list) -> None:
    """Later instances hide earlier ones, some altogether; ids without a pixel have class 0, as samples do."""
    instances = np.full((8, 8), -1, np.int32)
    instances[4:] = 0
    for index, (box, _) in enumerate(truths):
        instances[box[1] : box[3], box[0] : box[2]] = index + 1
    labels = [label if (instances == index + 1).any() else 0 for index, (_, label) in enumerate(truths)]
    found = match_boxes(
        detections_of([d[1] for d in detected], [d[2] for d in detected], [d[0] for d in detected]),
        instances,
        np.array(labels, np.int64),
    )
    free, expected = set(np.flatnonzero(labels).tolist()), np.zeros(len(detected), bool)
    for index in sorted(range(len(detected)), key=lambda d: (-detected[d][2], d)):
        box, label, _ = detected[index]
        overlaps = [(_overlap(box, instances == g + 1), -g) for g in free if labels[g] == label]
        overlap, minus_g = max(overlaps, default=(0.0, 0))
        expected[index] = overlap > 0.5
        if expected[index]:
            free.remove(-minus_g)
    assert (found >= 0).tolist() == expected.tolist()


def detections_of(labels: list[int], scores: list[float], boxes: list) -> Detections:
    return Detections(np.array(labels, np.int64), np.array(scores, np.float32), np.array(boxes, np.float32))


def _overlap(box: tuple[int, int, int, int], mask: np.ndarray) -> float:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    tight = {(y, x) for y in range(rows[0], rows[-1] + 1) for x in range(columns[0], columns[-1] + 1)}
    mine = {(y, x) for y in range(box[1], box[3]) for x in range(box[0], box[2])}
    return len(mine & tight) / len(mine | tight)


def test_boxes_with_fractions() -> None:
    boxes = np.array([[0.5, 0, 2.5, 1]]), np.array([[1.5, 0, 3.5, 1], [0.5, 0, 2.5, 1], [0, 0, 0, 0]])
    assert box_iou(*boxes).tolist() == [[1 / 3, 1.0, 0.0]]


def test_a_record_tells_which_detections_are_right() -> None:
    instances = np.array([[1, 1, 0, 2, 2], [1, 1, -1, 2, 2]], np.int32)
    detections = detections_of([1, 1, 2], [0.5, 0.9, 0.7], [[0, 0, 2, 2], [0, 0, 2, 1.8], [3, 0, 5, 1]])
    sample = Sample(
        "a",
        np.zeros((2, 5, 3), np.uint8),
        detections,
        (instances > 0).astype(np.uint8),
        instances,
        np.array([1, 2]),
    )
    nothing = np.zeros(0, np.int64)
    predicted = InstanceMap(
        np.zeros((2, 5), np.int32), nothing, np.zeros(0, np.float32), nothing, np.zeros((2, 5), np.uint8)
    )
    validity = np.array([0.1, 0.8, 0.4], np.float32)
    record = image_record(sample, predicted, np.zeros((2, 5), int), 3, validity)
    # The second takes the object first; the third covers half of its own, and half is not above half.
    assert record.matched.tolist() == [False, True, False]
    assert record.detection_labels.tolist() == [1, 1, 2]
    np.testing.assert_array_equal(record.detection_scores, detections.scores)
    np.testing.assert_array_equal(record.validity, validity)
    without = image_record(sample, predicted, np.zeros((2, 5), int), 3)
    np.testing.assert_array_equal(without.validity, detections.scores)
    with pytest.raises(ValueError, match="a: validity: expected 3 finite numbers"):
        image_record(sample, predicted, np.zeros((2, 5), int), 3, np.array([0.1, np.nan, 0.4], np.float32))
    result = calibrations([record, record])
    assert result["detector_score"].ap == 1.0
    assert result["validity"].brier == pytest.approx((0.1**2 + 0.2**2 + 0.4**2) / 3)
    assert result["validity"].count.sum() == 6
