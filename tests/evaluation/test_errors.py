from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instseg.evaluation.ap_r import ImageRecord, ap_r
from instseg.evaluation.errors import HIT, KINDS, corrected, errors_by_kind, image_errors
from instseg.evaluation.semantic import Confusion

NUM_LABELS = 4


def record(
    predictions: list[tuple[int, float]], iou: list[list[float]], truth_labels: list[int], image_id: str = "a"
) -> ImageRecord:
    nothing = Confusion.of(np.zeros((NUM_LABELS, NUM_LABELS), np.int64))
    return ImageRecord(
        image_id=image_id,
        labels=np.array([label for label, _ in predictions], np.int64),
        scores=np.array([score for _, score in predictions], np.float64),
        iou=np.array(iou, np.float64).reshape(len(predictions), len(truth_labels)),
        truth_labels=np.array(truth_labels, np.int64),
        confusion_before=nothing,
        confusion_after=nothing,
        pixels=np.ones(len(predictions), np.int64),
        void_pixels=np.zeros(len(predictions), np.int64),
        truth_pixels=np.ones(len(truth_labels), np.int64),
    )


@pytest.mark.parametrize(
    ("iou", "kind"),
    [
        # IoU with a truth of the prediction's class, which nobody has taken, and with one of another class.
        ([0.51, 0.0], "hit"),
        ([0.5, 0.0], "mask_0.3"),
        ([0.31, 0.0], "mask_0.3"),
        ([0.3, 0.0], "mask_0.1"),
        ([0.11, 0.0], "mask_0.1"),
        ([0.11, 0.8], "mask_0.1"),  # before "class", as in TIDE
        ([0.1, 0.0], "background"),
        ([0.1, 0.1], "background"),
        ([0.1, 0.11], "both"),
        ([0.1, 0.5], "both"),
        ([0.1, 0.51], "class"),
    ],
)
def test_one_prediction_of_each_kind(iou: list[float], kind: str) -> None:
    errors = image_errors(record([(1, 0.9)], [iou], [1, 2]))
    assert errors.kinds.tolist() == [kind]
    about_first, about_second = kind in ("hit", "mask_0.1", "mask_0.3"), kind == "class"
    assert errors.hit.tolist() == [kind == "hit", False]
    assert errors.missed.tolist() == [not about_first, not about_second]


def test_the_worse_ranked_of_two_is_the_duplicate() -> None:
    errors = image_errors(record([(1, 0.4), (1, 0.9)], [[0.9], [0.6]], [1]))
    assert errors.kinds.tolist() == ["duplicate", "hit"]


def test_a_prediction_of_a_class_that_the_image_lacks() -> None:
    assert image_errors(record([(3, 0.4)], [[]], [])).kinds.tolist() == ["background"]


def gains(*records: ImageRecord) -> dict[str, float]:
    return {kind: found.gain for kind, found in errors_by_kind(records, NUM_LABELS).items()}


def only(gain: float, *kinds: str) -> Any:
    return pytest.approx({kind: gain if kind in kinds else 0.0 for kind in KINDS})


def test_what_each_kind_costs() -> None:
    """Two truths of one class, one hit. The gains are from AP 1/2, or from (2/3 + 1/2)/2 where an error comes first."""
    hit, sure, doubtful = (1, 0.8), 0.9, 0.7
    truths = [1, 1]
    # The second truth is covered by a bad mask: with it right both are found.
    for iou, kind in ((0.2, "mask_0.1"), (0.4, "mask_0.3")):
        assert gains(record([hit, (1, doubtful)], [[1, 0], [0, iou]], truths)) == only(0.5, kind)
    # By a mask of another class, which has no truth: the same.
    assert gains(record([hit, (2, doubtful)], [[1, 0], [0, 0.9]], truths)) == only(0.5, "class")
    # By nothing: with one truth less, all are found.
    assert gains(record([hit], [[1, 0]], truths)) == only(0.5, "missed")
    # Both are found, after something that is neither.
    both_hit = [(1, 0.8), (1, 0.7)]
    assert gains(record([(1, sure), *both_hit], [[0, 0], [1, 0], [0, 1]], truths)) == only(1 / 3, "background")
    foreign = record([(1, sure), *both_hit], [[0, 0, 0.4], [1, 0, 0], [0, 1, 0]], [*truths, 2])
    assert gains(foreign)["both"] == pytest.approx(1 / 3 / 2)  # the other class has an AP of 0 before and after
    # One is found twice before the other.
    twice = record([(1, 0.9), (1, 0.8), (1, 0.7)], [[0.9, 0], [0.8, 0], [0, 0.9]], truths)
    assert gains(twice) == only(1 - (1 + 2 / 3) / 2, "duplicate")


def test_an_error_about_a_truth_that_is_found_is_removed() -> None:
    """A bad mask and a wrong class on found truths: neither may become a second hit."""
    found = record(
        [(1, 0.9), (1, 0.8), (2, 0.7)], [[0.2, 0], [0.9, 0], [0, 0.9]], [1, 2]
    )  # the bad mask ranks before the hit
    assert gains(found) == only((1 - 1 / 2) / 2, "mask_0.1")
    wrong = record([(2, 0.9), (1, 0.8), (2, 0.7)], [[0.9, 0], [0.9, 0], [0, 0.9]], [1, 2])
    assert gains(wrong) == only((1 - 1 / 2) / 2, "class")
    assert corrected(wrong, ["class"]).labels.tolist() == [1, 2]


def test_the_best_ranked_of_several_errors_about_a_truth_becomes_its_hit() -> None:
    several = record([(1, 0.5), (1, 0.6), (1, 0.4)], [[0.4], [0.35], [0.45]], [1])
    result = corrected(several, ["mask_0.3"])
    assert result.scores.tolist() == [0.6]
    assert result.iou.tolist() == [[1.0]]


@st.composite
def splits(draw: st.DrawFn) -> list[ImageRecord]:
    """Few distinct scores and IoUs, so that ties, duplicates and values on a threshold are common."""
    records = []
    for index in range(draw(st.integers(0, 4))):
        predictions = draw(
            st.lists(st.tuples(st.integers(1, 3), st.sampled_from([0.1, 0.5, 0.9])), min_size=0, max_size=5)
        )
        truth_labels = draw(st.lists(st.integers(1, 2), max_size=4))
        values = st.integers(0, 10).map(lambda tenth: tenth / 10)
        iou = [[draw(values) for _ in truth_labels] for _ in predictions]
        records.append(record(predictions, iou, truth_labels, f"image{index}"))
    return records


@settings(max_examples=150, deadline=None)
@given(splits())
def test_every_prediction_that_is_no_hit_is_counted_once(records: list[ImageRecord]) -> None:
    """The hits are those of AP^r: all IoUs become 1 or 0 by them, and the score stays."""
    found = errors_by_kind(records, NUM_LABELS)
    assert list(found) == list(KINDS)
    kinds = Counter(kind for r in records for kind in image_errors(r).kinds.tolist())
    num_hits = kinds.pop(HIT, 0)
    assert sum(kinds.values()) + num_hits == sum(len(r.labels) for r in records)
    assert kinds == Counter({kind: error.count for kind, error in found.items() if kind != "missed" and error.count})
    assert num_hits == sum(int(image_errors(r).hit.sum()) for r in records)
    by_hits = []
    for r in records:
        errors = image_errors(r)
        is_hit = (errors.kinds == HIT)[:, None] & (errors.targets[:, None] == np.arange(len(r.truth_labels)))
        by_hits.append(
            record(list(zip(r.labels, r.scores, strict=True)), is_hit.tolist(), r.truth_labels.tolist(), r.image_id)
        )
    before, after = (ap_r(rs, NUM_LABELS).values[4] for rs in (records, by_hits))
    np.testing.assert_array_equal(before, after)


@settings(max_examples=150, deadline=None)
@given(splits())
def test_no_correction_costs_and_all_together_give_one(records: list[ImageRecord]) -> None:
    for error in errors_by_kind(records, NUM_LABELS).values():
        assert error.gain >= -1e-12 or math.isnan(error.gain)
    perfect = [corrected(r, KINDS) for r in records]
    result = ap_r(perfect, NUM_LABELS)
    assert (result.values[4][result.num_truths > 0] == 1.0).all()
    assert sum(len(r.labels) for r in perfect) == result.num_truths.sum()
    num_missed = sum(int(image_errors(r).missed.sum()) for r in records)
    assert result.num_truths.sum() == sum(len(r.truth_labels) for r in records) - num_missed


@settings(max_examples=50, deadline=None)
@given(splits())
def test_correcting_nothing_changes_nothing(records: list[ImageRecord]) -> None:
    same = [corrected(r, []) for r in records]
    np.testing.assert_equal([vars(r) for r in same], [vars(r) for r in records])
