from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instseg.evaluation.matching import box_iou, match_boxes, tight_boxes
from instseg.structures import Detections

SIZE = 6


def pixels(box: list[int]) -> set[tuple[int, int]]:
    x0, y0, x1, y1 = box
    return {(y, x) for y in range(y0, y1) for x in range(x0, x1)}


def iou(first: set, second: set) -> float:
    return len(first & second) / len(first | second) if first | second else 0.0


@st.composite
def boxes(draw: st.DrawFn) -> list[int]:
    (x0, x1), (y0, y1) = (
        sorted(draw(st.lists(st.integers(0, SIZE), min_size=2, max_size=2, unique=True))) for _ in "xy"
    )
    return [x0, y0, x1, y1]


def detections_of(rows: list[tuple[int, float, list[int]]]) -> Detections:
    labels, scores, found = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
    return Detections(np.array(labels, np.int64), np.array(scores), np.array(found, np.float32).reshape(-1, 4))


def brute_force(rows: list[tuple[int, float, list[int]]], instances: np.ndarray, labels: list[int]) -> list[int]:
    """Walk the detections by score; compare sets of pixels."""
    matches, taken = [-1] * len(rows), set()
    for index in sorted(range(len(rows)), key=lambda index: (-rows[index][1], index)):
        label, _, box = rows[index]
        candidates = []
        for g, of_instance in enumerate(labels):
            places = np.argwhere(instances == g + 1)
            if len(places) and of_instance == label and g not in taken:
                (y0, x0), (y1, x1) = places.min(0), places.max(0) + 1
                candidates.append((iou(pixels(box), pixels([x0, y0, x1, y1])), -g))
        best, minus_g = max(candidates, default=(0.0, 0))
        if best > 0.5:
            matches[index] = -minus_g
            taken.add(-minus_g)
    return matches


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 2), st.sampled_from([0.25, 0.5, 1.0]), boxes()), max_size=5),
    st.lists(st.tuples(st.integers(1, 2), boxes()), max_size=3),
    st.integers(-1, 0),
)
def test_boxes_against_brute_force(rows: list, truths: list[tuple[int, list[int]]], nothing: int) -> None:
    """Later instances hide earlier ones, some of them entirely."""
    instances = np.full((SIZE, SIZE), nothing, np.int32)
    for index, (_, (x0, y0, x1, y1)) in enumerate(truths):
        instances[y0:y1, x0:x1] = index + 1
    labels = [label * bool((instances == index + 1).any()) for index, (label, _) in enumerate(truths)]
    found = match_boxes(detections_of(rows), instances, np.array(labels, np.int64))
    assert found.tolist() == brute_force(rows, instances, labels)


def test_an_iou_of_one_half_is_no_match() -> None:
    instances = np.zeros((SIZE, SIZE), np.int32)
    instances[0:2, 0:2] = 1
    half, more = (1, 0.9, [0, 0, 4, 2]), (1, 0.8, [0, 0, 3, 2])
    assert match_boxes(detections_of([half, more]), instances, np.array([1])).tolist() == [-1, 0]


def test_the_better_score_chooses_first_and_takes_the_better_box() -> None:
    instances = np.zeros((SIZE, SIZE), np.int32)
    instances[0:4, 0:3], instances[0:4, 3] = 1, 2
    rows = [(1, 0.5, [0, 0, 4, 4]), (1, 0.9, [0, 0, 3, 4])]
    assert match_boxes(detections_of(rows), instances, np.array([1, 1])).tolist() == [-1, 0]


@given(st.lists(boxes(), max_size=4), st.lists(boxes(), max_size=4))
def test_the_iou_of_boxes_is_that_of_their_pixels(first: list[list[int]], second: list[list[int]]) -> None:
    arrays = [np.array(found, np.float32).reshape(-1, 4) for found in (first, second)]
    expected = [[iou(pixels(one), pixels(other)) for other in second] for one in first]
    np.testing.assert_allclose(box_iou(*arrays), np.reshape(expected, (len(first), len(second))))


def test_two_empty_boxes_have_nothing_in_common() -> None:
    assert box_iou(np.zeros((1, 4), np.float32), np.zeros((1, 4), np.float32)).tolist() == [[0.0]]


@pytest.mark.parametrize("column", [0, SIZE - 1])
def test_a_tight_box_reaches_the_border(column: int) -> None:
    instances = np.zeros((SIZE, SIZE), np.int32)
    instances[2:, column] = 2
    assert tight_boxes(instances, 2).tolist() == [[0, 0, 0, 0], [column, 2, column + 1, SIZE]]
