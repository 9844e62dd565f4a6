from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import replace

import numpy as np
import pytest
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from instseg.evaluation.coco import coco_ap
from instseg.structures import InstanceMap, Sample
from tests.evaluation.scenes import HEIGHT, NUM_LABELS, WIDTH, record_of, scene
from tests.records import one_cat


def regions(image: int, ids: np.ndarray, labels: np.ndarray) -> list[dict]:
    found = []
    for index, label in enumerate(labels):
        rle = mask.encode(np.asfortranarray(ids == index + 1, np.uint8))
        area = int(mask.area(rle))
        if area:
            found.append(
                {"image_id": image, "category_id": int(label), "segmentation": rle, "area": area, "iscrowd": 0}
            )
    return found


def coco_of(anns: list[dict], num_images: int) -> COCO:
    coco = COCO()
    images = [{"id": image, "height": HEIGHT, "width": WIDTH} for image in range(num_images)]
    categories = [{"id": label} for label in range(1, NUM_LABELS)]
    numbered = [{**ann, "id": number} for number, ann in enumerate(anns, 1)]
    coco.dataset = {"images": images, "categories": categories, "annotations": numbered}  # pyright: ignore
    coco.createIndex()
    return coco


def by_masks(pairs: list[tuple[Sample, InstanceMap]]) -> list[float]:
    """The first six numbers of COCO's summary, from masks."""
    truths, found = [], []
    for image, (sample, predicted) in enumerate(pairs):
        assert sample.instances is not None
        truths += regions(image, sample.instances, sample.instance_labels)
        own = regions(image, predicted.instances, predicted.labels)
        present = [score for k, score in enumerate(predicted.scores, 1) if (predicted.instances == k).any()]
        found += [{**ann, "score": float(score)} for ann, score in zip(own, present, strict=True)]
    with redirect_stdout(io.StringIO()):
        scorer = COCOeval(coco_of(truths, len(pairs)), coco_of(found, len(pairs)), "segm")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return list(scorer.stats[:6])


def test_without_void_it_is_what_pycocotools_makes_of_the_masks() -> None:
    pairs = [scene(seed, void=False) for seed in range(25)]
    result = coco_ap([record_of(*pair) for pair in reversed(pairs)], NUM_LABELS)
    expected = by_masks(pairs)
    assert all(0.02 < value < 0.95 for value in expected)
    names = ["ap", "ap_50", "ap_75", "ap_small", "ap_medium", "ap_large"]
    assert [result.means()[name] for name in names] == pytest.approx(expected)
    assert result.of_class.mean() == pytest.approx(expected[0])


def test_void_pixels_are_taken_off_predictions() -> None:
    pairs = [scene(seed, void=True) for seed in range(15)]
    cut = [(s, replace(p, instances=np.where(s.instances == -1, 0, p.instances))) for s, p in pairs]
    records = [replace(record_of(*pair), void_pixels=np.zeros(len(record_of(*pair).labels), int)) for pair in pairs]
    assert coco_ap(records, NUM_LABELS).means()["ap"] == pytest.approx(by_masks(cut)[0])


def test_what_lies_in_void_is_neither_right_nor_wrong() -> None:
    """A second cat, ranked before the true one: wrong, or up to its share in void nothing at all."""
    one = one_cat(0.97)
    pair = {"labels": np.array([1, 1]), "scores": np.array([0.9, 0.8]), "iou": np.array([[0.0], [0.97]])}
    two = replace(one, **pair, pixels=np.array([4, 3]), void_pixels=np.array([0, 0]))
    half_right = coco_ap([two], 3).values[:, 0]
    assert half_right == pytest.approx(np.full(10, 0.5))
    in_void = replace(two, void_pixels=np.array([6, 0]))  # six tenths
    assert coco_ap([in_void], 3).values[:, 0] == pytest.approx([1.0] * 3 + [0.5] * 7)
    assert np.isnan(coco_ap([in_void], 3).values[:, 1]).all()


def test_without_images_there_is_no_number() -> None:
    assert np.isnan([*coco_ap([], 3).means().values()]).all()
