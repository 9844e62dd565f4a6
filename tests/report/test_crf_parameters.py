from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instseg.report.colours import PALETTE
from instseg.report.crf_parameters import CrfParameters, save_crf_parameters

CLASSES = ("background", "cat", "a $dog$", "bus")
INITIAL = CrfParameters(
    detection_weight_x=np.full(4, 2.0),
    detection_weight_y=np.full(4, 8.0),
    spatial_weight=np.ones(4),
    bilateral_weight=np.full(4, 3.0),
    compatibility=1 - np.eye(4),
    instance_weights=(3.0, 4.0),
)
_KEY = 10  # pixels of the legend's key, which may be in a bar's column
WEIGHTS = ("detection_weight_x", "detection_weight_y", "spatial_weight", "bilateral_weight")


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_bar_is_as_high_as_the_weight_has_moved(tmp_path: Path, name: str) -> None:
    colour, lower = PALETTE[(1, 3)[WEIGHTS.index(name) % 2]], WEIGHTS.index(name) >= 2
    change = np.array([0.0, 2.0, 1.0, 0.0])
    now = replace(INITIAL, **{name: getattr(INITIAL, name) + change})
    save_crf_parameters(tmp_path / "crf.png", now, INITIAL, CLASSES, "step 3")
    with Image.open(tmp_path / "crf.png") as file:
        picture = np.asarray(file.convert("RGB"), np.float64) / 255
    half, width = len(picture) // 2, picture.shape[1] // 2
    rows = picture[half:, :width] if lower else picture[:half, :width]
    heights = (np.abs(rows - colour).max(axis=2) < 0.02).sum(axis=0)
    tall = heights[heights > _KEY + 2]
    assert abs(tall.max() - 2 * tall.min()) <= _KEY + 2


def test_parameters_that_have_not_moved_make_no_bars(tmp_path: Path) -> None:
    save_crf_parameters(tmp_path / "crf.png", INITIAL, INITIAL, CLASSES, "step 0")
    with Image.open(tmp_path / "crf.png") as file:
        picture = np.asarray(file.convert("RGB"), np.float64) / 255
    for colour in PALETTE[[1, 3]]:
        assert (np.abs(picture - colour).max(axis=2) < 0.02).sum(axis=0).max() <= _KEY
