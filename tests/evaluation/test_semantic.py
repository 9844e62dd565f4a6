from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from instseg.evaluation.semantic import confusion_matrix, label_iou, mean_iou


@given(
    arrays(np.uint8, (5, 7), elements=st.sampled_from([0, 1, 2, 255])),
    arrays(np.uint8, (5, 7), elements=st.integers(0, 2)),
)
def test_against_sets_of_pixels(truth: np.ndarray, prediction: np.ndarray) -> None:
    ious = []
    for label in range(3):
        true = {i for i in range(35) if truth.flat[i] == label}
        predicted = {i for i in range(35) if prediction.flat[i] == label and truth.flat[i] != 255}
        ious.append(len(true & predicted) / len(true | predicted) if true | predicted else math.nan)
    confusion = confusion_matrix(truth, prediction, 3)
    np.testing.assert_allclose(label_iou(confusion), ious)
    np.testing.assert_allclose(mean_iou(confusion), np.mean(present) if (present := real(ious)) else math.nan)


def real(values: list[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


def test_rows_are_truth_and_columns_prediction() -> None:
    confusion = confusion_matrix(np.array([[0, 0, 1]]), np.array([[1, 1, 1]]), 2)
    assert confusion.tolist() == [[0, 2], [0, 1]]


@pytest.mark.parametrize(("truth", "prediction", "name"), [(3, 0, "ground truth"), (0, 255, "prediction")])
def test_a_label_outside_the_classes_is_named(truth: int, prediction: int, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: expected labels 0\.\.2"):
        confusion_matrix(np.array([[truth]]), np.array([[prediction]]), 3)
