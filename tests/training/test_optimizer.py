"""Rates of each part over a training, and the optimizer's state from a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from instseg.config import ModelConfig, TrainConfig
from instseg.models.checkpoint import read_checkpoint, save_checkpoint
from instseg.models.network import InstanceNetwork
from instseg.training.optimizer import (
    build_optimizer,
    freeze,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rate,
    take_step,
)

WITH_HEAD = ModelConfig(detection_head=True)
SMALL_FCN = ModelConfig(semantic="fcn8s", fcn_width=8)
STEPS = 40  # per epoch
RATES: dict[str, Any] = {"learning_rate_crf": 0.5, "learning_rate_compatibility": 0.25, "learning_rate_head": 0.125}


def trained(**changes) -> tuple[InstanceNetwork, torch.optim.Optimizer, TrainConfig]:
    config = TrainConfig("data", "out", **RATES | changes)
    network = InstanceNetwork(config.model, num_labels=3)
    return network, build_optimizer(network, config), config


def rates(optimizer: torch.optim.Optimizer, config: TrainConfig) -> Iterator[list[float]]:
    """Of each group, at each step."""
    for step in range(config.num_epochs * STEPS):
        set_learning_rate(optimizer, config, step, STEPS)
        yield [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("model", [ModelConfig(), WITH_HEAD])
def test_every_parameter_has_the_rate_of_its_part(model):
    network, optimizer, _ = trained(model=model)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(rate)
    for name, parameter in network.named_parameters():
        part = "head" if name.startswith("detection_head") else "compatibility" if "compatibility" in name else "crf"
        assert rate.pop(id(parameter)) == RATES[f"learning_rate_{part}"], name
    assert not rate


def test_without_a_head_the_cosine_spans_the_training():
    _, optimizer, config = trained(num_epochs=2)
    for step, found in enumerate(rates(optimizer, config)):
        factor = 0.5 * (1 + math.cos(math.pi * step / (2 * STEPS)))
        assert found == pytest.approx([0.5 * factor, 0.25 * factor])


def test_the_head_begins_first_and_warms_up_and_all_end_together():
    _, optimizer, config = trained(model=WITH_HEAD, num_epochs=5, num_head_epochs=3)
    crf, compatibility, head = (torch.tensor(curve) for curve in zip(*rates(optimizer, config), strict=True))
    begin = 3 * STEPS
    assert not crf[:begin].any()
    assert not compatibility[:begin].any()
    assert (crf[begin], compatibility[begin]) == (0.5, 0.25)
    assert (crf[begin:].diff() < 0).all()
    cosine = 0.5 * (1 + torch.cos(math.pi * torch.arange(5 * STEPS) / (5 * STEPS)))
    torch.testing.assert_close(head[:50], 0.125 * cosine[:50] * torch.arange(1, 51) / 50)
    torch.testing.assert_close(head[50:], 0.125 * cosine[50:])
    for curve in (crf, compatibility, head):
        assert 0 < curve[-1] < 1e-3 * curve.max()


def test_a_constant_rate_stays():
    _, optimizer, config = trained(model=WITH_HEAD, num_epochs=3, num_head_epochs=2, learning_rate_schedule="constant")
    crf, _, head = (torch.tensor(curve) for curve in zip(*rates(optimizer, config), strict=True))
    assert not crf[: 2 * STEPS].any()
    assert (crf[2 * STEPS :] == 0.5).all()
    assert (head[50:] == 0.125).all()


def test_a_part_that_begins_late_begins_as_if_it_were_the_first_step():
    """Adam's first steps are as long as the rate, whatever the gradient; zeros before would make them longer."""
    network, optimizer, config = trained(
        model=WITH_HEAD, num_epochs=3, num_head_epochs=2, learning_rate_schedule="constant"
    )
    weight, of_head = network.instance_crf.spatial_weight, next(network.head_parameters())
    start, begin = weight.item(), 2 * STEPS
    for step in range(begin + 3):
        set_learning_rate(optimizer, config, step, STEPS)
        weight.grad = torch.tensor(1.0 if step >= begin else 0.0)
        of_head.grad = torch.ones_like(of_head)
        before = of_head.detach().clone()
        take_step(optimizer)
        assert (of_head < before).all()
        moved = 0.5 * max(0, step - begin + 1)
        assert weight.item() == pytest.approx(start - moved, abs=1e-4)


def groups_of(**changes) -> dict[str, Any]:
    _, optimizer, _ = trained(model=SMALL_FCN, learning_rate_network=1.0, weight_decay=0.25, **changes)
    return {group["name"]: group for group in optimizer.param_groups}


def test_new_layers_have_a_rate_of_their_own_and_biases_no_decay():
    groups = groups_of(learning_rate_new=10.0)
    found = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
    assert found == {
        "crf": (0.5, 0), "compatibility": (0.25, 0),
        "network": (1.0, 0.25), "network_bias": (1.0, 0.0), "new": (10.0, 0.25), "new_bias": (10.0, 0.0),
    }  # fmt: skip
    assert len(groups["network"]["params"]) == len(groups["network_bias"]["params"]) == 13  # of VGG-16
    assert len(groups["new"]["params"]) == len(groups["new_bias"]["params"]) == 5


def test_biases_have_twice_the_rate_with_sgd():
    groups = groups_of(optimizer="sgd", momentum=0.75)
    assert {name: group["lr"] for name, group in groups.items()} == {
        "crf": 0.5, "compatibility": 0.25, "network": 1.0, "network_bias": 2.0, "new": 1.0, "new_bias": 2.0,
    }  # fmt: skip
    assert {group["momentum"] for group in groups.values()} == {0.75}


def test_frozen_stages_are_not_moved():
    network, _, config = trained(model=SMALL_FCN, frozen_stages=2)
    freeze(network, config)
    optimizer = build_optimizer(network, config)
    moved = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    still = [name for name, parameter in network.named_parameters() if parameter not in moved]
    assert still == [f"semantic.body.features.{layer}.{part}" for layer in (0, 2, 5, 7) for part in ("weight", "bias")]


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_restored_optimizer_goes_on_as_it_would_have(kind, tmp_path):
    """Three steps, or one, a checkpoint and two."""

    def step(network, optimizer):
        for index, parameter in enumerate(network.parameters()):
            parameter.grad = torch.full_like(parameter, 0.1 * index - 0.3)
        take_step(optimizer)

    network, optimizer, config = trained(optimizer=kind)
    step(network, optimizer)
    save_checkpoint(tmp_path, network.state_dict(), {}, optimizer_tensors(optimizer, network))
    resumed = InstanceNetwork(config.model, num_labels=3)
    resumed.load_state_dict(network.state_dict())
    restored = build_optimizer(resumed, config)
    restore_optimizer(restored, resumed, read_checkpoint(tmp_path))
    for _ in range(2):
        step(network, optimizer)
        step(resumed, restored)
    torch.testing.assert_close(resumed.state_dict(), network.state_dict(), rtol=0, atol=0)
