from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from instseg.evaluation.calibration import calibration
from instseg.report.reliability import COLOURS, save_reliability


def test_bars_are_as_high_as_the_share_of_right_detections(tmp_path: Path) -> None:
    scores = np.full(8, 0.5)
    half, all_right = calibration(scores, np.arange(8) < 4), calibration(scores, np.ones(8, bool))
    path = tmp_path / "new" / "calibration.png"
    save_reliability(path, {"detector_score": half, "validity": all_right})
    heights = [_height(path, name) for name in COLOURS]
    assert abs(heights[1] - 2 * heights[0]) <= 2
    assert heights[0] > 100


def _height(path: Path, name: str) -> int:
    """Pixels of the tallest run of the bars' colour, which is drawn over white, in the upper half."""
    with Image.open(path) as file:
        picture = np.asarray(file.convert("RGB"), np.float64) / 255
    expected = 0.85 * COLOURS[name] + 0.15
    near = np.abs(picture[: int(0.68 * len(picture))] - expected).max(axis=2) < 0.02
    return int(near.sum(axis=0).max())


def test_without_detections_there_is_a_picture_all_the_same(tmp_path: Path) -> None:
    nothing = calibration(np.zeros(0), np.zeros(0, bool))
    save_reliability(tmp_path / "calibration.png", {"detector_score": nothing, "validity": nothing})
    with Image.open(tmp_path / "calibration.png") as picture:
        assert picture.size == (1170, 720)
