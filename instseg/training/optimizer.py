"""Adam with a learning rate for each part of the network, its schedule, and its state in a checkpoint."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from instseg.config import TrainConfig
from instseg.models.checkpoint import Checkpoint
from instseg.models.network import InstanceNetwork


def build_optimizer(network: InstanceNetwork, config: TrainConfig) -> torch.optim.Adam:
    """Adam over the CRFs' weights, the label compatibility and the semantic network, at their initial rates."""
    compatibility = network.semantic_crf.dense.compatibility
    weights = [parameter for parameter in network.crf_parameters() if parameter is not compatibility]
    groups = [
        {"params": weights, "lr": config.learning_rate_crf},
        {"params": [compatibility], "lr": config.learning_rate_compatibility},
        {"params": list(network.semantic_parameters()), "lr": config.learning_rate_network},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def set_learning_rate(optimizer: torch.optim.Adam, config: TrainConfig, step: int, num_steps: int) -> None:
    """Follow the schedule at `step` of `num_steps`, counted over all epochs."""
    cosine = config.learning_rate_schedule == "cosine"
    factor = 0.5 * (1 + math.cos(math.pi * step / num_steps)) if cosine else 1.0
    for group in optimizer.param_groups:
        group["lr"] = factor * group["initial_lr"]


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
