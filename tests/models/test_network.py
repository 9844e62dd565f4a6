"""Figure 2 as one module: ablations, empty detections, gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from instseg import Detections, InstanceNetwork, ModelConfig, Sample
from instseg.config import FULL, Ablation, InstanceCrfConfig, SemanticCrfConfig

HEIGHT, WIDTH = 24, 32
WITHOUT = Ablation(detection_potentials=False, validity=False)


def detections_of(*rows, foregrounds=True):
    """Rows of (label, score, box)."""
    found = Detections(
        np.array([r[0] for r in rows], np.int64),
        np.array([r[1] for r in rows], np.float32),
        np.array([r[2] for r in rows], np.float32).reshape(-1, 4),
    )
    return replace(found, foregrounds=found.box_masks(HEIGHT, WIDTH)) if foregrounds else found


def two_squares(detections=None) -> Sample:
    """Two bright squares of class 1 on a dark background; logits that know the class only roughly."""
    image = np.full((HEIGHT, WIDTH, 3), 30, np.uint8)
    logits = np.zeros((3, HEIGHT, WIDTH), np.float16)
    logits[0] = 1.0
    for x in (3, 19):
        image[6:18, x : x + 10] = (220, 160, 40) if x == 3 else (60, 140, 230)
        logits[1, 6:18, x : x + 10] = 2.5
    if detections is None:
        detections = detections_of((1, 0.9, (3, 6, 13, 18)), (1, 0.6, (19, 6, 29, 18)), (2, 0.3, (3, 6, 29, 18)))
    return Sample("two-squares", image, detections, logits=logits)


def network(**changes) -> InstanceNetwork:
    return InstanceNetwork(ModelConfig(**changes), num_labels=3)


@pytest.fixture
def with_head() -> InstanceNetwork:
    """A network whose detection head is as it is initialised, but for a prior that is not the detector's."""
    torch.manual_seed(0)
    model = network(detection_head=True).eval()
    assert model.detection_head is not None
    torch.nn.init.normal_(model.detection_head.validity.out.weight)
    return model


def test_finds_both_instances_and_lowers_the_false_positive():
    sample, model = two_squares(), network()
    output = model(sample)
    found = model.instance_map(output)
    assert found.labels.tolist() == [1, 1]
    assert found.detection_indices.tolist() == [0, 1]
    for index, x in enumerate((3, 19)):
        truth = np.zeros((HEIGHT, WIDTH), bool)
        truth[6:18, x : x + 10] = True
        mask = found.instances == index + 1
        assert (mask & truth).sum() / (mask | truth).sum() > 0.95
    assert output.validity[0] > 0.9
    assert output.validity[1] > 0.6
    assert output.validity[2] < 0.3


def test_given_logits_take_the_place_of_the_networks_own():
    sample, model = two_squares(), network()
    others = -model.semantic_logits(sample)
    given, stored = model(sample, logits=others), model(replace(sample, logits=others.numpy()))
    torch.testing.assert_close(given.semantic_logits, others)
    torch.testing.assert_close(given.log_q, stored.log_q)
    assert not torch.allclose(given.log_q, model(sample).log_q, atol=0.1)


def test_marginals_are_distributions():
    output = network()(two_squares())
    assert output.log_q.shape == (3, HEIGHT, WIDTH)
    assert output.instance_log_q.shape == (4, HEIGHT, WIDTH)
    for log_q in (output.log_q, output.instance_log_q):
        torch.testing.assert_close(log_q.exp().sum(0), torch.ones(HEIGHT, WIDTH))


def test_detection_order_permutes_the_instances():
    rows = [(1, 0.9, (3, 6, 13, 18)), (1, 0.6, (19, 6, 29, 18)), (2, 0.3, (3, 6, 29, 18))]
    order = [2, 0, 1]
    model = network()
    direct, permuted = model(two_squares()), model(two_squares(detections_of(*[rows[k] for k in order])))
    torch.testing.assert_close(permuted.validity, direct.validity[order])
    torch.testing.assert_close(permuted.instance_log_q[1:], direct.instance_log_q[1:][order], atol=1e-4, rtol=1e-4)


def test_no_detections_is_background_and_keeps_the_graph():
    sample, model = two_squares(Detections.empty(HEIGHT, WIDTH)), network()
    output = model(sample)
    found = model.instance_map(output)
    assert len(found) == 0
    assert not found.instances.any()
    (output.log_q.sum() + output.instance_log_q.sum() + output.validity.sum()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_failed_foreground_stays_a_candidate_with_its_own_score():
    sample = two_squares()
    foregrounds = sample.detections.foregrounds.copy()  # pyright: ignore[reportOptionalMemberAccess]
    foregrounds[1] = False
    sample = replace(sample, detections=replace(sample.detections, foregrounds=foregrounds))
    model = network()
    output = model(sample)
    torch.testing.assert_close(output.validity[1], torch.tensor(0.6))
    assert 1 in model.instance_map(output).detection_indices


def test_instance_loss_gradient_reaches_validity_weights():
    model = network()
    output = model(two_squares())
    output.instance_log_q[1, 8, 8].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert model.semantic_crf.detection_weight_y.grad[1] != 0  # pyright: ignore[reportOptionalSubscript]


@pytest.mark.parametrize("score", ["validity", "mask"])
@pytest.mark.parametrize("ablation", [WITHOUT, replace(WITHOUT, instance_crf=False), Ablation(validity=False)])
def test_ablations_rank_by_the_detector(ablation, score):
    sample, model = two_squares(), network(score=score)
    output = model(sample, ablation)
    torch.testing.assert_close(output.validity, torch.tensor([0.9, 0.6, 0.3]))
    np.testing.assert_allclose(model.instance_map(output, ablation).scores, [0.9, 0.6])


def test_ablations_are_what_they_say():
    sample = two_squares()
    ignored, alone = Ablation(validity=False), replace(WITHOUT, instance_crf=False)
    outputs = {ablation: network()(sample, ablation) for ablation in (alone, WITHOUT, ignored, FULL)}
    torch.testing.assert_close(outputs[ignored].log_q, outputs[FULL].log_q)
    torch.testing.assert_close(outputs[alone].log_q, outputs[WITHOUT].log_q)
    assert not torch.allclose(outputs[WITHOUT].log_q, outputs[FULL].log_q)
    still = ModelConfig(instance_crf=InstanceCrfConfig(num_iterations=0))
    log_q = InstanceNetwork(still, 3)(sample, WITHOUT).instance_log_q
    torch.testing.assert_close(log_q, outputs[alone].instance_log_q)


def test_no_iterations_leave_the_networks_outputs():
    still = ModelConfig(semantic_crf=SemanticCrfConfig(num_iterations=0))
    output = InstanceNetwork(still, 3)(two_squares())
    torch.testing.assert_close(output.log_q, output.semantic_logits.log_softmax(0))
    torch.testing.assert_close(output.validity, torch.tensor([0.9, 0.6, 0.3]))


def test_naive_assignment_cannot_share_a_box():
    rows = [(1, 0.9, (3, 6, 29, 18)), (1, 0.6, (19, 6, 29, 18))]
    sample, model, naive = two_squares(detections_of(*rows)), network(), Ablation(identification=False)
    assert model.instance_map(model(sample, naive), naive).detection_indices.tolist() == [0]


def test_mask_score_is_the_mean_marginal():
    sample, model = two_squares(), network(score="mask")
    output = model(sample)
    found = model.instance_map(output)
    mask = torch.from_numpy(found.instances == 1)
    torch.testing.assert_close(found.scores[0], output.log_q[1].exp()[mask].mean().item(), rtol=1e-5, atol=0)


def test_missing_or_wrong_logits_name_the_image():
    sample = two_squares()
    with pytest.raises(ValueError, match="two-squares: the sample has no logits"):
        network()(replace(sample, logits=None))
    with pytest.raises(ValueError, match="two-squares: logits: expected 3 classes, got 2"):
        network()(replace(sample, logits=np.zeros((2, 3, 4), np.float16)))


@torch.no_grad()
def test_the_detection_head_replaces_what_came_with_the_detections(with_head):
    sample = two_squares()
    bare = replace(sample, detections=replace(sample.detections, foregrounds=None))
    for output in (with_head(sample), with_head(bare)):
        detections = output.detections
        assert detections.seen is not None
        torch.testing.assert_close(detections.prior, detections.seen.prior.sigmoid())
        expected = detections.seen.foregrounds(sample.detections, HEIGHT, WIDTH)
        torch.testing.assert_close(detections.foregrounds, expected)
        assert not torch.allclose(output.log_q, network()(sample).log_q, atol=0.01)
    with pytest.raises(ValueError, match="expected foregrounds, got None; compute them"):
        with_head(bare, Ablation(detection_head=False))


@torch.no_grad()
@pytest.mark.parametrize(
    "ablation",
    [Ablation(detection_head=False, shape=False), WITHOUT, replace(WITHOUT, instance_crf=False)],
    ids=["no head", "no potentials", "identification alone"],
)
def test_without_its_detection_head_a_network_is_that_of_the_paper(with_head, ablation):
    sample, paper = two_squares(), network()
    sample.detections.foregrounds[0, :, :8] = False  # pyright: ignore[reportOptionalSubscript]
    found, expected = with_head(sample, ablation), paper(sample, ablation)
    assert found.detections.seen is None
    torch.testing.assert_close(found.log_q, expected.log_q)
    torch.testing.assert_close(found.validity, expected.validity)
    torch.testing.assert_close(found.instance_log_q, expected.instance_log_q)


@torch.no_grad()
def test_foregrounds_or_boxes_are_the_shapes_of_identification(with_head):
    """Where the box reaches and F_d does not, only the box lets an instance have pixels."""
    sample = two_squares(detections_of((1, 0.9, (3, 6, 13, 18))))
    head = with_head.detection_head
    assert head is not None
    torch.nn.init.zeros_(head.foreground.out.weight)
    torch.nn.init.constant_(head.foreground.out.bias, -12.0)
    before_crf = Ablation(instance_crf=False)
    of_foregrounds, of_boxes = (with_head(sample, replace(before_crf, shape=shape)) for shape in (True, False))
    torch.testing.assert_close(of_foregrounds.log_q, of_boxes.log_q)
    inside, window = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool)
    inside[6:18, 3:13] = window[4:20, 1:15] = True  # a margin of 0.15 of the sides, in whole pixels
    q, validity = of_boxes.log_q.exp(), of_boxes.validity[0]
    shape, weight = torch.tensor(-12.0).sigmoid(), with_head.config.map_weight
    rows = (
        (of_boxes, inside, q[1] * validity, q[0] * validity),
        (of_foregrounds, window, q[1] ** weight * validity * shape, q[0] ** weight * validity * (1 - shape)),
    )
    for output, covered, instance, background in rows:
        expected = torch.where(covered, instance / (instance + background), 0.0)
        torch.testing.assert_close(output.instance_log_q[1].exp(), expected, atol=1e-5, rtol=1e-4)


def test_gradients_of_an_instance_reach_the_detection_head():
    torch.manual_seed(0)
    model = network(detection_head=True)
    model(two_squares()).instance_log_q[1, 8, 8].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    for name, parameter in model.named_parameters():
        if name.startswith("detection_head.foreground") or "validity.out" in name or "validity.scale" in name:
            assert parameter.grad.any(), name  # pyright: ignore[reportOptionalMemberAccess]


def test_no_detections_are_none_to_the_detection_head(with_head):
    output = with_head(two_squares(Detections.empty(HEIGHT, WIDTH)))
    assert len(with_head.instance_map(output)) == 0
    torch.testing.assert_close(output.log_q, network()(two_squares(Detections.empty(HEIGHT, WIDTH))).log_q)


def test_what_the_head_sees_can_be_given(with_head):
    sample = two_squares()
    given = with_head.as_given(sample, with_head.semantic_logits(sample)).detections
    seen = with_head(sample).detections
    np.testing.assert_allclose(given.scores, seen.prior.detach(), rtol=1e-6)
    np.testing.assert_array_equal(given.foregrounds, (seen.foregrounds > 0.5).unflatten(1, (HEIGHT, WIDTH)))
    assert network().as_given(sample, torch.zeros(3, HEIGHT, WIDTH)) is sample
