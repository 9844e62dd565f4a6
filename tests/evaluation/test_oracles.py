from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from instseg.evaluation import oracles
from instseg.structures import Detections, Sample

HEIGHT, WIDTH = 8, 10
FIRST, SECOND = (slice(1, 5), slice(1, 4)), (slice(2, 7), slice(6, 9))


def truth() -> Sample:
    """Two instances, ids 1 and 3, of classes 1 and 2; id 2 has no pixel; a void column; four detections.

    One that found the first, its duplicate with a worse score, the same box of another class, and one of nothing.
    """
    instances = np.zeros((HEIGHT, WIDTH), np.int32)
    instances[FIRST], instances[SECOND] = 1, 3
    instances[:, 9] = -1
    semantic = np.array([0, 1, 0, 2], np.uint8)[instances.clip(min=0)]
    semantic[:, 9] = 255
    boxes = np.array([[1, 1, 5, 5], [1, 1, 4, 6], [1, 1, 4, 5], [5, 0, 9, 3]], np.float32)
    detections = Detections(np.array([1, 1, 2, 2]), np.array([0.9, 0.8, 0.7, 0.6]), boxes)
    return Sample(
        image_id="a",
        image=np.zeros((HEIGHT, WIDTH, 3), np.uint8),
        detections=replace(detections, foregrounds=detections.box_masks(HEIGHT, WIDTH)),
        semantic=semantic,
        instances=instances,
        instance_labels=np.array([1, 0, 2]),
        logits=np.random.default_rng(0).normal(size=(3, HEIGHT, WIDTH)).astype(np.float32),
    )


def changed(before: Sample, after: Sample) -> set[str]:
    """What differs, of the sample and of its detections."""
    names = ("image", "semantic", "instances", "instance_labels", "logits")
    pairs = [(name, getattr(before, name), getattr(after, name)) for name in names]
    names = ("labels", "scores", "boxes", "foregrounds")
    pairs += [(name, getattr(before.detections, name), getattr(after.detections, name)) for name in names]
    return {name for name, one, other in pairs if not np.array_equal(one, other)}


@pytest.mark.parametrize(
    ("oracle", "parts"),
    [
        (oracles.true_map, {"logits"}),
        (oracles.true_boxes, {"boxes"}),
        (oracles.true_foregrounds, {"foregrounds"}),
        (oracles.true_scores, {"scores"}),
        (oracles.true_detections, {"labels", "scores", "boxes", "foregrounds"}),
        (oracles.true_map_and_detections, {"logits", "labels", "scores", "boxes", "foregrounds"}),
    ],
)
def test_an_oracle_changes_its_part_and_nothing_else(oracle: oracles.Oracle, parts: set[str]) -> None:
    sample, untouched = truth(), truth()
    assert changed(sample, oracle(sample)) == parts
    assert not changed(sample, untouched)  # the argument stays as it was


def test_the_true_map_is_certain_where_the_class_is_known() -> None:
    sample = truth()
    logits = oracles.true_map(sample).logits
    assert logits is not None
    assert sample.semantic is not None
    assert sample.logits is not None
    assert logits.dtype == np.float32
    known = sample.semantic != 255
    assert (logits.argmax(0) == sample.semantic)[known].all()
    np.testing.assert_allclose(np.sort(logits[:, known], axis=0)[:2], np.log(1e-4), rtol=1e-6)
    assert not logits[:, known].max(0).any()
    np.testing.assert_array_equal(logits[:, ~known], sample.logits[:, ~known])


def test_only_the_detection_that_found_an_instance_gets_its_box() -> None:
    boxes = oracles.true_boxes(truth()).detections.boxes
    assert boxes[0].tolist() == [1, 1, 4, 5]
    assert boxes[1:].tolist() == truth().detections.boxes[1:].tolist()


def test_only_the_detection_that_found_an_instance_gets_its_mask() -> None:
    found, before = oracles.true_foregrounds(truth()).detections.foregrounds, truth().detections.foregrounds
    assert found is not None
    assert before is not None
    np.testing.assert_array_equal(found[0], truth().instances == 1)
    np.testing.assert_array_equal(found[1:], before[1:])


def test_true_scores_know_what_is_found() -> None:
    np.testing.assert_allclose(oracles.true_scores(truth()).detections.scores, [0.999, 0.001, 0.001, 0.001])


def test_true_detections_are_the_instances_that_have_pixels() -> None:
    found = oracles.true_detections(truth()).detections
    assert found.labels.tolist() == [1, 2]
    assert found.boxes.tolist() == [[1, 1, 4, 5], [6, 2, 9, 7]]
    np.testing.assert_allclose(found.scores, 1 - 1e-4)
    np.testing.assert_array_equal(found.foregrounds, found.box_masks(HEIGHT, WIDTH))


@pytest.mark.parametrize("oracle", [oracles.true_boxes, oracles.true_foregrounds, oracles.true_scores])
def test_without_detections_there_is_nothing_to_replace(oracle: oracles.Oracle) -> None:
    sample = replace(truth(), detections=Detections.empty(HEIGHT, WIDTH))
    assert not changed(sample, oracle(sample))


def test_an_instance_without_pixels_is_no_true_detection() -> None:
    hidden = replace(truth(), instance_labels=np.array([1, 2, 2]))
    assert oracles.true_detections(hidden).detections.labels.tolist() == [1, 2]


def test_without_instances_there_are_no_true_detections() -> None:
    nothing = replace(truth(), instances=np.zeros((HEIGHT, WIDTH), np.int32), instance_labels=np.zeros(0, np.int64))
    assert len(oracles.true_detections(nothing).detections) == 0


@pytest.mark.parametrize(
    ("oracle", "spoil", "message"),
    [
        (oracles.true_map, lambda s: replace(s, semantic=None), "a: semantic: expected an array"),
        (oracles.true_map, lambda s: replace(s, logits=None), "a: logits: expected an array"),
        (
            oracles.true_map,
            lambda s: replace(s, logits=s.logits[:, ::2]),
            r"logits: expected the image's size \(8, 10\)",
        ),
        (oracles.true_boxes, lambda s: replace(s, instances=None), "a: instances: expected an array"),
        (
            oracles.true_foregrounds,
            lambda s: replace(s, detections=replace(s.detections, foregrounds=None)),
            "expected foregrounds, got None",
        ),
    ],
)
def test_what_is_missing_is_named(oracle: oracles.Oracle, spoil: Callable[[Sample], Sample], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        oracle(spoil(truth()))
