"""The detection head: symmetries, where it begins, and what its gradients reach."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import mse_loss

from instseg.models import foreground as module
from instseg.models.crops import BOX, GIVEN, NUM_PLANES, OF_BACKGROUND, OF_CLASS, OF_OTHERS, RIVALS, SIZE, crop_planes
from instseg.models.detection_head import DetectionHead
from instseg.models.foreground import ForegroundNetwork
from instseg.models.validity import ValidityPrior, _agreement
from instseg.structures import Detections
from tests.models.test_network import detections_of

HEIGHT, WIDTH, LABELS = 40, 56, 4
ROWS = [(1, 0.9, (3.3, 4.1, 30.7, 30.2)), (1, 0.4, (20.9, 10.3, 50.8, 38.6)), (3, 1.0, (40.2, 2.2, 51.7, 9.6))]


def found(*rows) -> Detections:
    return detections_of(*rows, foregrounds=False)


@pytest.fixture
def scene() -> tuple[torch.Tensor, torch.Tensor]:
    """A random image, and logits of its classes."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (HEIGHT, WIDTH, 3), generator=generator).float()
    return image, torch.randn(LABELS, HEIGHT, WIDTH, generator=generator)


@pytest.fixture
def head() -> DetectionHead:
    """One that is not at its beginning: the embeddings and the prior's output are not 0."""
    torch.manual_seed(0)
    head = DetectionHead(LABELS).eval()
    with torch.no_grad():
        for weight in (head.foreground.of_class.weight, head.validity.out.weight):
            weight.normal_()
    return head


def test_the_order_of_detections_permutes_what_is_seen(head, scene):
    order = [2, 0, 1]
    direct, permuted = head(*scene, found(*ROWS)), head(*scene, found(*[ROWS[k] for k in order]))
    torch.testing.assert_close(permuted.mask_logits, direct.mask_logits[order], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(permuted.prior, direct.prior[order])


def test_mirror_images_are_seen_alike(head, scene):
    image, logits = scene
    mirrored = [(label, score, (WIDTH - x1, y0, WIDTH - x0, y1)) for label, score, (x0, y0, x1, y1) in ROWS]
    direct, of_mirrored = head(*scene, found(*ROWS)), head(image.flip(1), logits.flip(2), found(*mirrored))
    torch.testing.assert_close(of_mirrored.mask_logits, direct.mask_logits.flip(2), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(of_mirrored.prior, direct.prior, atol=1e-4, rtol=1e-4)


def test_training_sees_one_of_two_mirror_images_and_evaluation_their_mean(scene, monkeypatch):
    network, labels = ForegroundNetwork(LABELS), torch.tensor([1, 1, 3])
    planes = crop_planes(scene[0], scene[1].softmax(0), found(*ROWS))
    first, second = network._logits(planes, labels), network._logits(planes.flip(3), labels).flip(2)
    torch.testing.assert_close(network.eval()(planes, labels), (first + second) / 2, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(module, "_COLOUR_JITTER", 0.0)
    network.train()
    torch.manual_seed(0)
    seen = [min((first, second), key=lambda one: mse_loss(network(planes, labels), one)) for _ in range(12)]
    assert {id(one) for one in seen} == {id(first), id(second)}
    drawn = network(planes, labels)
    assert min((drawn - one).abs().max() for one in (first, second)) < 1e-4


def test_colours_are_shifted_in_training_alone(scene):
    network, labels = ForegroundNetwork(LABELS), torch.tensor([1, 1, 3])
    planes = crop_planes(scene[0], scene[1].softmax(0), found(*ROWS))
    seeds = (0, 0, 1)
    for training in (True, False):
        network.train(training)
        first, again, other = (network(planes, labels) for seed in seeds if torch.manual_seed(seed))
        torch.testing.assert_close(first, again, rtol=0, atol=0)
        mirrored = other.flip(2) if training else other
        assert (min((first - one).abs().max() for one in (other, mirrored)) > 1e-3) == training


def test_what_was_given_is_withheld_now_and_then_in_training(scene, monkeypatch):
    network, labels, received = ForegroundNetwork(LABELS), torch.tensor([1, 1, 3]), []
    planes = crop_planes(scene[0], scene[1].softmax(0), found(*ROWS))
    planes[:, GIVEN] = 0.5
    monkeypatch.setattr(network, "_logits", lambda planes, labels: received.append(planes) or planes[:, 0])
    for training in (True, False):
        network.train(training)
        received.clear()
        torch.manual_seed(0)
        for _ in range(100):
            network(planes, labels)
        withheld = [not torch.equal(p[:, GIVEN], planes[:, GIVEN]) for p in received]
        assert 15 < sum(withheld) < 45 if training else not any(withheld)
        boxes = [p for p, without in zip(received, withheld, strict=True) if without]
        assert all(torch.equal(p[:, GIVEN], p[:, BOX]) for p in boxes)


def test_a_class_has_an_embedding_of_its_own(scene):
    network, labels = ForegroundNetwork(LABELS).eval(), torch.tensor([1, 1, 3])
    planes = crop_planes(scene[0], scene[1].softmax(0), found(*ROWS))
    before = network(planes, labels)
    torch.testing.assert_close(network(planes, torch.tensor([2, 3, 1])), before)  # it begins the same for all
    with torch.no_grad():
        network.of_class.weight[3] += 1.0
    changed = (network(planes, labels) - before).abs().amax((1, 2))
    assert (changed > 1e-3).tolist() == [False, False, True]


@pytest.mark.parametrize("training", [True, False])
def test_no_detections_keep_the_graph(head, scene, training):
    seen = head.train(training)(*scene, Detections.empty(HEIGHT, WIDTH))
    assert seen.mask_logits.shape == (0, SIZE, SIZE)
    assert seen.prior.shape == (0,)
    assert seen.foregrounds(Detections.empty(HEIGHT, WIDTH), HEIGHT, WIDTH).shape == (0, HEIGHT * WIDTH)
    (seen.mask_logits.sum() + seen.prior.sum()).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())


@pytest.mark.parametrize("learned", [[True, False, True], [False] * 3, [True] * 3])
def test_only_learned_foregrounds_have_gradients_and_all_have_the_same_values(head, scene, learned):
    seen, plain = head(*scene, found(*ROWS), np.array(learned)), head(*scene, found(*ROWS))
    torch.testing.assert_close(seen.mask_logits, plain.mask_logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen.prior, plain.prior, atol=1e-4, rtol=1e-4)
    weight = head.foreground.out.weight
    for mask, has_gradient in zip(seen.mask_logits, learned, strict=True):
        (gradient,) = torch.autograd.grad(mask.sum(), weight, retain_graph=True)
        assert gradient.any() == has_gradient


def test_the_prior_begins_as_the_detectors_log_odds(scene):
    prior = DetectionHead(LABELS)(*scene, found(*ROWS)).prior
    scores = torch.tensor([0.9, 0.4, 1 - 1e-4])  # a score of 1 has finite ones
    torch.testing.assert_close(prior, torch.logit(scores), rtol=0, atol=0)


def test_the_prior_cannot_move_masks_nor_masks_the_prior(head, scene):
    head(*scene, found(*ROWS)).prior.sum().backward()
    assert all(parameter.grad is None for parameter in head.foreground.parameters())
    assert all(parameter.grad.any() for parameter in head.validity.parameters())
    head.zero_grad()
    head(*scene, found(*ROWS)).mask_logits.sum().backward()
    assert all(parameter.grad.any() for parameter in head.foreground.parameters())
    assert all(parameter.grad is None for parameter in head.validity.parameters())


def test_the_prior_knows_how_foreground_map_and_rivals_agree():
    planes, foregrounds = torch.zeros(2, NUM_PLANES, SIZE, SIZE), torch.zeros(2, SIZE, SIZE)
    planes[:, OF_CLASS], planes[:, OF_BACKGROUND], planes[:, OF_OTHERS] = 0.5, 0.2, 0.3
    planes[:, OF_CLASS, :32] = 0.9
    planes[:, OF_OTHERS, 5, 5] = 0.8
    planes[:, BOX, 16:48] = 1.0
    planes[:, RIVALS, 40:] = 1.0
    foregrounds[0, 32:] = 0.5  # half in the box, three quarters of it a rival's; the other is empty
    expected = [0.5, 0.2, 0.3, 0.75, 0.25, 0.7, 0.25, 0.5, 0.8]
    features = _agreement(planes, foregrounds)
    np.testing.assert_allclose(features[0], expected, rtol=1e-5)
    np.testing.assert_allclose(features[1], [0, 0, 0, 0, 0, 0.7, 0.25, 0, 0.8], rtol=1e-5)


def test_scores_decide_until_something_is_learned():
    """Whatever the planes are."""
    prior, scores = ValidityPrior(LABELS), torch.rand(8).clamp(1e-3, 1 - 1e-3)
    planes, labels = torch.randn(8, NUM_PLANES, SIZE, SIZE), torch.randint(1, LABELS, (8,))
    learned = prior(planes, torch.rand(8, SIZE, SIZE), labels, scores)
    torch.testing.assert_close(learned, torch.logit(scores), rtol=0, atol=0)
