"""What takes part in a training, and what a batch is: one by one, together, or one after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from instseg.config import AugmentConfig, ModelConfig, TrainConfig
from instseg.models.network import InstanceNetwork
from instseg.models.semantic import SemanticNetwork
from instseg.structures import Sample
from instseg.training.augment import augment
from instseg.training.objective import Objective
from instseg.training.optimizer import freeze
from instseg.training.step import accumulate_gradients, gradient_norm
from tests.jobs.conftest import NUM_LABELS, make_sample

SAMPLES = [make_sample(index) for index in range(1, 5)]


class Body(nn.Module):
    """A semantic network of two layers, the second new."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 6, 3, padding=1)
        self.score = nn.Conv2d(6, NUM_LABELS, 1)
        self.dropout = dropout
        self.seen: list[tuple[torch.Size, torch.dtype]] = []

    def forward(self, images: Tensor) -> Tensor:
        features = self.trunk(images).relu()
        scores = self.score(nn.functional.dropout(features, self.dropout, self.training))
        self.seen.append((images.shape, scores.dtype))
        return scores

    def new_parameters(self) -> Any:
        return self.score.parameters()

    def stage_parameters(self, num_stages: int) -> Any:
        return self.trunk.parameters() if num_stages else iter(())


def build(dropout: float = 0.0, **changes: Any) -> tuple[Objective, Body]:
    """Of a network with a small semantic network in place of the one that the configuration names."""
    torch.manual_seed(0)
    config = replace(TrainConfig("data", "out", ModelConfig(semantic="fcn8s", fcn_width=8)), **changes)
    network = InstanceNetwork(replace(config.model, semantic="logits"), NUM_LABELS).train()
    body = Body(dropout)
    network.semantic = SemanticNetwork(body).train()
    freeze(network, config)
    return Objective(network, config), body


def gradients(objective: Objective, samples: list[Sample], num_passes: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """The totals, and the gradient by name."""
    objective.zero_grad(set_to_none=True)
    totals, _ = accumulate_gradients(objective, samples, range(len(samples)), num_passes, head_only=False)
    named = objective.network.named_parameters()
    return totals, {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("num_passes", [1, 2, 4])
def test_a_batch_in_parts_has_the_mean_gradient_of_its_images(num_passes: int) -> None:
    objective, body = build()
    alone = [gradients(objective, [sample]) for sample in SAMPLES]
    body.seen.clear()
    totals, together = gradients(objective, SAMPLES, num_passes)
    assert [shape[0] for shape, _ in body.seen] == [4 // num_passes] * num_passes
    torch.testing.assert_close(totals, torch.cat([total for total, _ in alone]), atol=1e-5, rtol=1e-5)
    for name, gradient in together.items():
        expected = torch.stack([each[name] for _, each in alone]).mean(0)
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4, msg=name)


def test_images_of_other_sizes_go_one_by_one_and_have_dropout_of_their_own() -> None:
    """Whatever comes before them: the same as in steps of their own with the same seeds."""
    objective, body = build(dropout=0.5)
    mixed = [
        augment(sample, AugmentConfig(crop=size), 0) for sample, size in zip(SAMPLES, (20, 24, 16, 32), strict=True)
    ]
    torch.manual_seed(99)
    totals, _ = objective(mixed, range(4), head_only=False)
    assert [shape[0] for shape, _ in body.seen] == [1] * 4
    for index, sample in enumerate(mixed):
        (alone,), _ = objective([sample], [index], head_only=False)
        assert alone == totals[index]
        (other,), _ = objective([sample], [index + 10], head_only=False)
        assert other != alone


def untrained(parts: nn.Module) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("takes part")

    parts.forward = fail


def test_the_network_alone_is_trained_without_any_crf() -> None:
    objective, _ = build(train_through="network", semantic_loss_weight=1.0, probability_floor=0.0)
    network = objective.network
    untrained(network.semantic_crf)
    untrained(network.instance_crf)
    totals, found = gradients(objective, SAMPLES)
    assert {name.split(".")[0] for name in found} == {"semantic"}
    for total, sample in zip(totals, SAMPLES, strict=True):
        logits, target = network.semantic_logits(sample), torch.from_numpy(sample.semantic).long()  # pyright: ignore
        torch.testing.assert_close(total, nn.functional.cross_entropy(logits[None], target[None], ignore_index=255))


def test_the_second_stage_leaves_the_instance_crf_out() -> None:
    objective, _ = build(train_through="semantic_crf")
    untrained(objective.network.instance_crf)
    _, losses = objective(SAMPLES[:1], [0], head_only=False)
    assert set(losses) == {"semantic_loss"}
    _, found = gradients(objective, SAMPLES)
    assert {name.split(".")[0] for name in found} == {"semantic", "semantic_crf"}
    assert all(gradient.any() for name, gradient in found.items() if name.startswith("semantic."))


def test_all_of_figure_2_reaches_the_network() -> None:
    objective, _ = build(semantic_loss_weight=0.0)
    _, found = gradients(objective, SAMPLES)
    assert {name.split(".")[0] for name in found} == {"semantic", "semantic_crf", "instance_crf"}
    assert found["semantic.body.trunk.weight"].any()


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        ({"frozen_stages": 1}, {"score"}),
        ({"learning_rate_network": 0.0}, set()),
        ({"learning_rate_network": 0.0, "learning_rate_new": 0.1}, {"score"}),
        ({"learning_rate_new": 0.0}, {"trunk"}),
    ],
)
def test_what_is_frozen_has_no_gradient(changes: dict[str, Any], left: set[str]) -> None:
    objective, _ = build(**changes)
    _, found = gradients(objective, SAMPLES[:1])
    assert {name.split(".")[2] for name in found if name.startswith("semantic.")} == left


def test_lower_precision_is_the_semantic_networks_alone() -> None:
    objective, body = build(precision="bfloat16")
    exact, _ = build()
    totals, found = gradients(objective, SAMPLES)
    expected, _ = gradients(exact, SAMPLES)
    assert {dtype for _, dtype in body.seen} == {torch.bfloat16}
    assert {gradient.dtype for gradient in found.values()} == {totals.dtype} == {torch.float32}
    assert not totals.equal(expected)
    torch.testing.assert_close(totals, expected, atol=0.05, rtol=0.05)


def test_the_norm_is_that_of_all_gradients_together() -> None:
    objective, _ = build()
    _, found = gradients(objective, SAMPLES[:2])
    expected = torch.cat([gradient.flatten().double() for gradient in found.values()]).norm().item()
    assert gradient_norm(objective.network.parameters()) == pytest.approx(expected, rel=1e-5)
