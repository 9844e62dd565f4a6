"""Crops against the pixels that they are cut from, geometry by hand, mirror images, and the way back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from instseg.models.crops import (
    BOX,
    COLOURS,
    GIVEN,
    NUM_PLANES,
    OF_BACKGROUND,
    OF_CLASS,
    OF_OTHERS,
    RIVALS,
    SIZE,
    crop_planes,
    paste,
    to_grid,
    windows,
)
from instseg.structures import Detections
from tests.models.test_network import detections_of

HEIGHT, WIDTH = SIZE, 80
BOX_OF_A_GRID = (10, 5, 58, 60)  # with its margin, rows 0..64 (of the image) and columns 2..66: pixels are the grid's


def found(*rows) -> Detections:
    return detections_of(*rows, foregrounds=False)


def scene(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A random image (HEIGHT, WIDTH, 3) and class probabilities (4, HEIGHT, WIDTH)."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (HEIGHT, WIDTH, 3), generator=generator).float()
    return image, torch.randn(4, HEIGHT, WIDTH, generator=generator).softmax(0)


def inside(box: tuple[float, float, float, float]) -> np.ndarray:
    """(HEIGHT, WIDTH) bool, pixel centres inside the box."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return (x >= box[0]) & (x < box[2]) & (y >= box[1]) & (y < box[3])


def test_a_window_of_the_grids_size_is_cut_out_of_the_image():
    image, probabilities = scene()
    (planes,) = crop_planes(image, probabilities, found((2, 0.5, BOX_OF_A_GRID)))
    cut = slice(2, 66)
    for channel, plane in enumerate(planes[COLOURS]):
        torch.testing.assert_close(plane, (image[:, cut, channel] / 255 - 0.45) / 0.25, atol=1e-5, rtol=0)
    torch.testing.assert_close(planes[OF_CLASS], probabilities[2, :, cut])
    torch.testing.assert_close(planes[OF_BACKGROUND], probabilities[0, :, cut])
    torch.testing.assert_close(planes[OF_OTHERS], torch.maximum(probabilities[1], probabilities[3])[:, cut])


def test_geometry_by_hand():
    boxes = [(30, 20, 50, 40), (12, 8, 20, 16), (40, 40, 55, 55), (20, 30, 30, 50)]
    rows = [(1, 0.9, boxes[0]), (1, 0.2, boxes[1]), (2, 0.9, boxes[2]), (1, 0.5, boxes[3])]
    planes = crop_planes(*scene(), found((1, 0.5, BOX_OF_A_GRID), *rows))[0].numpy()
    cut = slice(2, 66)
    np.testing.assert_array_equal(planes[BOX], inside(BOX_OF_A_GRID)[:, cut])
    np.testing.assert_array_equal(planes[RIVALS], inside(boxes[0])[:, cut])  # not worse, another class', or as good
    y, x = np.mgrid[:HEIGHT, 2:66] + 0.5
    np.testing.assert_allclose(planes[-2], np.abs(x - 34) / 24, atol=1e-5)
    np.testing.assert_allclose(planes[-1], (y - 32.5) / 27.5, atol=1e-5)


def test_what_was_given_is_a_plane_and_the_box_where_nothing_was():
    one = found((1, 0.5, BOX_OF_A_GRID))
    (planes,) = crop_planes(*scene(), one)
    torch.testing.assert_close(planes[GIVEN], planes[BOX], rtol=0, atol=0)
    mask = np.random.default_rng(0).random((1, HEIGHT, WIDTH)) < 0.5
    (planes,) = crop_planes(*scene(), replace(one, foregrounds=mask))
    np.testing.assert_allclose(planes[GIVEN], mask[0, :, 2:66], atol=1e-6)


def test_windows_end_at_the_border_and_have_a_pixel():
    rows = [(0, 0, 10, 20), (95, 50, 100, 100), (50.2, 60.3, 50.4, 60.5), (40, 40, 60, 80)]
    expected = [(0, 23, 0, 12), (42, 100, 94, 100), (60, 61, 50, 51), (34, 86, 37, 63)]
    cut = windows(found(*[(1, 0.5, box) for box in rows]), 100, 100)
    assert [(y.start, y.stop, x.start, x.stop) for y, x in cut] == expected


def test_what_is_finer_than_the_grid_is_averaged():
    stripes = torch.arange(3 * SIZE).remainder(2).float().expand(1, 3 * SIZE, -1)
    assert (to_grid(stripes) - 0.5).abs().max() < 0.07  # every third pixel would be 0, 1, 0, 1, ...


def test_the_mirror_image_has_the_mirrored_planes():
    image, probabilities = scene(1)
    rows = [(1, 0.9, (3.3, 4.1, 40.7, 50.2)), (1, 0.4, (20.9, 10.3, 78.8, 63.6)), (3, 0.7, (50.2, 2.2, 61.7, 9.6))]
    mirrored = [(label, score, (WIDTH - x1, y0, WIDTH - x0, y1)) for label, score, (x0, y0, x1, y1) in rows]
    masks = np.random.default_rng(0).random((3, HEIGHT, WIDTH)) < 0.5
    planes = crop_planes(image, probabilities, replace(found(*rows), foregrounds=masks))
    mirror = replace(found(*mirrored), foregrounds=masks[:, :, ::-1])
    of_mirrored = crop_planes(image.flip(1), probabilities.flip(2), mirror)
    torch.testing.assert_close(of_mirrored, planes.flip(3), atol=1e-5, rtol=1e-5)
    logits = torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    pasted = paste(logits.flip(2), found(*mirrored), HEIGHT, WIDTH)
    torch.testing.assert_close(pasted, paste(logits, found(*rows), HEIGHT, WIDTH).flip(2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", [20, 64, 230])
def test_a_smooth_mask_comes_back(side: int):
    """Finer than its window, as fine, coarser."""
    box = (40, 60, 40 + side, 60 + side)
    y, x = torch.meshgrid(torch.arange(300) + 0.5, torch.arange(320) + 0.5, indexing="ij")
    logits = 4 - 24 * ((x - 40 - side / 2) ** 2 + (y - 60 - side / 2) ** 2) / side**2
    ((rows, columns),) = windows(found((1, 0.5, box)), 300, 320)
    (pasted,) = paste(to_grid(logits[None, rows, columns]), found((1, 0.5, box)), 300, 320)
    expected = torch.zeros(300, 320)
    expected[rows, columns] = logits[rows, columns].sigmoid()
    torch.testing.assert_close(pasted, expected, atol=0.05, rtol=0)
    assert ((pasted > 0) == (expected > 0)).all()  # 0 outside the window, and there alone


def test_gradients_of_paste_agree_with_finite_differences():
    logits = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    boxes = found((1, 0.5, (1, 1, 4, 5)), (1, 0.5, (3, 2, 9, 6)))
    assert torch.autograd.gradcheck(lambda x: paste(x, boxes, 7, 9), (logits,))


def test_no_detections_have_no_crops():
    none = Detections.empty(HEIGHT, WIDTH)
    assert crop_planes(*scene(), none).shape == (0, NUM_PLANES, SIZE, SIZE)
    assert paste(torch.zeros(0, SIZE, SIZE), none, HEIGHT, WIDTH).shape == (0, HEIGHT, WIDTH)
