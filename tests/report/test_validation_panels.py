from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instseg.report.validation_panels import save_progress
from instseg.structures import Detections, InstanceMap, Sample

CLASSES = ("background", "cat", "dog")
TRUTH = np.zeros((60, 90), np.int32)
TRUTH[10:50, 5:40], TRUTH[10:50, 45:80] = 1, 2
SAMPLE = Sample(
    "a", np.full((60, 90, 3), 128, np.uint8), Detections.empty(60, 90), TRUTH.astype(np.uint8), TRUTH, np.array([1, 2])
)


def found(instances: np.ndarray) -> InstanceMap:
    num = int(instances.max())
    return InstanceMap(instances, np.arange(1, num + 1), np.ones(num, np.float32), np.arange(num))


def test_an_instance_keeps_its_colour_from_checkpoint_to_checkpoint(tmp_path: Path) -> None:
    """First nothing is found, then both with their numbers exchanged, then the one that is dog alone."""
    exchanged, alone = np.array([0, 2, 1], np.int32)[TRUTH], np.array([0, 0, 1], np.int32)[TRUTH]
    steps = {f"step {index}": [found(each)] for index, each in enumerate((0 * TRUTH, exchanged, alone))}
    save_progress(tmp_path / "progress.png", [SAMPLE], steps, CLASSES)
    with Image.open(tmp_path / "progress.png") as file:
        picture = np.asarray(file.convert("RGB"), np.float64)
    width, low = picture.shape[1] // 5, int(0.75 * len(picture))  # below the names
    left, right = (
        [picture[low : low + 10, int((column + x) * width)].mean(0) for column in range(5)] for x in (0.12, 0.82)
    )
    for photograph, nothing in (left[:2], right[:2]):
        assert max(np.ptp(photograph), np.ptp(nothing)) < 6  # grey
    np.testing.assert_allclose(left[2], left[4], atol=6)
    np.testing.assert_allclose(right[2], right[4], atol=6)
    np.testing.assert_allclose(right[3], right[4], atol=6)
    assert np.ptp(left[3]) < 6
    assert np.abs(left[4] - right[4]).max() > 50


def test_an_image_without_ground_truth_is_named(tmp_path: Path) -> None:
    without = replace(SAMPLE, semantic=None, instances=None, instance_labels=np.zeros(0, np.int64))
    with pytest.raises(ValueError, match="a: expected a sample with ground truth, got one without"):
        save_progress(tmp_path / "progress.png", [without], {"step 1": [found(TRUTH)]}, CLASSES)
