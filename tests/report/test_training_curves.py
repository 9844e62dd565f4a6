from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instseg.report.colours import PALETTE
from instseg.report.training_curves import save_training_curves


def columns(picture: np.ndarray, colour: np.ndarray) -> tuple[int, int]:
    """The first and the last column where the colour is."""
    found = np.flatnonzero((np.abs(picture - colour).max(axis=2) < 0.02).any(axis=0))
    return int(found[0]), int(found[-1])


def test_stages_follow_each_other_in_proportion_to_their_steps(tmp_path: Path) -> None:
    stages = {
        "first": {"loss": [(0, 1.0), (300, 0.5)]},
        "second": {"loss": [(0, 0.5), (100, 0.4)], "AP": [(100, 20.0)]},
    }
    save_training_curves(tmp_path / "curves.png", stages, ["loss", "AP"])
    with Image.open(tmp_path / "curves.png") as file:
        picture = np.asarray(file.convert("RGB"), np.float64) / 255
    (first, between), (second, last) = columns(picture, PALETTE[1]), columns(picture, PALETTE[2])
    assert abs(second - between) < 12  # the markers overlap
    assert (between - first) / (last - second) == pytest.approx(3, rel=0.1)
    upper = columns(picture[: len(picture) // 2], PALETTE[2])
    lower = columns(picture[len(picture) // 2 :], PALETTE[2])
    assert lower[0] > upper[0] + 50  # its second quantity has a point at the end alone


def test_many_points_are_drawn_with_their_running_mean(tmp_path: Path) -> None:
    """A loss that jumps between 0 and 2 has a mean near 1: the strong line stays in the middle."""
    noisy = [(step, float(2 * (step % 2))) for step in range(200)]
    save_training_curves(tmp_path / "curves.png", {"only": {"loss": noisy}}, ["loss"])
    with Image.open(tmp_path / "curves.png") as file:
        picture = np.asarray(file.convert("RGB"), np.float64) / 255
    rows = np.flatnonzero((np.abs(picture - PALETTE[1]).max(axis=2) < 0.02).sum(axis=1) > 20)
    assert 0.25 * len(picture) < rows[0]
    assert rows[-1] < 0.6 * len(picture)


def test_no_curve_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected curves with steps after 0, got none"):
        save_training_curves(tmp_path / "curves.png", {"first": {"loss": []}}, ["loss"])
