"""The detection head's loss: values by hand, what does not count, jitter, and that it teaches masks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from instseg.models.crops import SIZE
from instseg.models.detection_head import DetectionHead, SeenDetections
from instseg.structures import Detections
from instseg.training.detection_loss import detection_loss, jitter_boxes
from tests.models.test_network import detections_of

WIDTH = 80
BOX = (10, 5, 58, 60)  # with its margin, columns 2..66 of an image of 64 rows: its window's pixels are the grid's
TWO = detections_of((1, 0.9, BOX), (2, 0.5, BOX), foregrounds=False)
MATCHES = np.array([0, -1])


def truth() -> np.ndarray:
    """Instance 1 has the upper half of the window, of which four columns are void."""
    instances = np.zeros((SIZE, WIDTH), np.int32)
    instances[:32, 2:66] = 1
    instances[:, 30:34] = -1
    return instances


def seen_as(masks: torch.Tensor, prior: list[float]) -> SeenDetections:
    return SeenDetections(masks.clone().requires_grad_(), torch.tensor(prior, requires_grad=True))


def perfect_masks() -> torch.Tensor:
    sure = torch.full((2, SIZE, SIZE), -20.0)
    sure[0, :32] = 20.0
    return sure


def test_what_is_right_costs_nothing():
    assert detection_loss(seen_as(perfect_masks(), [20.0, -20.0]), TWO, MATCHES, truth()) < 1e-4


def test_void_pixels_and_unmatched_detections_have_no_mask_to_learn():
    masks = torch.randn(2, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    seen = seen_as(masks, [0.0, 0.0])
    loss = detection_loss(seen, TWO, MATCHES, truth())
    loss.backward()
    gradient = seen.mask_logits.grad
    assert gradient is not None
    void = torch.zeros(2, SIZE, SIZE, dtype=torch.bool)
    void[:, :, 28:32] = void[1] = True
    assert (gradient[void] == 0).all()
    assert (gradient[~void] != 0).all()
    moved = torch.where(void, -masks, masks)
    torch.testing.assert_close(detection_loss(seen_as(moved, [0.0, 0.0]), TWO, MATCHES, truth()), loss)


def test_the_value_by_hand():
    instances = np.zeros((SIZE, WIDTH), np.int32)
    instances[:32] = 1
    undecided = seen_as(torch.zeros(2, SIZE, SIZE), [0.0, math.log(3.0)])
    dice = (2 * 0.5 * 2048 + 1) / (0.5 * 4096 + 2048 + 1)
    priors = (math.log(2.0) + math.log(4.0)) / 2  # of Pr(Y) = 1/2 that is right, and of 3/4 that is wrong
    expected = math.log(2.0) + (1 - dice) + 0.3 * priors
    assert detection_loss(undecided, TWO, MATCHES, instances).item() == pytest.approx(expected, rel=1e-5)


def test_gradients_agree_with_finite_differences():
    masks = torch.randn(2, SIZE, SIZE, dtype=torch.float64, requires_grad=True)
    prior = torch.randn(2, dtype=torch.float64, requires_grad=True)
    loss = lambda masks, prior: detection_loss(SeenDetections(masks, prior), TWO, MATCHES, truth())  # noqa: E731
    assert torch.autograd.gradcheck(loss, (masks, prior), fast_mode=True)


@pytest.mark.parametrize(
    ("detections", "instances"), [(TWO, None), (Detections.empty(SIZE, WIDTH), truth())], ids=["no truth", "none found"]
)
def test_nothing_to_learn_costs_nothing_and_keeps_the_graph(detections, instances):
    num = len(detections)
    seen = seen_as(torch.randn(num, SIZE, SIZE), [1.0] * num)
    loss = detection_loss(seen, detections, np.full(num, -1), instances)
    loss.backward()
    assert loss == 0
    assert seen.mask_logits.grad is not None
    assert seen.prior.grad is not None


def test_without_a_match_priors_alone_are_learned():
    seen = seen_as(torch.randn(2, SIZE, SIZE), [0.0, 0.0])
    loss = detection_loss(seen, TWO, np.full(2, -1), truth())
    loss.backward()
    assert loss.item() == pytest.approx(0.3 * math.log(2.0))
    assert seen.mask_logits.grad is not None
    assert not seen.mask_logits.grad.any()
    assert (seen.prior.grad > 0).all()  # pyright: ignore[reportOptionalOperand]


@st.composite
def spans(draw: st.DrawFn) -> tuple[np.float32, np.float32]:
    """From tiny to the whole of 0..100."""
    numbers = st.floats(0, 100, width=32)
    low, high = sorted(draw(st.lists(numbers, min_size=2, max_size=2, unique=True)))
    return np.float32(low), np.float32(high)


@given(st.lists(st.tuples(spans(), spans()), max_size=4), st.integers(0, 2**32))
def test_jittered_boxes_are_valid_and_near(sides, seed):
    rows = [(1 + k, 0.5, (x0, y0, x1, y1)) for k, ((x0, x1), (y0, y1)) in enumerate(sides)]
    given_boxes = detections_of(*rows, foregrounds=False)
    torch.manual_seed(seed)
    jittered = jitter_boxes(given_boxes, 100, 100)  # `Detections` refuses boxes without an area
    jittered.check_image(100, 100, num_labels=9)
    np.testing.assert_array_equal(jittered.labels, given_boxes.labels)
    np.testing.assert_array_equal(jittered.scores, given_boxes.scores)
    before, after = given_boxes.boxes.astype(np.float64), jittered.boxes.astype(np.float64)
    bounds = 0.1 * np.tile(before[:, 2:] - before[:, :2], 2) + np.spacing(np.float32(100))
    assert (np.abs(after - before) <= bounds).all()
    torch.manual_seed(seed)
    np.testing.assert_array_equal(jitter_boxes(given_boxes, 100, 100).boxes, jittered.boxes)


def test_jitter_moves_every_edge_both_ways():
    many = detections_of(*[(1, 0.5, (30, 20, 70, 80))] * 200, foregrounds=False)
    torch.manual_seed(0)
    moved = (jitter_boxes(many, 100, 100).boxes - many.boxes) / [40, 60, 40, 60]
    assert (moved.min(0) < -0.09).all()
    assert (moved.max(0) > 0.09).all()
    assert np.abs(np.corrcoef(moved.T) - np.eye(4)).max() < 0.3  # each on its own


def test_the_head_learns_masks_that_colours_tell():
    """Of two touching objects in boxes that are too large, where the class probabilities know nothing."""
    image, instances = torch.full((48, 64, 3), 40.0), np.zeros((48, 64), np.int32)
    for number, (columns, colour) in enumerate([(slice(8, 30), (220, 60, 60)), (slice(30, 54), (60, 60, 220))], 1):
        image[10:38, columns] = torch.tensor(colour).float()
        instances[10:38, columns] = number
    both = detections_of((1, 0.9, (2, 4, 36, 44)), (1, 0.9, (24, 4, 60, 44)), foregrounds=False)
    torch.manual_seed(0)
    head, logits, matches = DetectionHead(2), torch.zeros(2, 48, 64), np.array([0, 1])
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    for _ in range(70):
        optimizer.zero_grad()
        loss = detection_loss(head(image, logits, both), both, matches, instances)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        foregrounds = head.eval()(image, logits, both).foregrounds(both, 48, 64) > 0.5
    for number, mask in enumerate(foregrounds.unflatten(1, (48, 64)).numpy(), 1):
        assert (mask & (instances == number)).sum() / (mask | (instances == number)).sum() > 0.9
