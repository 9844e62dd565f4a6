from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from instseg.evaluation.semantic import Confusion, confusion_matrix, label_iou, mean_iou, total


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


MATRICES = st.integers(1, 5).flatmap(
    lambda num: st.lists(arrays(np.int64, (num, num), elements=st.sampled_from([0, 0, 0, 1, 7, 2**60])), min_size=1)
)


@given(MATRICES)
def test_sparse_confusions_are_as_good_as_matrices(matrices: list[np.ndarray]) -> None:
    num_labels, sparse = len(matrices[0]), [Confusion.of(matrix) for matrix in matrices]
    np.testing.assert_array_equal(total(sparse, num_labels), sum(matrices))
    for matrix, confusion in zip(matrices, sparse, strict=True):
        np.testing.assert_array_equal(total([confusion], num_labels), matrix)
        assert (confusion.counts > 0).all()
        assert len(confusion.places) == len({*confusion.places.tolist()}) == np.count_nonzero(matrix)
        expected = [matrix.sum(1), matrix.sum(0), np.diag(matrix)]
        np.testing.assert_array_equal(confusion.pixels(), expected)


def test_nothing_adds_up_to_zeros() -> None:
    assert total([], 2).tolist() == [[0, 0], [0, 0]]


def test_confusions_of_other_labels_do_not_add_up() -> None:
    with pytest.raises(ValueError, match="confusion: expected 3 labels, got 2"):
        total([Confusion.of(np.eye(3, dtype=int)), Confusion.of(np.eye(2, dtype=int))], 3)


def test_a_confusion_takes_memory_for_the_labels_of_its_image_alone() -> None:
    """Of 81 labels an image has few; the entries of three take 9 * 16 bytes, a matrix 52 kB."""
    rng = np.random.default_rng(0)
    maps = [[rng.choice(labels, (20, 20)) for _ in range(2)] for labels in rng.integers(0, 81, (200, 3))]
    Confusion.of(confusion_matrix(maps[0][0], maps[0][1], 81)).pixels()  # what the first call allocates for good
    tracemalloc.start()
    kept = [Confusion.of(confusion_matrix(truth, found, 81)) for truth, found in maps]
    total(kept, 81)
    num_bytes, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    num_entries = sum(len(confusion.places) for confusion in kept)
    assert num_entries <= 9 * len(kept)
    assert num_bytes < 16 * num_entries + 500 * len(kept)
    assert most < num_bytes + 10 * 81 * 81 * 8  # of one image at a time
