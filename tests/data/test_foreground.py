from __future__ import annotations

import cv2
import numpy as np
import pytest

from instseg.config import GrabCutConfig
from instseg.data.foreground import compute_foregrounds
from instseg.structures import Detections


def _detections(*boxes: tuple[float, float, float, float]) -> Detections:
    num = len(boxes)
    return Detections(np.ones(num, np.int64), np.full(num, 0.5, np.float32), np.array(boxes, np.float32))


@pytest.fixture
def image() -> np.ndarray:
    """A bright disc on a dark ground, both noisy, so that an unseeded GrabCut varies."""
    rng = np.random.default_rng(0)
    rows, columns = np.indices((60, 80))
    disc = np.hypot(rows - 30, columns - 40) < 15
    return (np.where(disc, 170, 90)[..., None] + rng.normal(0, 25, (60, 80, 3))).clip(0, 255).astype(np.uint8)


def test_finds_the_object(image: np.ndarray) -> None:
    clean = cv2.GaussianBlur(image, (0, 0), 2)
    detections, sources = compute_foregrounds(clean, _detections((23, 13, 58, 47)), "a", GrabCutConfig(5))
    assert sources == ["grabcut"]
    assert detections.foregrounds is not None
    rows, columns = np.indices((60, 80))
    disc = np.hypot(rows - 30, columns - 40) < 15
    found = detections.foregrounds[0]
    assert (found & disc).sum() / (found | disc).sum() > 0.8  # the blur widens the disc by a pixel


def test_depends_on_its_arguments_alone(image: np.ndarray) -> None:
    boxes = [(20, 10, 60, 50), (25, 5, 62, 55), (10, 10, 50, 50)]
    together, _ = compute_foregrounds(image, _detections(*boxes), "a", GrabCutConfig())
    for _ in range(3):
        cv2.setRNGSeed(int(np.random.default_rng().integers(1 << 30)))
        again, _ = compute_foregrounds(image, _detections(*boxes), "a", GrabCutConfig())
        np.testing.assert_array_equal(again.foregrounds, together.foregrounds)
    first, _ = compute_foregrounds(image, _detections(boxes[0]), "a", GrabCutConfig())
    assert first.foregrounds is not None
    assert together.foregrounds is not None
    np.testing.assert_array_equal(first.foregrounds[0], together.foregrounds[0])


def test_the_seed_comes_from_image_and_index(image: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(cv2, "setRNGSeed", seeds.append)
    box = (20, 10, 60, 50)
    compute_foregrounds(image, _detections(box, box), "a", GrabCutConfig())
    compute_foregrounds(image, _detections(box), "b", GrabCutConfig())
    assert len(set(seeds)) == 3
    assert seeds[0] == 868545771  # stable across versions of ours: data sets of one format agree


def test_stays_within_the_box(image: np.ndarray) -> None:
    detections, _ = compute_foregrounds(image, _detections((20.4, 10.6, 60, 50)), "a", GrabCutConfig())
    assert detections.foregrounds is not None
    outside = detections.foregrounds[0].copy()
    outside[11:50, 20:60] = False
    assert not outside.any()


@pytest.mark.parametrize("box", [(15, 5, 80, 60), (0, 0, 65, 55)])
def test_boxes_at_the_border_of_the_image(image: np.ndarray, box: tuple[float, float, float, float]) -> None:
    clean = cv2.GaussianBlur(image, (0, 0), 2)
    detections, sources = compute_foregrounds(clean, _detections(box), "a", GrabCutConfig())
    assert sources == ["grabcut"]
    assert detections.foregrounds is not None
    assert detections.foregrounds[0, 25:35, 35:45].all()


def _seen(monkeypatch: pytest.MonkeyPatch, found: slice) -> list[np.ndarray]:
    """The images that GrabCut is called with, in place of which those rows of the box become foreground."""
    images: list[np.ndarray] = []

    def mark(image: np.ndarray, mask: np.ndarray, rectangle: tuple[int, int, int, int], *_: object) -> None:
        x, y, width, height = rectangle
        mask[y : y + height, x : x + width][found] = cv2.GC_PR_FGD
        images.append(image)

    monkeypatch.setattr(cv2, "grabCut", mark)
    return images


def test_sees_the_box_and_a_margin_at_a_bounded_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).integers(0, 256, (600, 800, 3)).astype(np.uint8)
    images = _seen(monkeypatch, slice(None))
    boxes = ((200, 100, 600, 300), (200, 100, 240, 120), (0, 0, 800, 600))
    detections, _ = compute_foregrounds(image, _detections(*boxes), "a", GrabCutConfig(box_pixels=800, margin=0.5))
    # 400 x 200 pixels become 40 x 20, and 200 and 100 pixels on each side, of which the image has all, 20 and 10
    assert [seen.shape[:2] for seen in images] == [(40, 80), (40, 80), (24, 33)]
    np.testing.assert_array_equal(images[1], image[90:130, 180:260])
    assert detections.foregrounds is not None
    assert detections.foregrounds[1].sum() == 40 * 20
    assert 0.999 < detections.foregrounds[0].sum() / (400 * 200) <= 1  # enlarging rounds its corners
    assert 0.8 < detections.foregrounds[2].mean() < 1  # its frame is background


def test_the_box_serves_where_grabcut_leaves_next_to_nothing(
    image: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    _seen(monkeypatch, slice(7))  # of 40 rows
    detections, sources = compute_foregrounds(image, _detections((20, 10, 60, 50)), "a", GrabCutConfig())
    assert sources == ["box"]
    assert detections.foregrounds is not None
    assert detections.foregrounds[0].sum() == 40 * 40
    _seen(monkeypatch, slice(9))
    detections, sources = compute_foregrounds(image, _detections((20, 10, 60, 50)), "a", GrabCutConfig())
    assert sources == ["grabcut"]
    assert detections.foregrounds is not None
    assert detections.foregrounds[0].sum() == 9 * 40


def test_the_box_serves_where_there_is_no_background_to_learn(image: np.ndarray) -> None:
    detections, sources = compute_foregrounds(image, _detections((0, 10.2, 0.4, 20)), "a", GrabCutConfig())
    assert sources == ["box"]
    assert detections.foregrounds is not None
    expected = np.zeros((60, 80), np.bool_)
    expected[10:20, :1] = True
    np.testing.assert_array_equal(detections.foregrounds[0], expected)
    _, sources = compute_foregrounds(image[:2, :2].copy(), _detections((0, 0, 2, 2)), "a", GrabCutConfig())
    assert sources == ["box"]


def _opencv_error(image: np.ndarray, rectangle: tuple[int, int, int, int]) -> cv2.error:
    mask, models = np.zeros(image.shape[:2], np.uint8), (np.zeros((1, 65)), np.zeros((1, 65)))
    with pytest.raises(cv2.error) as caught:
        cv2.grabCut(image, mask, rectangle, *models, 1, cv2.GC_INIT_WITH_RECT)
    return caught.value


def test_the_box_serves_where_no_colour_model_can_be_learnt(image: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    error = _opencv_error(image, (0, 0, 80, 60))  # no pixel is left for the background

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(cv2, "grabCut", fail)
    for function in (error.func, "GMM::calcInverseCovAndDeterm"):
        error.func = function
        detections, sources = compute_foregrounds(image, _detections((20, 10, 60, 50)), "a", GrabCutConfig())
        assert sources == ["box"]
        assert detections.foregrounds is not None
        assert detections.foregrounds[0, 10:50, 20:60].all()


@pytest.mark.parametrize("mistake", ["greyscale", "rectangle outside the image", "memory"])
def test_other_errors_of_opencv_are_none_of_a_box(
    image: np.ndarray, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    error = _opencv_error(image[..., 0], (1, 1, 5, 5))
    if mistake == "rectangle outside the image":
        error = _opencv_error(image, (90, 90, 5, 5))
    if mistake == "memory":
        error.code, error.func = cv2.Error.StsNoMem, "initGMMs"

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(cv2, "grabCut", fail)
    with pytest.raises(cv2.error):
        compute_foregrounds(image, _detections((20, 10, 60, 50)), "a", GrabCutConfig())


def test_nothing_to_do(image: np.ndarray) -> None:
    detections, sources = compute_foregrounds(image, Detections.empty(60, 80), "a", GrabCutConfig())
    assert sources == []
    assert detections.foregrounds is not None
    assert detections.foregrounds.shape == (0, 60, 80)
