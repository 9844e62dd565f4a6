from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from instseg.report.colours import PALETTE, choose_colours
from instseg.report.pictures import blend, draw_overlay, save_panel
from instseg.structures import Detections, InstanceMap, Sample

CLASSES = ("background", "cat", "dog")


def scene() -> tuple[Sample, InstanceMap]:
    truth = np.zeros((60, 90), np.int32)
    truth[10:50, 5:40], truth[10:50, 40:80], truth[:5] = 1, 2, -1
    semantic = np.array([0, 1, 2, 255], np.uint8)[truth]
    detections = Detections(
        labels=np.array([1, 2, 2]),
        scores=np.array([0.9, 0.8, 0.4], np.float32),
        boxes=np.array([[5, 10, 40, 50], [40, 10, 80, 50], [0, 0, 90, 60]], np.float32),
    )
    sample = Sample("a", np.full((60, 90, 3), 128, np.uint8), detections, semantic, truth, np.array([1, 2]))
    found = np.where(truth == 1, 2, np.where(truth == 2, 1, 0)).astype(np.int32)
    predicted = InstanceMap(found, np.array([2, 1]), np.array([0.8, 0.9], np.float32), np.array([1, 0]), semantic * 0)
    return sample, predicted


def test_touching_instances_differ_even_beyond_the_palette() -> None:
    num = 3 * len(PALETTE)
    strips = np.repeat(np.arange(1, num + 1), 3)[None].repeat(4, axis=0)
    colours = choose_colours(strips, num)[1:]
    assert (colours[1:] != colours[:-1]).all()
    assert set(colours[: len(PALETTE)]) == set(range(len(PALETTE)))


def test_outside_is_grey_void_is_pale_and_instances_are_tinted() -> None:
    image = np.zeros((9, 9, 3), np.uint8)
    image[..., 0] = 200
    ids = np.zeros((9, 9), np.int64)
    ids[:5, :5], ids[8] = 1, -1
    picture = blend(image, ids, np.array([[0, 0, 0], [0, 1.0, 0]]))
    assert np.ptp(picture[6, 6]) == 0
    assert picture[8, 0].min() > 0.9
    assert picture[2, 2].argmax() == 1
    assert picture[4, 4].sum() < picture[2, 2].sum()  # the outline is darker


def test_a_panel_of_several_sizes_with_and_without_ground_truth(tmp_path: Path) -> None:
    sample, predicted = scene()
    without = replace(sample, semantic=None, instances=None, instance_labels=np.zeros(0, np.int64))
    empty = Sample("b", np.zeros((80, 40, 3), np.uint8), Detections.empty(80, 40))
    nothing = np.zeros(0, np.int64)
    no_instances = InstanceMap(
        np.zeros((80, 40), np.int32), nothing, nothing.astype(np.float32), nothing, np.zeros((80, 40), np.uint8)
    )
    path = tmp_path / "new" / "panel.png"
    save_panel(path, [sample, without, empty], [predicted, predicted, no_instances], CLASSES)
    with Image.open(path) as picture:
        assert picture.width == 1800
        assert picture.height > 900


def test_an_instance_has_the_colour_of_its_truth(tmp_path: Path) -> None:
    sample, predicted = scene()
    save_panel(tmp_path / "panel.png", [sample], [predicted], CLASSES)
    with Image.open(tmp_path / "panel.png") as file:
        picture = np.asarray(file.convert("RGB"), np.float64)
    cell = picture.shape[1] // 4
    middle = slice(picture.shape[0] // 2 + 60, picture.shape[0] // 2 + 90)
    left = [picture[middle, column * cell + 130 : column * cell + 150].mean((0, 1)) for column in (2, 3)]
    right = [picture[middle, column * cell + 330 : column * cell + 350].mean((0, 1)) for column in (2, 3)]
    np.testing.assert_allclose(left[0], left[1], atol=6)
    np.testing.assert_allclose(right[0], right[1], atol=6)
    assert abs(left[0] - right[0]).max() > 50


def test_an_overlay_has_the_size_of_the_image() -> None:
    sample, predicted = scene()
    with Image.open(io.BytesIO(draw_overlay(sample.image, predicted, CLASSES))) as picture:
        assert picture.size == (90, 60)
        assert picture.convert("RGB").getpixel((2, 55)) == (128, 128, 128)
