"""The records refuse what is not what they say, naming it."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from instseg.structures import Detections, InstanceMap, Sample, box_to_slices


def detections(label=1, score=0.5, box=(1.0, 2.0, 5.0, 6.0)) -> Detections:
    return Detections(np.array([label]), np.array([score], np.float32), np.array([box], np.float32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": 0}, r"labels\[0\]: expected a foreground class"),
        ({"score": 0.0}, r"scores\[0\]: expected a confidence"),
        ({"score": float("nan")}, r"scores\[0\]: expected a confidence"),
        ({"box": (5, 2, 1, 6)}, r"boxes\[0\]: expected finite x0 < x1"),
        ({"box": (1, 2, float("inf"), 6)}, r"boxes\[0\]: expected finite"),
    ],
)
def test_detections_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        detections(**changes)


def test_detections_refuse_what_does_not_fit_the_image():
    with pytest.raises(ValueError, match=r"boxes\[0\]: expected inside the 4x9 image"):
        detections().check_image(9, 4, 21)
    with pytest.raises(ValueError, match=r"labels\[0\]: expected a class in 1..20, got 21"):
        detections(label=21).check_image(9, 9, 21)


def test_sample_refuses_a_mask_of_another_size():
    with pytest.raises(ValueError, match=r"a: semantic: expected the image's size \(4, 5\), got \(4, 4\)"):
        Sample("a", np.zeros((4, 5, 3), np.uint8), Detections.empty(4, 5), np.zeros((4, 4), np.uint8))


def test_what_numpy_reads_becomes_the_declared_dtypes():
    """Lists, other byte orders and dtypes, read-only views with negative strides."""
    boxes = np.array([[1, 2, 5, 6], [0, 0, 3, 3]], ">f8")[::-1]
    boxes.flags.writeable = False
    found = Detections([1, 2], [0.5, 1], boxes, np.zeros((2, 9, 9), bool)[:, ::-1])  # pyright: ignore[reportArgumentType]
    assert [found.labels.dtype, found.scores.dtype, found.boxes.dtype] == [np.int64, np.float32, np.float32]
    assert found.boxes.tolist() == [[0, 0, 3, 3], [1, 2, 5, 6]]
    assert len(Detections([], [], [])) == 0  # pyright: ignore[reportArgumentType]
    image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    sample = Sample("a", image[:, ::-1], found, semantic=np.zeros((4, 5), np.uint8)[::-1])
    np.testing.assert_array_equal(sample.image, image[:, ::-1])
    for array in (sample.image, sample.semantic, found.boxes, found.foregrounds):
        torch.from_numpy(array)  # takes no negative strides, and warns of what is read-only


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, r"labels: expected integers \(D,\), got None"),
        ({"labels": [1.0, 2.0]}, "labels: expected integers, got float64"),
        ({"labels": [[1], [2, 3]]}, r"labels: expected integers \(D,\), got list \("),
        ({"scores": ["high", "low"]}, r"scores: expected numbers \(2,\), got list of dtype <U4"),
        ({"scores": np.array([1e-50, 0.5])}, r"scores\[0\]: expected a confidence in \(0, 1\], got 0.0"),
        ({"boxes": torch.zeros(2, 4).requires_grad_()}, r"boxes: expected numbers \(2, 4\), got Tensor \(Can't call"),
        ({"boxes": np.array([[499.99999, 10, 500, 20], [0, 0, 1, 1]])}, r"boxes\[0\]: expected finite x0 < x1"),
        ({"boxes": np.array([[0, 0, 1e300, 1], [0, 0, 1, 1]])}, r"boxes\[0\]: expected finite x0 < x1"),
        ({"foregrounds": np.zeros((2, 3, 3), np.uint8)}, "foregrounds: expected dtype bool, got uint8"),
    ],
)
def test_detections_name_what_they_cannot_use(changes, message):
    with pytest.raises(ValueError, match=message):
        Detections(**{"labels": [1, 2], "scores": [0.5, 0.6], "boxes": [[0, 0, 3, 3], [1, 2, 5, 6]]} | changes)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, r"image: expected \(H, W, 3\) uint8, got None"),
        (np.zeros((4, 5, 3), np.float32), "image: expected dtype uint8, RGB 0..255, got float32"),
        (np.zeros((4, 0, 3), np.uint8), r"image: expected shape \(H, W, 3\) with H, W >= 1, got \(4, 0, 3\)"),
    ],
)
def test_sample_names_an_image_that_it_cannot_use(image, message):
    with pytest.raises(ValueError, match=message):
        Sample("a", image, Detections.empty(4, 5))


@pytest.mark.parametrize(
    ("box", "rows", "columns"),
    [
        ((1.2, 2.0, 4.7, 5.0), (2, 5), (1, 5)),
        ((-3.0, -1.0, 99.0, 99.0), (0, 8), (0, 10)),
        ((9.99, 7.99, 10.0, 8.0), (7, 8), (9, 10)),
    ],
)
def test_a_box_holds_every_pixel_that_it_touches(box, rows, columns):
    got = box_to_slices(np.array(box), height=8, width=10)
    assert [(s.start, s.stop) for s in got] == [rows, columns]


@pytest.fixture
def three_instances() -> InstanceMap:
    """Beside each other and around a hole, of which the last is a single pixel at the border."""
    instances = np.zeros((6, 8), np.int32)
    instances[1:5, 1:4] = 1
    instances[2, 2] = 0
    instances[1:5, 4:6] = 2
    instances[5, 7] = 3
    return InstanceMap(instances, np.array([2, 2, 7]), np.array([0.9, 0.1, 0.5], np.float32), np.array([4, 0, 2]))


def test_coco_results_hold_the_instances(three_instances):
    results = json.loads(json.dumps(three_instances.to_coco("a")))
    assert [(r["image_id"], r["category_id"], r["bbox"]) for r in results] == [
        ("a", 2, [1, 1, 3, 4]),
        ("a", 2, [4, 1, 2, 4]),
        ("a", 7, [7, 5, 1, 1]),
    ]
    back = InstanceMap.from_coco(results, (6, 8))
    np.testing.assert_array_equal(back.instances, three_instances.instances)
    np.testing.assert_array_equal(back.labels, three_instances.labels)
    np.testing.assert_array_equal(back.scores, three_instances.scores)
    assert back.detection_indices.tolist() == [0, 1, 2]
    assert InstanceMap.from_coco([], (6, 8)).to_coco(1) == []


def test_of_overlapping_masks_the_better_is_on_top():
    box = [[0, 0, 4, 0, 4, 4, 0, 4]]
    hidden, best = ({"category_id": k, "score": score, "segmentation": box} for k, score in ((1, 0.2), (2, 0.8)))
    runs = {"size": [6, 8], "counts": [0, 12, 36]}  # uncompressed: the first two columns
    between = {"category_id": 3, "score": 0.5, "segmentation": runs}
    found = InstanceMap.from_coco([hidden, between, best], (6, 8))
    assert (found.labels.tolist(), found.detection_indices.tolist()) == ([3, 2], [1, 2])
    assert (found.instances == 2).sum() == 16
    assert (found.instances == 1).sum() == 12 - 8


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"category_id": 1, "score": 0.5}, r"results\[0\]: expected category_id, score and segmentation, got none of"),
        (
            {"category_id": 1, "score": 0.5, "segmentation": {"size": [6, 9], "counts": [54]}},
            r"results\[0\]: segmentation: expected the image's size \(6, 8\), got \(6, 9\)",
        ),
    ],
)
def test_coco_results_that_do_not_fit_are_named(result, message):
    with pytest.raises(ValueError, match=message):
        InstanceMap.from_coco([result], (6, 8))


def test_supervision_is_asked_for_where_it_is_missing(three_instances, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        three_instances.to_supervision()


def test_supervision_has_the_instances(three_instances):
    supervision = pytest.importorskip("supervision")
    found = three_instances.to_supervision()
    assert isinstance(found, supervision.Detections)
    assert found.xyxy.tolist() == [[1, 1, 4, 5], [4, 1, 6, 5], [7, 5, 8, 6]]
    assert (found.class_id.tolist(), found.area.tolist()) == ([2, 2, 7], [11, 8, 1])
    np.testing.assert_array_equal(found.mask, three_instances.masks)
    np.testing.assert_array_equal(found.confidence, three_instances.scores)
    empty = InstanceMap(np.zeros((6, 8), np.int32), np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0))
    assert len(empty.to_supervision()) == 0
