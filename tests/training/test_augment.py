"""Views of a sample: there and back again, every mask against its pixels, logits as the network sees them."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from instseg.config import AugmentConfig
from instseg.structures import IGNORE_LABEL, VOID, Detections, Sample
from instseg.training.augment import augment, crop, flip, scale

HEIGHT, WIDTH, LABELS = 37, 52, 4
ALL = AugmentConfig(flip=True, scale=(0.5, 2.0), crop=24)
WHOLE = slice(0, HEIGHT), slice(0, WIDTH)


def scene(seed: int = 0, num: int = 5) -> Sample:
    """Random boxes of integer pixels: instance g fills box g where no later one does, and so does foreground g."""
    random = np.random.default_rng(seed)
    corners = np.sort(random.integers(0, (WIDTH - 4, HEIGHT - 4), (2, num, 2)), axis=0)
    boxes = np.concatenate([corners[0], corners[1] + 4], 1).astype(np.float32)
    found = Detections(random.integers(1, LABELS, num), random.uniform(0.1, 1, num), boxes)
    instances = np.zeros((HEIGHT, WIDTH), np.int32)
    for index, mask in enumerate(found.box_masks(HEIGHT, WIDTH)):
        instances[mask] = index + 1
    present = np.unique(instances[instances > 0])
    numbers = np.searchsorted(present, np.arange(num + 1)) + 1
    instances = np.where(instances > 0, numbers[instances], 0).astype(np.int32)
    labels = found.labels[present - 1]
    semantic = np.concatenate([[0], labels])[instances].astype(np.uint8)
    instances[5:8], semantic[5:8] = VOID, IGNORE_LABEL
    image = random.integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    logits = random.normal(0, 3, (LABELS, 6, 9)).astype(np.float16)
    foregrounds = found.box_masks(HEIGHT, WIDTH)
    found = Detections(found.labels, found.scores, found.boxes, foregrounds)
    return Sample("scene", image, found, semantic, instances, labels, logits)


def assert_same(one: object, other: object) -> None:
    """Equal field by field, dtypes too."""
    for field in fields(one):  # pyright: ignore[reportArgumentType]
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, Detections):
            assert_same(left, right)
        elif isinstance(left, np.ndarray):
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right, err_msg=field.name)
        else:
            assert left == right


def known(array: np.ndarray | None) -> np.ndarray:
    assert array is not None
    return array


def upsampled(sample: Sample) -> np.ndarray:
    """(L, H, W), the logits as `InstanceNetwork.semantic_logits` brings them to the image's size."""
    coarse = torch.from_numpy(known(sample.logits)).float()[None]
    return interpolate(coarse, size=sample.image.shape[:2], mode="bilinear", align_corners=False)[0].numpy()


def test_nothing_is_done_by_default() -> None:
    sample = scene()
    assert augment(sample, AugmentConfig(), 3) is sample


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000))
def test_the_mirror_image_of_the_mirror_image_is_the_sample(seed: int) -> None:
    assert_same(flip(flip(scene(seed))), scene(seed))


def test_every_part_is_mirrored() -> None:
    sample, mirrored = scene(), flip(scene())
    for name in ("image", "semantic", "instances"):
        np.testing.assert_array_equal(getattr(mirrored, name), getattr(sample, name)[:, ::-1])
    np.testing.assert_array_equal(known(mirrored.detections.foregrounds), mirrored.detections.box_masks(HEIGHT, WIDTH))
    np.testing.assert_allclose(upsampled(mirrored), upsampled(sample)[:, :, ::-1], atol=1e-5)


def test_a_window_of_the_whole_image_is_the_sample() -> None:
    sample = scene()
    assert crop(sample, *WHOLE) is sample
    assert augment(sample, AugmentConfig(crop=max(HEIGHT, WIDTH)), 1) is sample


def test_scaled_up_by_two_every_second_pixel_is_the_sample() -> None:
    sample, double = scene(), scale(scene(), 2.0)
    assert double.image.shape == (2 * HEIGHT, 2 * WIDTH, 3)
    for name in ("semantic", "instances"):
        np.testing.assert_array_equal(getattr(double, name)[::2, ::2], getattr(sample, name))
    masks = known(double.detections.foregrounds)
    np.testing.assert_array_equal(masks[:, ::2, ::2], known(sample.detections.foregrounds))
    np.testing.assert_array_equal(double.detections.boxes, 2 * sample.detections.boxes)
    np.testing.assert_array_equal(known(double.logits), known(sample.logits))


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.7, 2.0])
def test_a_scaled_image_has_its_colours_in_place(factor: float) -> None:
    """A ramp stays one, but for the border, where there is nothing to average with."""
    columns = 20 + 4 * (np.arange(WIDTH) + 0.5)
    image = np.broadcast_to(columns[None, :, None], (HEIGHT, WIDTH, 3)).astype(np.uint8)
    scaled = scale(Sample("ramp", image, Detections.empty(HEIGHT, WIDTH)), factor).image
    places = (np.arange(scaled.shape[1]) + 0.5) * WIDTH / scaled.shape[1]
    np.testing.assert_allclose(scaled[:, 2:-2, 0], np.tile(20 + 4 * places[2:-2], (len(scaled), 1)), atol=1.5)


@settings(max_examples=30, deadline=None)
@given(st.data(), st.integers(0, 1000))
def test_a_window_has_what_lies_in_it(data: st.DataObject, seed: int) -> None:
    sample = scene(seed)
    rows, columns = (
        slice(start := data.draw(st.integers(0, side - 1)), data.draw(st.integers(start + 1, side)))
        for side in (HEIGHT, WIDTH)
    )
    part = crop(sample, rows, columns)
    height, width = part.image.shape[:2]
    np.testing.assert_array_equal(part.image, sample.image[rows, columns])
    np.testing.assert_array_equal(known(part.semantic), known(sample.semantic)[rows, columns])
    part.detections.check_image(height, width, LABELS)
    # A box has whole pixels here, as has its foreground: what is left of either is left of the other.
    masks = known(sample.detections.foregrounds)[:, rows, columns]
    kept = masks.any((1, 2))
    np.testing.assert_array_equal(known(part.detections.foregrounds), masks[kept])
    np.testing.assert_array_equal(part.detections.box_masks(height, width), masks[kept])
    np.testing.assert_array_equal(part.detections.labels, sample.detections.labels[kept])
    np.testing.assert_array_equal(part.detections.scores, sample.detections.scores[kept])
    assert_instances(part, known(sample.instances)[rows, columns], sample.instance_labels)


def assert_instances(part: Sample, before: np.ndarray, labels: np.ndarray) -> None:
    """The same partition of the same pixels, under the numbers 1..G without a gap, each with its class."""
    instances = known(part.instances)
    np.testing.assert_array_equal(instances <= 0, before <= 0)
    np.testing.assert_array_equal(instances[before <= 0], before[before <= 0])
    assert np.unique(instances[instances > 0]).tolist() == list(range(1, len(part.instance_labels) + 1))
    for index, label in enumerate(part.instance_labels):
        (old,) = np.unique(before[instances == index + 1])
        np.testing.assert_array_equal(before == old, instances == index + 1)
        assert labels[old - 1] == label


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_boxes_stay_around_their_instances(seed: int) -> None:
    """With all of flip, scale and crop: the box of each foreground's pixels, at most a pixel from its detection's."""
    view = augment(scene(seed % 7, num=3), ALL, seed)
    height, width = view.image.shape[:2]
    assert max(height, width) <= 24
    view.detections.check_image(height, width, LABELS)
    for box, mask in zip(view.detections.boxes, known(view.detections.foregrounds), strict=True):
        if mask.any():
            rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
            around = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            np.testing.assert_allclose(box, around, atol=1)
        else:  # thinner than the distance of two pixels
            assert min(box[2:] - box[:2]) <= 1
    labels = np.concatenate([[0], view.instance_labels, [IGNORE_LABEL]])
    np.testing.assert_array_equal(labels[known(view.instances)], known(view.semantic))


@pytest.mark.parametrize("seed", range(6))
def test_logits_of_a_view_are_those_of_the_whole(seed: int) -> None:
    """Cropped and upsampled in either order; float16 rounds to 2^-11 of the value."""
    sample = scene(seed)
    rows, columns = slice(seed, seed + 20), slice(3 * seed, 3 * seed + 30)
    whole, part = upsampled(sample)[:, rows, columns], upsampled(crop(sample, rows, columns))
    np.testing.assert_allclose(part, whole, rtol=2**-11, atol=1e-4)
    margin = np.sort(whole, axis=0)
    sure = margin[-1] - margin[-2] > 0.02
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(part.argmax(0)[sure], whole.argmax(0)[sure])
    view = augment(sample, ALL, seed)
    assert known(view.logits).dtype == np.float16
    assert upsampled(view).shape[1:] == view.image.shape[:2]


def test_a_view_depends_on_its_arguments_alone() -> None:
    views = []
    for state in (1, 2):
        torch.manual_seed(state)
        np.random.seed(state)
        before = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy()
        views.append(augment(scene(), ALL, 5))
        assert torch.equal(torch.get_rng_state(), before[0])
        np.testing.assert_array_equal(np.random.get_state(legacy=False)["state"]["key"], before[1])
    assert_same(*views)
    assert len({augment(scene(), ALL, seed).image.tobytes() for seed in range(20)}) == 20


def test_draws_are_spread_as_they_say() -> None:
    sample = scene()
    mirrored = [(augment(sample, AugmentConfig(flip=True), seed).image != sample.image).any() for seed in range(200)]
    assert 70 < sum(mirrored) < 130
    factors = [augment(sample, AugmentConfig(scale=(0.5, 2.0)), seed).image.shape[0] / HEIGHT for seed in range(200)]
    assert min(factors) < 0.55
    assert max(factors) > 1.9
    assert 70 < sum(factor < 1 for factor in factors) < 130  # as many halve as double
    image = np.arange(WIDTH, dtype=np.uint8)[None, :, None].repeat(3, axis=2)
    strip = Sample("strip", image, Detections.empty(1, WIDTH))
    starts = {int(augment(strip, AugmentConfig(crop=WIDTH - 3), seed).image[0, 0, 0]) for seed in range(100)}
    assert starts == {0, 1, 2, 3}


def test_what_a_sample_lacks_it_still_lacks() -> None:
    bare = Sample("bare", scene().image, Detections.empty(HEIGHT, WIDTH))
    for seed in range(10):
        view = augment(bare, ALL, seed)
        assert (view.semantic, view.instances, view.logits, len(view.detections)) == (None, None, None, 0)
        assert known(view.detections.foregrounds).shape == (0, *view.image.shape[:2])
    found = scene().detections
    without = Sample("x", scene().image, Detections(found.labels, found.scores, found.boxes))
    assert augment(without, ALL, 0).detections.foregrounds is None


def test_a_window_may_leave_nothing() -> None:
    instances = np.zeros((HEIGHT, WIDTH), np.int32)
    instances[20:30, 30:40] = 1
    one = Detections([2], [0.5], [[30, 20, 40, 30]])  # pyright: ignore[reportArgumentType]
    sample = Sample("corner", scene().image, one, instances=instances, instance_labels=np.array([2]))
    part = crop(sample, slice(0, 20), slice(0, 30))  # ends where the box begins
    assert len(part.detections) == len(part.instance_labels) == 0
    assert not known(part.instances).any()
    whole = crop(sample, slice(0, 30), slice(0, WIDTH))
    assert (len(whole.detections), whole.instance_labels.tolist()) == (1, [2])


def test_a_detection_may_lose_its_foreground_and_keep_its_box() -> None:
    foreground = np.zeros((1, HEIGHT, WIDTH), bool)
    foreground[0, 30:, 40:] = True
    one = Detections([1], [0.5], [[2, 2, 50, 36]], foreground)  # pyright: ignore[reportArgumentType]
    part = crop(Sample("x", scene().image, one), slice(0, 20), slice(0, 30))
    np.testing.assert_array_equal(part.detections.boxes, [[2, 2, 30, 20]])
    assert not known(part.detections.foregrounds).any()


def test_a_box_on_the_border_stays_inside_at_every_scale() -> None:
    one = Detections([1], [0.5], [[0.1, 0.1, WIDTH, HEIGHT]])  # pyright: ignore[reportArgumentType]
    sample = Sample("x", scene().image, one)
    for factor in np.linspace(0.02, 3, 60):
        scaled = scale(sample, factor)
        height, width = scaled.image.shape[:2]
        scaled.detections.check_image(height, width, LABELS)


@pytest.mark.parametrize("values", [(0.0, 1.0), (2.0, 1.0), (-1.0, 1.0), (1.0,), (1.0, float("nan"))])
def test_a_range_that_is_none_is_refused(values: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"^scale: expected"):
        AugmentConfig(scale=values)  # pyright: ignore[reportArgumentType]


def test_a_crop_of_less_than_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^crop: expected a value >= 0, got -1"):
        AugmentConfig(crop=-1)


def test_a_range_survives_json() -> None:
    assert AugmentConfig(scale=[0.5, 2]) == AugmentConfig(scale=(0.5, 2.0))  # pyright: ignore[reportArgumentType]
