from __future__ import annotations

import random
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instseg.evaluation import significance
from instseg.evaluation.ap_r import THRESHOLDS, ImageRecord, ap_r
from instseg.evaluation.semantic import Confusion, mean_iou, total
from instseg.evaluation.significance import Comparison, Difference, compare

NUM_LABELS = 4
Result = list[ImageRecord]


def split(seed: int, num_images: int, noise: int, skill: float = 0.6, shift: float = 0.0) -> Result:
    """Images of `seed` with predictions of (`seed`, `noise`), right with probability `skill`.

    Scores have one decimal and the index of the prediction behind it, so that ties are common between images and
    impossible within one.
    """
    truth, draw = np.random.default_rng(seed), np.random.default_rng([seed, noise])
    records = []
    for index in range(num_images):
        truth_labels = truth.integers(1, NUM_LABELS, truth.integers(0, 4))
        pixels = truth.integers(0, 50, NUM_LABELS)
        num = int(draw.integers(0, 5))
        scores = (draw.integers(0, 4, num) + 0.01 * np.arange(num)) / 4
        iou = draw.random((num, len(truth_labels))) * (draw.random((num, len(truth_labels))) < skill)
        rows = [draw.multinomial(n, _row(label, skill)) for label, n in enumerate(pixels)]
        confusion = Confusion.of(np.array(rows))
        records.append(
            ImageRecord(
                image_id=f"image_{index:03d}",
                labels=draw.integers(1, NUM_LABELS, num),
                scores=scores,
                iou=np.clip(iou + shift * (iou > 0), 0, 1),
                truth_labels=truth_labels,
                confusion_before=confusion,
                confusion_after=confusion,
                pixels=np.ones(num, np.int64),
                void_pixels=np.zeros(num, np.int64),
                truth_pixels=np.ones(len(truth_labels), np.int64),
            )
        )
    return records


def _row(label: int, skill: float) -> np.ndarray:
    return skill * np.eye(NUM_LABELS)[label] + (1 - skill) / NUM_LABELS


def scores_of(records: Result) -> list[float]:
    """By ap_r itself: each threshold, the volume, mean IoU."""
    result = ap_r(records, NUM_LABELS)
    confusion = total((record.confusion_after for record in records), NUM_LABELS)
    return [*(result.mean(threshold) for threshold in THRESHOLDS), result.mean_volume, mean_iou(confusion)]


def replicated(records: Result, counts: np.ndarray) -> Result:
    """Copies of the records under ids of their own, which sort as the records do."""
    records = sorted(records, key=lambda record: record.image_id)
    return [
        replace(record, image_id=f"{record.image_id}#{copy:03d}")
        for record, num in zip(records, counts, strict=True)
        for copy in range(num)
    ]


def of_resamples(first: Result, second: Result, num_resamples: int, seed: int) -> np.ndarray:
    """(R, T+2) differences, every resample written out as a data set."""
    draw, num = np.random.default_rng(seed), len(first)
    rows = []
    for _ in range(num_resamples):
        counts = draw.multinomial(num, np.full(num, 1 / num))
        rows.append([b - a for a, b in zip(*(scores_of(replicated(r, counts)) for r in (first, second)), strict=True)])
    return np.array(rows)


def all_of(comparison: Comparison) -> list[Difference]:
    return [*comparison.ap_r.values(), comparison.ap_r_vol, comparison.mean_iou]


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 7))
def test_against_resamples_that_are_written_out(seed: int, num_images: int) -> None:
    first, second = split(seed, num_images, 1), split(seed, num_images, 2, skill=0.8)
    found = all_of(compare(first, second, num_resamples=15, seed=seed))
    exact = [b - a for a, b in zip(scores_of(first), scores_of(second), strict=True)]
    np.testing.assert_allclose([difference.value for difference in found], exact, atol=1e-12)
    for difference, resampled in zip(found, of_resamples(first, second, 15, seed).T, strict=True):
        present = resampled[~np.isnan(resampled)]
        expected = np.percentile(present, [2.5, 97.5]) if len(present) else [np.nan, np.nan]
        np.testing.assert_allclose([difference.low, difference.high], expected, atol=1e-12)


def test_any_counts_are_as_good_as_copies() -> None:
    """Not only those that a draw is likely to give: many copies of few images, blocks of hits beside misses."""
    records = split(5, 6, 1, skill=0.9)
    for counts in ([9, 0, 0, 0, 0, 1], [0, 3, 7, 1, 0, 4], [2, 2, 2, 2, 2, 2]):
        (found,) = significance._Scorer(records)(np.array([counts], np.float64))
        np.testing.assert_allclose(found, scores_of(replicated(records, np.array(counts))), atol=1e-12)


def test_a_result_does_not_differ_from_itself() -> None:
    assert set(all_of(compare(split(0, 30, 1), split(0, 30, 1), 50))) == {Difference(0.0, 0.0, 0.0)}


def test_exchanged_results_differ_by_the_sign() -> None:
    first, second = split(0, 40, 1), split(0, 40, 2)
    forth, back = compare(first, second, 101), compare(second, first, 101)
    for one, other in zip(all_of(forth), all_of(back), strict=True):
        np.testing.assert_allclose([one.value, one.low, one.high], [-other.value, -other.high, -other.low], atol=1e-15)


def test_neither_the_order_of_records_nor_the_size_of_chunks_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = split(0, 40, 1), split(0, 40, 2)
    expected = compare(first, second, 50, seed=3)
    assert compare(random.Random(1).sample(first, 40), random.Random(2).sample(second, 40), 50, seed=3) == expected
    monkeypatch.setattr(significance, "CHUNK_NUMBERS", 300)
    assert compare(first, second, 50, seed=3) == expected
    assert compare(first, second, 50, seed=4) != expected


def test_a_real_difference_is_found_and_none_invented() -> None:
    worse, better = split(0, 150, 1), split(0, 150, 1, shift=0.1)
    found = compare(worse, better, 300)
    assert 0 < found.ap_r_vol.low < found.ap_r_vol.value < found.ap_r_vol.high
    assert found.mean_iou == Difference(0.0, 0.0, 0.0)  # shift changes the instances alone
    alike = compare(worse, split(0, 150, 2), 300)
    assert alike.ap_r_vol.low < 0 < alike.ap_r_vol.high
    assert alike.mean_iou.low < 0 < alike.mean_iou.high
    assert compare(worse, split(0, 150, 1, skill=0.8), 300).mean_iou.low > 0


@pytest.mark.usefixtures("without_shape_checks")  # most of its time
def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Two systems of equal skill differ by 0 in truth: 40 intervals of 95 % hold it in 38 of them, give or take 1.4."""
    pairs = [(split(seed, 40, 1), split(seed, 40, 2)) for seed in range(40)]
    found = [compare(first, second, 200, seed=1) for first, second in pairs]
    for differences in ([c.ap_r_vol for c in found], [c.mean_iou for c in found]):
        assert sum(difference.low <= 0 <= difference.high for difference in differences) >= 34
        widths = [difference.high - difference.low for difference in differences]
        spread = np.std([difference.value for difference in differences])
        assert np.mean(widths) == pytest.approx(2 * 1.96 * spread, rel=0.25)


def test_memory_is_by_image_and_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by image and pair of labels, which is 52 kB an image at 81 labels."""
    monkeypatch.setattr(significance, "CHUNK_NUMBERS", 2**10)
    sparse = Confusion(81, np.arange(3), np.arange(1, 4))
    records = [replace(record, confusion_after=sparse) for record in split(0, 300, 1)]
    compare(records, records, 2)  # what the first call allocates for good
    tracemalloc.start()
    compare(records, records, 2)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2 * len(records) * (16 * 81 + 4000)


def test_without_any_ground_truth_there_is_no_number() -> None:
    nothing = Confusion.of(np.zeros((NUM_LABELS, NUM_LABELS), np.int64))
    empty = np.zeros(0, np.int64)
    record = ImageRecord("a", empty, np.zeros(0), np.zeros((0, 0)), empty, nothing, nothing, empty, empty, empty)
    assert np.isnan(all_of(compare([record], [record], 5))).all()


def with_labels(record: ImageRecord, num: int) -> ImageRecord:
    fewer = Confusion.of(total([record.confusion_after], NUM_LABELS)[:num, :num])
    return replace(record, confusion_before=fewer, confusion_after=fewer)


def test_what_does_not_belong_together_is_named() -> None:
    first = split(0, 5, 1)
    other_truth = replace(first[2], truth_labels=first[2].truth_labels % 3 + 1)
    assert len(other_truth.truth_labels)
    for second, message in (
        ([*first, replace(first[0], image_id="image_9")], r"same images, got image_9 in second alone \(1 so\)"),
        (first[1:], r"same images, got image_000 in first alone \(1 so\)"),
        ([*first, first[0]], "second: expected each image once"),
        ([*first[:2], other_truth, *first[3:]], "image_002: expected the same ground truth in both"),
        ([with_labels(r, 3) for r in first], "image_000: second: expected 4 labels, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(first, second)
    with pytest.raises(ValueError, match="first: expected at least one record"):
        compare([], first)
    with pytest.raises(ValueError, match="num_resamples: expected a value > 0"):
        compare(first, first, 0)
