"""Adam with a learning rate for each part of the network, its schedule, and its state in a checkpoint."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from instseg.config import TrainConfig
from instseg.models.checkpoint import Checkpoint
from instseg.models.network import InstanceNetwork

_WARM_UP = 50  # steps in which the detection head's rate rises


def build_optimizer(network: InstanceNetwork, config: TrainConfig) -> torch.optim.Adam:
    """Adam over the CRFs' weights, the compatibility, the semantic network and the detection head, at their rates."""
    compatibility = network.semantic_crf.dense.compatibility
    weights = [parameter for parameter in network.crf_parameters() if parameter is not compatibility]
    groups = [
        {"params": weights, "lr": config.learning_rate_crf},
        {"params": [compatibility], "lr": config.learning_rate_compatibility},
        {"params": list(network.semantic_parameters()), "lr": config.learning_rate_network},
        {"params": list(network.head_parameters()), "lr": config.learning_rate_head, "head": True},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def set_learning_rate(optimizer: torch.optim.Adam, config: TrainConfig, step: int, steps_per_epoch: int) -> None:
    """Follow the schedule at `step`, counted over all epochs.

    The detection head's begins at the first step, with a warm-up; all others' after its epochs, and is 0 before.
    """
    num_steps, first = config.num_epochs * steps_per_epoch, config.num_head_epochs * steps_per_epoch
    for group in optimizer.param_groups:
        if group.get("head"):
            factor = _schedule(config, step / num_steps) * min(1.0, (step + 1) / _WARM_UP)
        else:
            factor = _schedule(config, (step - first) / (num_steps - first)) if step >= first else 0.0
        group["lr"] = factor * group["initial_lr"]


def take_step(optimizer: torch.optim.Adam) -> None:
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


def optimizer_tensors(optimizer: torch.optim.Adam, network: nn.Module) -> dict[str, Tensor]:
    """Adam's state as "<parameter>.<quantity>"."""
    return {
        f"{name}.{quantity}": tensor
        for name, parameter in network.named_parameters()
        for quantity, tensor in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: torch.optim.Adam, network: nn.Module, checkpoint: Checkpoint) -> None:
    """Take over the state that `optimizer_tensors` gave; step counts stay on the CPU, where Adam keeps them."""
    parameters = dict(network.named_parameters())
    for key, tensor in checkpoint.optimizer().items():
        name, quantity = key.rsplit(".", 1)
        device = "cpu" if quantity == "step" else parameters[name].device
        optimizer.state[parameters[name]][quantity] = tensor.to(device)
