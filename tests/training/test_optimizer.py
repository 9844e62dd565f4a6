"""Rates of each part over a training, and Adam's state from a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from instseg.config import ModelConfig, TrainConfig
from instseg.models.network import InstanceNetwork
from instseg.training.optimizer import build_optimizer, set_learning_rate, take_step

WITH_HEAD = ModelConfig(detection_head=True)
STEPS = 40  # per epoch
RATES: dict[str, Any] = {"learning_rate_crf": 0.5, "learning_rate_compatibility": 0.25, "learning_rate_head": 0.125}


def trained(**changes) -> tuple[InstanceNetwork, torch.optim.Adam, TrainConfig]:
    config = TrainConfig("data", "out", **RATES | changes)
    network = InstanceNetwork(config.model, num_labels=3)
    return network, build_optimizer(network, config), config


def rates(optimizer: torch.optim.Adam, config: TrainConfig) -> Iterator[list[float]]:
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
