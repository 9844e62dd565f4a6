"""Adam or SGD with a learning rate for each part of the network, their schedule, and the state in a checkpoint."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from instseg.config import TrainConfig
from instseg.models.checkpoint import Checkpoint
from instseg.models.network import InstanceNetwork

_WARM_UP = 50  # steps in which the detection head's rate rises


def freeze(network: InstanceNetwork, config: TrainConfig) -> None:
    """Take the gradient from what the run does not train, which DDP and the optimizer then leave alone.

    Raises:
        ValueError: If the semantic network has not as many stages as are to be frozen.
    """
    frozen: list[nn.Parameter] = []
    if config.train_through == "network":
        frozen += [*network.semantic_crf.parameters(), *network.head_parameters()]
    if config.train_through != "instance_crf":
        frozen += network.instance_crf.parameters()
    if network.semantic is not None:
        new = set(network.semantic.new_parameters())
        frozen += network.semantic.stage_parameters(config.frozen_stages)
        frozen += [p for p in network.semantic.parameters() if _network_rate(config, p in new) == 0]
    for parameter in frozen:
        parameter.requires_grad_(False)


def build_optimizer(network: InstanceNetwork, config: TrainConfig) -> torch.optim.Optimizer:
    """Adam or SGD over the parameters that have a gradient, in named groups with rates and decay of their own."""
    compatibility = network.semantic_crf.dense.compatibility
    weights = [parameter for parameter in network.crf_parameters() if parameter is not compatibility]
    groups = [
        {"name": "crf", "params": weights, "lr": config.learning_rate_crf},
        {"name": "compatibility", "params": [compatibility], "lr": config.learning_rate_compatibility},
        *_semantic_groups(network, config),
        {"name": "head", "params": list(network.head_parameters()), "lr": config.learning_rate_head},
    ]
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=config.momentum)
    else:
        optimizer = torch.optim.Adam(groups, decoupled_weight_decay=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def _semantic_groups(network: InstanceNetwork, config: TrainConfig) -> list[dict[str, Any]]:
    """The semantic network's weights and biases, those with ImageNet weights and the new ones."""
    if network.semantic is None:
        return []
    new = set(network.semantic.new_parameters())
    groups: dict[str, dict[str, Any]] = {}
    for path, parameter in network.semantic.named_parameters():
        is_new, is_bias = parameter in new, path.endswith(".bias")
        rate, decay = _network_rate(config, is_new), config.weight_decay
        if is_bias:
            rate, decay = (2 * rate if config.optimizer == "sgd" else rate), 0.0
        name = ("new" if is_new else "network") + ("_bias" if is_bias else "")
        group = groups.setdefault(name, {"name": name, "params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def _network_rate(config: TrainConfig, is_new: bool) -> float:
    given = config.learning_rate_new if is_new else None
    return config.learning_rate_network if given is None else given


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The rate of each group as "learning_rate_<name>"."""
    return {f"learning_rate_{group['name']}": group["lr"] for group in optimizer.param_groups}


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainConfig, step: float, steps_per_epoch: int) -> None:
    """Follow the schedule at `step`, counted over all epochs; a fraction where the number of workers has changed.

    The detection head's begins at the first step, with a warm-up; all others' after its epochs, and is 0 before.
    """
    num_steps, first = config.num_epochs * steps_per_epoch, config.num_head_epochs * steps_per_epoch
    for group in optimizer.param_groups:
        if group["name"] == "head":
            factor = _schedule(config, step / num_steps) * min(1.0, (step + 1) / _WARM_UP)
        else:
            factor = _schedule(config, (step - first) / (num_steps - first)) if step >= first else 0.0
        group["lr"] = factor * group["initial_lr"]


def take_step(optimizer: torch.optim.Optimizer) -> None:
    """Move the parts that have begun: those whose rate is not 0.

    Adam would count a step of rate 0 too, and after many with zero gradients take its first real ones to be small
    beside an average over all: several times too long.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["lr"] == 0 else ():
            parameter.grad = None
    optimizer.step()


def _schedule(config: TrainConfig, progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress)) if config.learning_rate_schedule == "cosine" else 1.0


def optimizer_tensors(optimizer: torch.optim.Optimizer, network: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as "<parameter>.<quantity>"."""
    return {
        f"{name}.{quantity}": tensor
        for name, parameter in network.named_parameters()
        for quantity, tensor in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, network: nn.Module, checkpoint: Checkpoint) -> None:
    """Take over the state that `optimizer_tensors` gave; Adam's step counts stay on the CPU, where it keeps them."""
    parameters = dict(network.named_parameters())
    for key, tensor in checkpoint.optimizer().items():
        name, quantity = key.rsplit(".", 1)
        device = "cpu" if quantity == "step" else parameters[name].device
        optimizer.state[parameters[name]][quantity] = tensor.to(device)
