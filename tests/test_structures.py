"""The records refuse what is not what they say, naming it."""

from __future__ import annotations

import numpy as np
import pytest

from instseg.structures import Detections, Sample, box_to_slices


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
