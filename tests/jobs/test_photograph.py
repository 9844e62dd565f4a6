"""The README's photograph: each of the four things is one instance, and the CRF moves the map to the image's edges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from instseg.jobs import photograph


def test_the_photograph_is_segmented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    draw = photograph.save_steps
    monkeypatch.setattr(photograph, "save_steps", lambda *given: (seen.update(given=given), draw(*given)))
    photograph.save_photograph(tmp_path / "photograph.png")
    _, sample, before, found, _ = seen["given"]
    assert sorted(found.labels.tolist()) == [1, 2, 3, 4]
    assert (before != found.semantic).mean() > 0.02
    gradient = np.abs(np.diff(sample.image.astype(float), axis=1)).sum(2)
    edges = {name: gradient[np.diff(plane.astype(int), axis=1) != 0].mean() for name, plane in
             (("before", before), ("after", found.semantic))}  # fmt: skip
    assert edges["after"] > 2 * edges["before"]
    with Image.open(tmp_path / "photograph.png") as picture:
        assert picture.width > picture.height
    assert (tmp_path / "photograph.png").stat().st_size < 300_000
