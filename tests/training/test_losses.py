from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from instseg.evaluation.ap_r import image_record
from instseg.structures import Detections, InstanceMap, Sample
from instseg.training.losses import instance_loss, iou_loss, log_loss, match_instances, semantic_loss

Scene = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def random_scene(seed: int, size: int = 12) -> Scene:
    """A prediction and its classes, ground truth with void and its classes."""
    rng = np.random.default_rng(seed)
    num_detections, num_truths = rng.integers(0, 5, 2)
    coarse = rng.integers(0, num_detections + 1, (size // 3, size // 3))
    predicted = np.kron(coarse, np.ones((3, 3), np.int64))
    instances = rng.integers(-1, num_truths + 1, (size, size)).astype(np.int32)
    return predicted, rng.integers(1, 3, num_detections), instances, rng.integers(1, 3, num_truths)


def iou(predicted: np.ndarray, d: int, instances: np.ndarray, g: int) -> float:
    mine, truth, known = predicted == d + 1, instances == g + 1, instances >= 0
    return float((mine & truth).sum() / max(1, ((mine | truth) & known).sum()))


def best_total(scene: Scene) -> float:
    """Summed IoU of the best assignment, by trying every one."""
    predicted, labels, instances, truths = scene
    options = [*range(len(labels)), *[None] * len(truths)]
    return max(
        sum(iou(predicted, d, instances, g) for g, d in enumerate(choice) if d is not None and labels[d] == truths[g])
        for choice in itertools.permutations(options, len(truths))
    )


@pytest.mark.parametrize("seed", range(40))
def test_matching_is_the_best_of_all_permutations(seed: int) -> None:
    scene = predicted, labels, instances, truths = random_scene(seed)
    assigned = match_instances(*scene)
    pairs = [(g, d) for g, d in enumerate(assigned) if d >= 0]
    assert len({d for _, d in pairs}) == len(pairs)
    assert all(labels[d] == truths[g] and iou(predicted, d, instances, g) > 0 for g, d in pairs)
    assert sum(iou(predicted, d, instances, g) for g, d in pairs) == pytest.approx(best_total(scene))


@pytest.mark.parametrize("seed", range(10))
def test_numbering_of_the_ground_truth_does_not_matter(seed: int) -> None:
    _, labels, instances, truths = random_scene(seed)
    log_q = torch.from_numpy(np.random.default_rng(seed).normal(size=(len(labels) + 1, 12, 12))).log_softmax(0)
    order = np.random.default_rng(seed + 1).permutation(len(truths))
    renumbered = np.concatenate([[0], np.argsort(order) + 1, [-1]])[instances]
    expected = instance_loss(log_q, labels, instances, truths)
    torch.testing.assert_close(instance_loss(log_q, labels, renumbered, truths[order]), expected)


def test_log_loss_is_the_mean_over_the_pixels_that_are_not_void() -> None:
    log_q = torch.randn(3, 2, 2, dtype=torch.float64).log_softmax(0)
    semantic = np.array([[2, 255], [0, 1]], np.uint8)
    expected = -(log_q[2, 0, 0] + log_q[0, 1, 0] + log_q[1, 1, 1]) / 3
    torch.testing.assert_close(semantic_loss(log_q, semantic), expected)


def test_unmatched_ground_truth_is_background_and_void_is_ignored() -> None:
    log_q = torch.full((2, 1, 4), -1.0)
    log_q[1, 0, 1] = -0.5  # the one pixel that is predicted to be detection 0
    instances = np.array([[-1, 1, 2, 0]], np.int32)
    loss = instance_loss(log_q, np.array([5]), instances, np.array([5, 6]))
    assert loss.item() == pytest.approx((0.5 + 1.0 + 1.0) / 3)


def test_background_of_void_class_is_void() -> None:
    """The pixels that AP^r leaves out are those that the loss leaves out."""
    semantic, instances = np.array([[1, 255, 255, 0]], np.uint8), np.array([[1, 0, 1, 0]], np.int32)
    detections = Detections(np.array([1]), np.array([0.5], np.float32), np.array([[0, 0, 4, 1]], np.float32))
    sample = Sample("a", np.zeros((1, 4, 3), np.uint8), detections, semantic, instances, np.array([1]))
    log_q = torch.tensor([[[-1.0, -100.0, -2.0, -3.0]], [[-0.1, -200.0, -0.2, -4.0]]])
    loss = instance_loss(log_q, detections.labels, sample.known_instances, sample.instance_labels)
    assert loss.item() == pytest.approx((0.1 + 0.2 + 3.0) / 3)
    everything = InstanceMap(np.ones((1, 4), np.int32), np.array([1]), np.ones(1), np.zeros(1), semantic)
    assert image_record(sample, everything, semantic, 2).iou.item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("num_detections", [0, 3])
@pytest.mark.parametrize("case", ["no ground truth", "all void", "no instances"])
def test_degenerate_samples_keep_the_graph_and_stay_finite(num_detections: int, case: str) -> None:
    weight = torch.ones((), requires_grad=True)
    log_q = (weight * torch.randn(num_detections + 1, 4, 4)).log_softmax(0)
    fill = {"no ground truth": None, "all void": np.full((4, 4), -1), "no instances": np.zeros((4, 4), int)}[case]
    semantic = None if case != "all void" else np.full((4, 4), 255, np.uint8)
    labels = np.ones(num_detections, np.int64)
    loss = semantic_loss(log_q, semantic) + instance_loss(log_q, labels, fill, np.zeros(0, np.int64))
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.isfinite()
    assert loss.item() == 0 or case == "no instances"


def test_more_detections_than_the_void_label_of_images() -> None:
    log_q = torch.zeros(301, 1, 2)
    log_q[255, 0, 0] = 1
    loss = instance_loss(log_q, np.ones(300, np.int64), np.array([[1, 0]], np.int32), np.ones(1, np.int64))
    assert loss.item() == pytest.approx(-0.5)  # the pixel that detection 254 won counts, and is its own target


def test_gradients_agree_with_finite_differences() -> None:
    logits = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[0, 2, -1], [1, 1, 0]])
    assert torch.autograd.gradcheck(lambda x: log_loss(x.log_softmax(0), target), (logits,))
    transposed = logits.detach().permute(1, 2, 0).contiguous().requires_grad_()  # as the CRFs give it
    assert torch.autograd.gradcheck(lambda x: log_loss(x.log_softmax(2).permute(2, 0, 1), target), (transposed,))


def test_a_floor_bounds_what_a_sure_mistake_costs() -> None:
    log_q = torch.tensor([[[-0.1, -60.0]], [[-2.35, 0.0]]], dtype=torch.float64, requires_grad=True)
    target = torch.zeros(1, 2, dtype=torch.int64)
    q = log_q.detach()[0, 0].exp()
    expected = -torch.log(0.8 * q + 0.2).mean()
    torch.testing.assert_close(log_loss(log_q, target, 0.2), expected)
    assert log_loss(log_q, target, 0.2) < -np.log(0.2)
    assert log_loss(log_q, target) > 30
    assert torch.autograd.gradcheck(
        lambda x: log_loss(x, target, 0.2), (log_q.detach().clamp(min=-5).requires_grad_(),)
    )


def test_iou_loss_is_one_minus_the_mean_iou_of_hard_labels_and_soft_ones_have_a_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(-1, 3, (6, 7), generator=generator)
    predicted = torch.randint(0, 4, (6, 7), generator=generator)
    hard = torch.nn.functional.one_hot(predicted, 4).permute(2, 0, 1).double().clamp(min=1e-300).log()
    ious = []
    for label in range(3):
        mine, theirs = (predicted == label) & (target >= 0), target == label
        ious.append(((mine & theirs).sum() / (mine | theirs).sum()).item())
    assert iou_loss(hard, target).item() == pytest.approx(1 - np.mean(ious))
    soft = torch.randn(4, 6, 7, generator=generator, dtype=torch.float64).log_softmax(0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: iou_loss(x, target), (soft,))
    nothing = iou_loss(soft, torch.full((6, 7), -1))
    nothing.backward()
    assert nothing == 0
    assert soft.grad is not None
